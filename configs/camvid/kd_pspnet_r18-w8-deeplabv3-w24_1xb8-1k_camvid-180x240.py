_base_ = './dist_pspnet_r18-w8-deeplabv3-w24_1xb8-1k_camvid-180x240.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
