_base_ = 'dist_resnet34-resnet152_8xb32_in1k.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=4.0, loss_weight=1.0))
