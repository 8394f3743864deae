title = 'Digit scenes, segmentation'
about = """
Semantic FPN with a ResNet-18 of 12 base channels and a neck and head of 24
learns to segment handwritten digits, 5 epochs of 2,000 scenes of 96 pixels,
from random weights. Its teacher has 24 base channels and a neck and head of
48; teachers are trained with one seed. Every run validates on 240 other scenes
after its last epoch, and no checkpoint is picked. Sweeps have a seed of their
own (10), so that the seeds of the results were not what chose the options.
"""
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
student = folder + 'fpn_r18-w12_5e_digits.py'
wide = folder + 'fpn_r18-w24_5e_digits.py'
augmented = folder + 'fpn_r18-w24_10e-aug_digits.py'
kd = dict(
    config=folder + 'kd_fpn_r18-w12-w24_5e_digits.py', teacher='teacher w24')
dist = dict(
    config=folder + 'dist_fpn_r18-w12-w24_5e_digits.py', teacher='teacher w24')
loss = 'model.distill_loss.'
mimic = {
    'model.mimic_loss.type': 'mmdist.MimicLoss',
    'model.mimic_loss.loss_weight': 1.0
}

sweeps = dict(
    kd=dict(
        kd,
        seeds=[10],
        options=[{
            loss + 'loss_weight': weight,
            loss + 'tau': tau
        } for weight in (0.5, 1.0, 2.0, 4.0) for tau in (1.0, 2.0, 4.0)]),
    dist=dict(
        dist,
        seeds=[10],
        options=[{
            loss + 'beta': weight,
            loss + 'gamma': weight,
            loss + 'tau': tau
        } for weight in (0.5, 1.0, 2.0, 4.0) for tau in (1.0, 2.0, 4.0)]))

# Of rising width, then of rising training strategy.
teachers = {
    'teacher w16':
    dict(
        config=wide,
        seeds=[0],
        options={
            'model.backbone.base_channels': 16,
            'model.backbone.stem_channels': 16,
            'model.neck.in_channels': [16, 32, 64, 128]
        }),
    'teacher w24':
    dict(config=wide, seeds=[0]),
    'teacher w36':
    dict(
        config=wide,
        seeds=[0],
        options={
            'model.backbone.base_channels': 36,
            'model.backbone.stem_channels': 36,
            'model.neck.in_channels': [36, 72, 144, 288]
        }),
    'teacher w48':
    dict(
        config=wide,
        seeds=[0],
        options={
            'model.backbone.base_channels': 48,
            'model.backbone.stem_channels': 48,
            'model.neck.in_channels': [48, 96, 192, 384]
        }),
    'teacher w24, 10 epochs':
    dict(
        config=wide,
        seeds=[0],
        options={
            'train_cfg.max_epochs': 10,
            'train_cfg.val_interval': 10
        }),
    'teacher w24, 10 epochs, augmented':
    dict(config=augmented, seeds=[0])
}

runs = {
    **teachers, 'student alone': dict(config=student),
    'KD': kd,
    'DIST': dist,
    'DIST, inter only': dict(dist, options={loss + 'gamma': 0.0}),
    'DIST, intra only': dict(dist, options={loss + 'beta': 0.0}),
    'DIST + mimic': dict(dist, options=mimic),
    'KD, best of its sweep': dict(kd, best_of='kd'),
    'DIST, best of its sweep': dict(dist, best_of='dist'),
    'KD, alpha=0': dict(kd, options={'model.alpha': 0.0}),
    'DIST, alpha=0': dict(dist, options={'model.alpha': 0.0}),
    **{
        f'{name} from {teacher}': dict(
            entry, teacher=teacher, seeds=[0, 1, 2])
        for teacher in teachers
        for name, entry in (('KD', kd), ('DIST', dist))
    }
}
discrepancy = dict(
    student='student alone',
    teachers=list(teachers),
    taught=dict(KD='KD from {}', DIST='DIST from {}'))
