# A teacher that is trained longer and sees every scene in other colours and
# turned.
_base_ = 'fpn_r18-w24_5e_digits.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PhotoMetricDistortion'),
    # Corners are background: MMSegmentation's class_weight takes no 255.
    dict(type='RandomRotate', prob=1., degree=10., pad_val=0, seg_pad_val=0),
    dict(type='PackSegInputs')
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=10, val_interval=10)
