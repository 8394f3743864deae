_base_ = 'fpn_r18-w12_5e_digits.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='configs/experiments/fpn_r18-w24_5e_digits.py',
        # written by tools/run_experiments.py
        checkpoint='work_dirs/experiments/digits_seg/teacher_w24/seed_0/'
        'epoch_5.pth'),
    distill_loss=dict(type='mmdist.KDLoss', tau=1.0, loss_weight=1.0),
    alpha=1.0)
