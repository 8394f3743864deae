_base_ = 'dist_faster-rcnn_r50-cascade-mask-x101_fpn_2x_coco.py'
model = dict(mimic_loss=dict(type='mmdist.MimicLoss', loss_weight=1.0))
