_base_ = [
    '../_base_/models/retinanet_r18-w32_fpn_digits.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_digits.py', '../_base_/default_runtime.py'
]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20))
train_cfg = dict(max_epochs=12)
