_base_ = [
    '../_base_/datasets/cifar100_bs64.py',
    '../_base_/schedules/cifar100_240e.py',
    'mmpretrain::_base_/default_runtime.py'
]
custom_imports = dict(imports=['mmdist', 'mmdist.models.backbones'])
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdist.WideResNet', depth=40, width=1),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=100,
        in_channels=64,
        loss=dict(type='CrossEntropyLoss')))
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=2))
