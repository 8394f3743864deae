# A teacher that is trained longer and sees every scene in other colours,
# moved, turned and scaled.
_base_ = 'faster-rcnn_r18-w32_fpn_4e_digits-96.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PhotoMetricDistortion'),
    dict(
        type='RandomAffine',
        max_rotate_degree=10.,
        max_translate_ratio=0.1,
        scaling_ratio_range=(0.8, 1.2),
        max_shear_degree=5.),
    dict(type='PackDetInputs')
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=8, val_interval=8)
