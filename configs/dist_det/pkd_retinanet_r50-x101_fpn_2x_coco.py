_base_ = 'dist_retinanet_r50-x101_fpn_2x_coco.py'
# PKD: intra of the FPN's levels of strides 8 to 64, and no class logits
model = dict(
    distill_loss=None,
    feature_loss=dict(
        type='mmdist.DISTLoss', beta=0.0, gamma=6.0, layers=[0, 1, 2, 3]))
