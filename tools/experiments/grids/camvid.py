title = 'Street scenes, segmentation'
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
