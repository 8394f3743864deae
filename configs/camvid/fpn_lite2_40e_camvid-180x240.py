_base_ = [
    '../_base_/models/fpn_efficientnet-lite2.py',
    '../_base_/datasets/camvid_held-out.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_camvid_lite.py'
]
train_cfg = dict(max_epochs=40)
log_processor = dict(by_epoch=True)
randomness = dict(seed=0)
