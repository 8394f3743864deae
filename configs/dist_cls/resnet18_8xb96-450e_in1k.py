# The paper's strategy for students of strong teachers (B2): 450 epochs of 768
# images with RandAugment and erased rectangles.
_base_ = [
    'mmpretrain::_base_/models/resnet18.py',
    'mmpretrain::_base_/datasets/imagenet_bs64.py',
    'mmpretrain::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmdist'])
model = dict(
    head=dict(
        loss=dict(_delete_=True, type='LabelSmoothLoss',
                  label_smooth_val=0.1)))

bgr_mean, bgr_std = [103.53, 116.28, 123.675], [57.375, 57.12, 58.395]
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=224, interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(
            pad_val=[round(x) for x in bgr_mean], interpolation='bicubic')),
    dict(
        type='RandomErasing',
        erase_prob=0.2,
        mode='rand',
        min_area_ratio=0.02,
        max_area_ratio=1 / 3,
        fill_color=bgr_mean,
        fill_std=bgr_std),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=96, dataset=dict(pipeline=train_pipeline))

optim_wrapper = dict(
    optimizer=dict(
        type='RMSprop',
        lr=0.048,
        alpha=0.9,
        eps=1e-3,
        momentum=0.9,
        weight_decay=1e-5))
# of the 1,668 iterations of an epoch
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-5, by_epoch=False, end=3 * 1668),
    dict(
        type='StepLR',
        step_size=int(2.4 * 1668),
        gamma=0.97,
        by_epoch=False,
        begin=3 * 1668),
]
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, priority='ABOVE_NORMAL'),
    dict(type='mmdist.SeedHook')
]
train_cfg = dict(by_epoch=True, max_epochs=450, val_interval=1)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(
    checkpoint=dict(
        interval=5,
        max_keep_ckpts=2,
        backend_args=dict(backend='mmdist.whole')))
auto_scale_lr = dict(base_batch_size=768)
