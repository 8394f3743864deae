_base_ = [
    '../_base_/models/fpn_efficientnet-lite0.py',
    '../_base_/datasets/camvid_held-out.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_camvid_lite.py'
]
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
