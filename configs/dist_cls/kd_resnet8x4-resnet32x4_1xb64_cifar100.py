_base_ = 'resnet8x4_1xb64_cifar100.py'
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='configs/dist_cls/resnet32x4_1xb64_cifar100.py',
        checkpoint='work_dirs/resnet32x4_1xb64_cifar100/epoch_240.pth'),
    distill_loss=dict(type='mmdist.KDLoss', tau=4.0, loss_weight=0.9),
    alpha=0.1)
