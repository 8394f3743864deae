_base_ = 'wrn-40-1_1xb64_cifar100.py'
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='configs/dist_cls/wrn-40-2_1xb64_cifar100.py',
        checkpoint='work_dirs/wrn-40-2_1xb64_cifar100/epoch_240.pth'),
    distill_loss=dict(type='mmdist.KDLoss', tau=4.0, loss_weight=0.9),
    alpha=0.1)
