_base_ = [
    '../_base_/models/pspnet_r18-w8-d8_camvid.py',
    '../_base_/datasets/camvid.py', 'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_camvid.py'
]
randomness = dict(seed=0)
