from experiments.study import INTRA, LOSS, ablation, features, sweep, widths

title = 'Digit scenes, segmentation'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
wide = folder + 'fpn_r18-w24_5e_digits.py'
student = folder + 'fpn_r18-w12_5e_digits.py'
longer = {'train_cfg.max_epochs': 10, 'train_cfg.val_interval': 10}
kd, dist = (
    dict(
        config=f'{folder}{name}_fpn_r18-w12-w24_5e_digits.py',
        teacher='teacher w24') for name in ('kd', 'dist'))
study = ablation(
    student, kd, dist, {
        **widths(wide, 16, 24, 36, 48), 'teacher w24, 10 epochs':
        dict(config=wide, seeds=[0], options=longer),
        'teacher w24, 10 epochs, augmented':
        dict(config=folder + 'fpn_r18-w24_10e-aug_digits.py', seeds=[0])
    })
MSE = dict(type='mmdist.MimicLoss', loss_weight=1.0)
runs = {
    **study['runs'],
    **features(
        dist, {
            'features alone': dict(MSE, logits=False),
            'DIST + features, weight 4': dict(MSE, loss_weight=4.0),
            'DIST + features of the backbone': dict(MSE, where='backbone'),
            'DIST + features before the classifier': dict(MSE, where='head'),
            'DIST + features, intra': INTRA,
            'DIST + features, inter and intra': dict(INTRA, beta=1.0)
        }, **MSE)
}

# Is it the students' training that is too short?


def lasting(epochs: int, run: dict, *seeds: int) -> dict:
    """A run of other epochs, with ten validations."""
    options = {
        'train_cfg.max_epochs': epochs,
        'train_cfg.val_interval': epochs // 10
    }
    return dict(
        run, seeds=seeds or [0], options={
            **run.get('options', {}),
            **options
        })


late = '20 epochs'
taught = dict(
    teacher=f'teacher w24, {late}', baseline=f'student alone, {late}')
five = range(5)
# 30 epochs alone take as long as 20 with a teacher.
runs.update({
    f'student alone, {epochs} epochs':
    lasting(epochs, dict(config=student),
            *(five if epochs in (20, 30) else []))
    for epochs in (10, 20, 30, 40)
})
runs.update({
    taught['teacher']:
    lasting(20, dict(config=wide)),
    f'KD, tau 4, {late}':
    lasting(20, dict(kd, options={LOSS + 'tau': 4.0}, **taught), *five),
    f'DIST, {late}':
    lasting(20, dict(dist, **taught), *five),
    f'DIST + features, {late}':
    lasting(20, dict(runs['DIST + features'], **taught), *five)
})
# Four settings each, about the best of the shorter schedule.
sweeps = {
    **study['sweeps'], f'KD, {late}':
    sweep(
        lasting(20, dict(kd, **taught)),
        'loss_weight',
        settings=((1., 1.), (1., 2.), (1., 4.), (2., 4.))),
    f'DIST, {late}':
    sweep(
        lasting(20, dict(dist, **taught)),
        'beta',
        'gamma',
        settings=((1., 1.), (2., 1.), (1., 2.), (1., 4.)))
}
