title = 'Blood cells, detection'
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
test = True
seeds = [0, 1, 2]

folder = 'configs/bccd/'
runs = {
    f'{detector}, {name}':
    dict(
        config=f'{folder}{prefix}_fpn_{epochs}e_bccd.py',
        **(dict(seeds=[0]) if name == 'teacher' else {}),
        **(dict(
            teacher=f'{detector}, teacher',
            baseline=f'{detector}, student alone')
           if name in ('KD', 'DIST') else {}))
    for detector, names in {
        'RetinaNet': {
            'teacher': ('retinanet_r18-w32', 30),
            'student alone': ('retinanet_r18-w16', 12),
            'KD': ('kd_retinanet_r18-w16-w32', 12),
            'DIST': ('dist_retinanet_r18-w16-w32', 12)
        },
        'Faster R-CNN': {
            'teacher': ('faster-rcnn_r18-w32', 30),
            'student alone': ('faster-rcnn_r18-w8', 12),
            'KD': ('kd_faster-rcnn_r18-w8-w32', 12),
            'DIST': ('dist_faster-rcnn_r18-w8-w32', 12)
        }
    }.items()
    for name, (prefix, epochs) in names.items()
}
