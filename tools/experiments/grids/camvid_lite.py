title = 'Street scenes, segmentation from ImageNet weights'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
test = True
seeds = [0, 1, 2, 3, 4]

folder = 'configs/camvid/'
end = '_20e_camvid-180x240.py'
student = f'{folder}fpn_lite0{end}'
alone = 'student alone'
runs = {
    'teacher':
    dict(config=folder + 'fpn_lite2_40e_camvid-180x240.py', seeds=[0]),
    alone: dict(config=student),
    **{
        name:
        dict(
            config=f'{folder}{prefix}_fpn_lite0-lite2{end}',
            teacher='teacher',
            baseline=alone)
        for name, prefix in {
            'KD': 'kd',
            'DIST': 'dist',
            'DIST + features': 'dist-feat'
        }.items()
    },
    # about the time of a distilled run; it shows whether it has flattened
    f'{alone}, 40 epochs':
    dict(config=student, baseline=alone, options={'train_cfg.max_epochs': 40})
}
