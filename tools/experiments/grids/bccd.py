title = 'Blood cells, detection'
about = """
The pairs of [configs/bccd](../../configs/bccd), 205 photographs for training
and a test split of 72, which chose nothing: the last checkpoint of each run is
tested. Teachers are trained with one seed.
"""
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

conclusion = """
What the test split says:

- Both ways are better than the student alone in the mean, DIST with every
  seed of both detectors: RetinaNet +0.016 ± 0.011 by DIST and +0.013 ± 0.009
  by KD, Faster R-CNN +0.014 ± 0.004 and +0.010 ± 0.009.
- DIST is ahead of KD by 0.003 ± 0.004 and 0.004 ± 0.008, which three seeds
  and 72 photographs do not decide.
- There is little more to gain. With the class logits of the teacher for their
  own boxes (imitation_ceiling.py, --split test) the students alone have 0.498
  ± 0.006 (RetinaNet) and 0.509 ± 0.006 (Faster R-CNN): DIST reaches all of it
  with one, and 0.015 of 0.023 with the other. The rest to the teachers is in
  boxes and proposals, which class logits do not carry.
"""
