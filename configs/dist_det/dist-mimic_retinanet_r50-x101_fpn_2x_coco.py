_base_ = 'dist_retinanet_r50-x101_fpn_2x_coco.py'
model = dict(mimic_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0))
