_base_ = './dist_fpn_lite0-lite2_20e_camvid-180x240.py'
model = dict(feature_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0))
