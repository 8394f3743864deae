_base_ = [
    '../_base_/models/classifier_cifar100.py',
    '../_base_/datasets/cifar100_bs64.py',
    '../_base_/schedules/cifar100_240e.py'
]
custom_imports = dict(imports=['mmdist'])
model = dict(
    backbone=dict(type='mmdist.CIFARShuffleNetV1'), head=dict(in_channels=960))
optim_wrapper = dict(optimizer=dict(lr=0.01))
