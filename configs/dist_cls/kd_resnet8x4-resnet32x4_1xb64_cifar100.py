_base_ = 'dist_resnet8x4-resnet32x4_1xb64_cifar100.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=4.0, loss_weight=0.9),
    alpha=0.1)
