from experiments.study import ablation, widths

title = 'Digit scenes, detection'
about = """
Faster R-CNN with a ResNet-18 of 8 base channels learns to find handwritten
digits, 4 epochs of 2,000 scenes of 96 pixels, from random weights. Its teacher
has the same neck and heads and 32 base channels; teachers are trained with one
seed. Every run is validated on 240 other scenes after its last epoch, and no
checkpoint is picked. Sweeps choose their best by these scenes, too, with a
seed of their own (10).
"""
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
scenes = dict(out_dir='data/digit_scenes_96', num_train=2000, size=96)
seeds = [0, 1, 2, 3, 4]

folder = 'configs/experiments/'
wide = folder + 'faster-rcnn_r18-w32_fpn_4e_digits-96.py'
longer = {'train_cfg.max_epochs': 8, 'train_cfg.val_interval': 8}
study = ablation(
    folder + 'faster-rcnn_r18-w8_fpn_4e_digits-96.py',
    dict(
        config=folder + 'kd_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
        teacher='teacher w32'),
    dict(
        config=folder + 'dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
        teacher='teacher w32'), {
            **widths(wide, 16, 24, 32, 48), 'teacher w32, 8 epochs':
            dict(config=wide, seeds=[0], options=longer),
            'teacher w32, 8 epochs, augmented':
            dict(
                config=folder + 'faster-rcnn_r18-w32_fpn_8e-aug_digits-96.py',
                seeds=[0])
        })
runs, sweeps = study['runs'], study['sweeps']
discrepancy = study['discrepancy']
