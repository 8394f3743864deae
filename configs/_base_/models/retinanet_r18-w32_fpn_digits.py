# The same detector with a backbone and a neck twice as wide.
_base_ = './retinanet_r18-w16_fpn_digits.py'
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64))
