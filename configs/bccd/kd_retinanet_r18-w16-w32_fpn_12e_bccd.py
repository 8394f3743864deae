_base_ = './dist_retinanet_r18-w16-w32_fpn_12e_bccd.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
