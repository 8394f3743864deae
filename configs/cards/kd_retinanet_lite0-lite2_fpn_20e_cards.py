_base_ = './dist_retinanet_lite0-lite2_fpn_20e_cards.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
