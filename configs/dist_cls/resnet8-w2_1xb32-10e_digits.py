_base_ = [
    '../_base_/datasets/digit_images.py',
    '../_base_/schedules/schedule_digit_images.py'
]
custom_imports = dict(imports=['mmdist'])
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmdist.NarrowResNet', depth=8, stem_channels=2, base_channels=2),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=8,
        loss=dict(type='CrossEntropyLoss')))
