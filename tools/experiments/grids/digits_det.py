from experiments.study import INTRA, ablation, features, widths

title = 'Digit scenes, detection'
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
wide = folder + 'faster-rcnn_r18-w32_fpn_4e_digits-96.py'
longer = {'train_cfg.max_epochs': 8, 'train_cfg.val_interval': 8}
student = folder + 'faster-rcnn_r18-w8_fpn_4e_digits-96.py'
distilled = {
    'KD': folder + 'kd_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
    'DIST': folder + 'dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py'
}
study = ablation(
    student,
    *(dict(config=config, teacher='teacher w32')
      for config in distilled.values()), {
          **widths(wide, 16, 24, 32, 48), 'teacher w32, 8 epochs':
          dict(config=wide, seeds=[0], options=longer),
          'teacher w32, 8 epochs, augmented':
          dict(
              config=folder + 'faster-rcnn_r18-w32_fpn_8e-aug_digits-96.py',
              seeds=[0])
      })
# Is it the students' training that is too short?
alone = 'student alone, 8 epochs'
runs = {
    **study['runs'], alone:
    dict(config=student, seeds=[0, 1, 2], options=longer),
    **{
        f'{name}, 8 epochs, from teacher w32, 8 epochs':
        dict(
            config=config,
            teacher='teacher w32, 8 epochs',
            baseline=alone,
            seeds=[0, 1, 2],
            options=longer)
        for name, config in distilled.items()
    }
}
runs.update(
    features(
        dict(config=distilled['DIST'], teacher='teacher w32'), {
            'features alone': dict(INTRA, logits=False),
            'DIST + features, weight 4': dict(INTRA, gamma=4.0),
            'DIST + features, inter and intra': dict(INTRA, beta=1.0),
            'DIST + features, projected': dict(
                INTRA, project=True, seeds=range(5)),
            'DIST + features of the backbone': dict(INTRA, where='backbone')
        }, **INTRA))
sweeps = study['sweeps']
