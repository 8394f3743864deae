# A teacher; its width is one of the options of tools/experiments/grids.
_base_ = [
    '../_base_/models/faster-rcnn_r18-w16_fpn_digits.py',
    '../_base_/datasets/digit_scenes_96_detection.py',
    '../_base_/schedules/schedule_digits.py', '../_base_/default_runtime.py'
]
model = dict(
    backbone=dict(base_channels=32, stem_channels=32),
    neck=dict(in_channels=[32, 64, 128, 256]))
train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(
    logger=dict(interval=50), checkpoint=dict(max_keep_ckpts=1))
randomness = dict(seed=0)
