_base_ = 'fpn_r18-w12_5e_digits.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='configs/experiments/fpn_r18-w24_5e_digits.py',
        checkpoint='work_dirs/demo/seg/teacher/epoch_5.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
