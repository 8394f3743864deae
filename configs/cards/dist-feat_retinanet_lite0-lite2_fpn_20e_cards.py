_base_ = './dist_retinanet_lite0-lite2_fpn_20e_cards.py'
model = dict(feature_loss=dict(type='mmdist.DISTLoss', beta=0.0, gamma=1.0))
