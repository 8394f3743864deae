_base_ = 'dist_sparse-rcnn_r18-w16_retinanet-w32_12e_digits.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
