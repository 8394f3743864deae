_base_ = './retinanet_efficientnet-lite0_fpn.py'
model = dict(
    backbone=dict(
        arch='lite2',
        init_cfg=dict(checkpoint='checkpoints/efficientnet-lite2.pth')),
    neck=dict(in_channels=[120, 352]),
    bbox_head=dict(stacked_convs=2))
