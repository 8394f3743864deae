# The same segmentor with a wider backbone, neck and head.
_base_ = './fpn_r18-w12_digits.py'
model = dict(
    backbone=dict(base_channels=24, stem_channels=24),
    neck=dict(in_channels=[24, 48, 96, 192], out_channels=48),
    decode_head=dict(in_channels=[48] * 4, channels=48))
