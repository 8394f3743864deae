_base_ = 'dist_deeplabv3_r18-r101_8xb2-40k_cityscapes-512x1024.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
