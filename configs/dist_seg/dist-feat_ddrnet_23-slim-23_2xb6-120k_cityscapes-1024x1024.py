_base_ = 'dist_ddrnet_23-slim-23_2xb6-120k_cityscapes-1024x1024.py'
# mean squared error of the maps before the last convolution, beside DIST on
# the class logits
model = dict(
    feature_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0, where='head'))
