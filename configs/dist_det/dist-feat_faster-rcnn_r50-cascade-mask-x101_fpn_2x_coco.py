_base_ = 'dist_faster-rcnn_r50-cascade-mask-x101_fpn_2x_coco.py'
# intra of the outputs of the FPN, beside DIST on the class logits
model = dict(feature_loss=dict(type='mmdist.DISTLoss', beta=0.0, gamma=1.0))
