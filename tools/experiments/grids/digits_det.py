title = 'Digit scenes, detection'
about = """
Faster R-CNN with a ResNet-18 of 8 base channels learns to find handwritten
digits, 4 epochs of 2,000 scenes of 96 pixels, from random weights. Its teacher
has the same neck and heads and 32 base channels; teachers are trained with one
seed. Every run validates on 240 other scenes after its last epoch, and no
checkpoint is picked. Sweeps have a seed of their own (10), so that the seeds
of the results were not what chose the options.
"""
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
student = folder + 'faster-rcnn_r18-w8_fpn_4e_digits-96.py'
wide = folder + 'faster-rcnn_r18-w32_fpn_4e_digits-96.py'
augmented = folder + 'faster-rcnn_r18-w32_fpn_8e-aug_digits-96.py'
kd = dict(
    config=folder + 'kd_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
    teacher='teacher w32')
dist = dict(
    config=folder + 'dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
    teacher='teacher w32')
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
    dict(
        config=wide,
        seeds=[0],
        options={
            'model.backbone.base_channels': 24,
            'model.backbone.stem_channels': 24,
            'model.neck.in_channels': [24, 48, 96, 192]
        }),
    'teacher w32':
    dict(config=wide, seeds=[0]),
    'teacher w48':
    dict(
        config=wide,
        seeds=[0],
        options={
            'model.backbone.base_channels': 48,
            'model.backbone.stem_channels': 48,
            'model.neck.in_channels': [48, 96, 192, 384]
        }),
    'teacher w32, 8 epochs':
    dict(
        config=wide,
        seeds=[0],
        options={
            'train_cfg.max_epochs': 8,
            'train_cfg.val_interval': 8
        }),
    'teacher w32, 8 epochs, augmented':
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
