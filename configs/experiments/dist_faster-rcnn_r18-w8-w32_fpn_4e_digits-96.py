_base_ = 'faster-rcnn_r18-w8_fpn_4e_digits-96.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='configs/experiments/faster-rcnn_r18-w32_fpn_4e_digits-96.py',
        checkpoint='work_dirs/demo/teacher/epoch_4.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
