_base_ = 'dist_pspnet_r18-deeplabv3-r101_4xb4-80k_ade20k-512x512.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
