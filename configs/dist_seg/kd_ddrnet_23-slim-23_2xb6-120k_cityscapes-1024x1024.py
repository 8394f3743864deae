_base_ = 'dist_ddrnet_23-slim-23_2xb6-120k_cityscapes-1024x1024.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
