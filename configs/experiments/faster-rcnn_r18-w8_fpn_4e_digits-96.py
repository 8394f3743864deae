# The student: a quarter of the teacher's width, the same neck and heads.
_base_ = 'faster-rcnn_r18-w32_fpn_4e_digits-96.py'
model = dict(
    backbone=dict(base_channels=8, stem_channels=8),
    neck=dict(in_channels=[8, 16, 32, 64]))
