title = 'Street scenes, segmentation'
about = """
The pair of [configs/camvid](../../configs/camvid): 367 frames for training,
and 101 for validation, which chose nothing. The teacher is trained with one
seed.
"""
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
seeds = [0, 1, 2]

folder = 'configs/camvid/'
end = '_1xb8-1k_camvid-180x240.py'
runs = {
    'teacher':
    dict(config=folder + 'deeplabv3_r18-w24-d8' + end, seeds=[0]),
    'student alone':
    dict(config=folder + 'pspnet_r18-w8-d8' + end),
    'KD':
    dict(
        config=folder + 'kd_pspnet_r18-w8-deeplabv3-w24' + end,
        teacher='teacher',
        baseline='student alone'),
    'DIST':
    dict(
        config=folder + 'dist_pspnet_r18-w8-deeplabv3-w24' + end,
        teacher='teacher',
        baseline='student alone')
}

conclusion = """
What it says:

- DIST is ahead of KD with each of the three seeds, by 0.9 ± 0.2, and comes
  within 0.6 of the teacher, which leads the student alone by 3.0.
- Both are better than the student alone with each seed.
- Of 11 classes, four (poles, signs, pedestrians, bicyclists: 3 % of the
  pixels) are not found by any of them, nor by the teacher.
"""
