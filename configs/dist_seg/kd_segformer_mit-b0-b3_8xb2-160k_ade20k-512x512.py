_base_ = 'dist_segformer_mit-b0-b3_8xb2-160k_ade20k-512x512.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
