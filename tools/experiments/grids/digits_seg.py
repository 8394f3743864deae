from experiments.study import INTRA, ablation, features, widths

title = 'Digit scenes, segmentation'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
wide = folder + 'fpn_r18-w24_5e_digits.py'
longer = {'train_cfg.max_epochs': 10, 'train_cfg.val_interval': 10}
dist = dict(
    config=folder + 'dist_fpn_r18-w12-w24_5e_digits.py', teacher='teacher w24')
study = ablation(
    folder + 'fpn_r18-w12_5e_digits.py',
    dict(
        config=folder + 'kd_fpn_r18-w12-w24_5e_digits.py',
        teacher='teacher w24'), dist, {
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
sweeps = study['sweeps']
