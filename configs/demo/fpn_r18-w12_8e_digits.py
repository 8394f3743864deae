_base_ = [
    '../_base_/models/fpn_r18-w12_digits.py',
    '../_base_/datasets/digit_scenes_segmentation.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_digits_seg.py'
]
randomness = dict(seed=0)
log_processor = dict(by_epoch=True)
