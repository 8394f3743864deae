title = 'Playing cards, detection from ImageNet weights'
metric = dict(key='coco/bbox_mAP', title='mAP', format='.3f')
seeds = [0]

# First the plateau of the student alone, on validation images.
runs = {
    'teacher, 40 epochs':
    dict(config='configs/cards/retinanet_lite2_fpn_40e_cards.py'),
    'student alone, 20 epochs':
    dict(
        config='configs/cards/retinanet_lite0_fpn_40e_cards.py',
        options={'train_cfg.max_epochs': 20}),
    'student alone, 40 epochs':
    dict(config='configs/cards/retinanet_lite0_fpn_40e_cards.py'),
    'student alone, 80 epochs':
    dict(
        config='configs/cards/retinanet_lite0_fpn_40e_cards.py',
        options={'train_cfg.max_epochs': 80}),
}
