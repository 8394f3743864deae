_base_ = './retinanet_r18-w16_fpn_12e_bccd.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='configs/bccd/retinanet_r18-w32_fpn_30e_bccd.py',
        checkpoint='work_dirs/bccd/retinanet_r18-w32_fpn_30e_bccd/'
        'epoch_30.pth'),
    distill_loss=dict(type='mmdist.KDLoss', tau=1.0, loss_weight=1.0),
    alpha=1.0)
