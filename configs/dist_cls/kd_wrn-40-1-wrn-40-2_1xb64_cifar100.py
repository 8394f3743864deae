_base_ = 'dist_wrn-40-1-wrn-40-2_1xb64_cifar100.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=4.0, loss_weight=0.9),
    alpha=0.1)
