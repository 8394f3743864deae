_base_ = 'retinanet_r18-w16_fpn_5e_digits.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='configs/align_boxes/faster-rcnn_r18-w32_fpn_5e_digits.py',
        checkpoint='work_dirs/faster-rcnn_r18-w32_fpn_5e_digits/'
        'epoch_5.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0,
    tap=dict(align='boxes'))
