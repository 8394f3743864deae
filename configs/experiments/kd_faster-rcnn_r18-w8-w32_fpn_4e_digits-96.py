_base_ = 'dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
