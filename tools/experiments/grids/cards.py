title = 'Playing cards, detection from ImageNet weights'
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
test = True
seeds = [0, 1, 2, 3, 4]

folder = 'configs/cards/'
student = folder + 'retinanet_lite0_fpn_20e_cards.py'
alone = 'student alone'
runs = {
    'teacher':
    dict(config=folder + 'retinanet_lite2_fpn_40e_cards.py', seeds=[0]),
    alone: dict(config=student),
    **{
        name:
        dict(
            config=f'{folder}{prefix}_retinanet_lite0-lite2_fpn_20e_cards.py',
            teacher='teacher',
            baseline=alone)
        for name, prefix in {
            'KD': 'kd',
            'DIST': 'dist',
            'DIST + features': 'dist-feat'
        }.items()
    },
    # as long as the distilled students take, and has it flattened?
    **{
        f'{alone}, {epochs} epochs':
        dict(
            config=student,
            baseline=alone,
            options={'train_cfg.max_epochs': epochs},
            **({} if epochs == 40 else dict(seeds=[0])))
        for epochs in (40, 80)
    }
}
