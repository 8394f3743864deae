_base_ = './retinanet_efficientnet-lite0_fpn.py'
model = dict(
    backbone=dict(
        arch='lite2',
        init_cfg=dict(checkpoint='checkpoints/efficientnet-lite2.pth')),
    neck=dict(in_channels=[48, 120, 352]))
