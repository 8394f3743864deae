_base_ = 'dist_pspnet_r18-deeplabv3-r101_8xb2-40k_cityscapes-512x1024.py'
# mean squared error of the maps before the last convolution, beside DIST on
# the class logits
model = dict(
    feature_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0, where='head'))
