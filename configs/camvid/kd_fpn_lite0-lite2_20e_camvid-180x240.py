_base_ = './dist_fpn_lite0-lite2_20e_camvid-180x240.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
