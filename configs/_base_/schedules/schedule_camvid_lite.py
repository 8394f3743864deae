# From ImageNet weights on 294 frames, 37 iterations an epoch.
_base_ = './schedule_digits_seg.py'
train_cfg = dict(max_epochs=20)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=0.001, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.3))))
