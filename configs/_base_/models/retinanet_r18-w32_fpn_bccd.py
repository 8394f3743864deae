# The same detector with a backbone of twice the width.
_base_ = './retinanet_r18-w16_fpn_bccd.py'
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256]))
