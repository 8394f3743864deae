_base_ = 'mmpretrain::_base_/default_runtime.py'
# Clipped, because beta * tau**2 makes DIST's gradient large at first.
optim_wrapper = dict(
    optimizer=dict(
        type='SGD', lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4),
    clip_grad=dict(max_norm=5))
param_scheduler = dict(
    type='CosineAnnealingLR', by_epoch=True, convert_to_iter_based=True)
train_cfg = dict(by_epoch=True, max_epochs=10, val_interval=2)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(
        interval=2,
        max_keep_ckpts=1,
        backend_args=dict(backend='mmdist.whole')))
custom_hooks = [dict(type='mmdist.SeedHook')]
randomness = dict(seed=0)
