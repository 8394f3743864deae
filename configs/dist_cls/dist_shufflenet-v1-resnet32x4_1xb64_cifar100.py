_base_ = 'shufflenet-v1_1xb64_cifar100.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='configs/dist_cls/resnet32x4_1xb64_cifar100.py',
        checkpoint='work_dirs/resnet32x4_1xb64_cifar100/epoch_240.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=2.0, gamma=2.0, tau=4.0),
    alpha=1.0)
