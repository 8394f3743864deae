_base_ = [
    '../_base_/models/faster-rcnn_r18-w32_fpn_digits.py',
    '../_base_/datasets/digit_scenes_detection.py',
    '../_base_/schedules/schedule_digits.py', '../_base_/default_runtime.py'
]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=20))
