_base_ = 'mmseg::deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdist'])
# The authors' schedule: 40k iterations of 8 GPUs x 2 images.
train_cfg = dict(max_iters=40000, val_interval=4000)
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(
        type='PolyLR',
        eta_min=1e-4,
        power=0.9,
        begin=0,
        end=40000,
        by_epoch=False)
]
default_hooks = dict(
    checkpoint=dict(interval=4000, backend_args=dict(backend='mmdist.whole')))
custom_hooks = [dict(type='mmdist.SeedHook')]
auto_scale_lr = dict(enable=False, base_batch_size=16)
