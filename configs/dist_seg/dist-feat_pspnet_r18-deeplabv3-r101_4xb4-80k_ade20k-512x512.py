_base_ = 'dist_pspnet_r18-deeplabv3-r101_4xb4-80k_ade20k-512x512.py'
# mean squared error of the maps before the last convolution, beside DIST on
# the class logits
model = dict(
    feature_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0, where='head'))
