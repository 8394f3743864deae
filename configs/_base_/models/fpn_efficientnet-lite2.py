_base_ = './fpn_efficientnet-lite0.py'
model = dict(
    backbone=dict(
        arch='lite2',
        init_cfg=dict(checkpoint='checkpoints/efficientnet-lite2.pth')),
    neck=dict(in_channels=[24, 48, 120, 352], out_channels=96),
    decode_head=dict(in_channels=[96] * 4, channels=96))
