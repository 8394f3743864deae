_base_ = 'dist_fpn_r18-w12-w24_5e_digits.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
