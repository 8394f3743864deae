_base_ = 'mmdet::retinanet/retinanet_r50_fpn_2x_coco.py'
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py',
        checkpoint='https://download.openmmlab.com/mmdetection/v2.0/retinanet/'
        'retinanet_x101_64x4d_fpn_1x_coco/'
        'retinanet_x101_64x4d_fpn_1x_coco_20200130-366f5af1.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
