_base_ = [
    '../_base_/models/retinanet_r18-w16_fpn_bccd.py',
    '../_base_/datasets/bccd_detection.py',
    '../_base_/schedules/schedule_bccd.py'
]
train_cfg = dict(max_epochs=12, val_interval=4)
optim_wrapper = dict(optimizer=dict(lr=0.002))
