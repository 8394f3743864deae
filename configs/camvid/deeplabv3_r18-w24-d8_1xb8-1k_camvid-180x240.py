_base_ = [
    '../_base_/models/deeplabv3_r18-w24-d8_camvid.py',
    '../_base_/datasets/camvid.py', 'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_camvid.py'
]
randomness = dict(seed=0)
