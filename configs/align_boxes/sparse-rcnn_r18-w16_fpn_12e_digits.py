_base_ = [
    '../_base_/models/sparse-rcnn_r18-w16_fpn_digits.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_digits.py', '../_base_/default_runtime.py'
]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20))
# Queries learn slower than anchors.
train_cfg = dict(max_epochs=12)
optim_wrapper = dict(
    optimizer=dict(lr=0.001, weight_decay=0.0001), clip_grad=dict(max_norm=1))
