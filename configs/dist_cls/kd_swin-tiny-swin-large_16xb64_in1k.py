_base_ = 'dist_swin-tiny-swin-large_16xb64_in1k.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=4.0, loss_weight=1.0))
