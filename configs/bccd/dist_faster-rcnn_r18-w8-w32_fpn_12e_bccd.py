_base_ = './faster-rcnn_r18-w8_fpn_12e_bccd.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='configs/bccd/faster-rcnn_r18-w32_fpn_30e_bccd.py',
        checkpoint='work_dirs/bccd/faster-rcnn_r18-w32_fpn_30e_bccd/'
        'epoch_30.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
