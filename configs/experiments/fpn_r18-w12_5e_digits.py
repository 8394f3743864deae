# A student.
_base_ = [
    '../_base_/models/fpn_r18-w12_digits.py',
    '../_base_/datasets/digit_scenes_segmentation.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_digits_seg.py'
]
randomness = dict(seed=0)
log_processor = dict(by_epoch=True)
train_cfg = dict(max_epochs=5, val_interval=5)
default_hooks = dict(checkpoint=dict(interval=1))
