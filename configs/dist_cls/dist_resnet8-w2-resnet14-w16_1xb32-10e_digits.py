_base_ = 'resnet8-w2_1xb32-10e_digits.py'
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='configs/dist_cls/resnet14-w16_1xb32-10e_digits.py',
        checkpoint='work_dirs/resnet14-w16_1xb32-10e_digits/epoch_10.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=2.0, gamma=2.0, tau=4.0),
    alpha=1.0)
