_base_ = 'dist_segformer_mit-b0-b3_8xb2-160k_ade20k-512x512.py'
# mean squared error of the maps before the last convolution, beside DIST on
# the class logits
model = dict(
    feature_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0, where='head'))
