_base_ = [
    '../_base_/models/faster-rcnn_r18-w8_fpn_bccd.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/schedule_bccd.py', '../_base_/default_runtime.py'
]
train_cfg = dict(max_epochs=12, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=0.002))
default_hooks = dict(
    logger=dict(interval=52), checkpoint=dict(interval=5, max_keep_ckpts=1))
randomness = dict(seed=0)
