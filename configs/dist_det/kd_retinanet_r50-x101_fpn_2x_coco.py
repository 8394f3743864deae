_base_ = 'dist_retinanet_r50-x101_fpn_2x_coco.py'
model = dict(
    distill_loss=dict(
        _delete_=True, type='mmdist.KDLoss', tau=1.0, loss_weight=1.0))
