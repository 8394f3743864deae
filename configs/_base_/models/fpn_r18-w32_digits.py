# The same segmentor with a wider backbone, neck and head.
_base_ = './fpn_r18-w12_digits.py'
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    decode_head=dict(in_channels=[64] * 4, channels=64))
