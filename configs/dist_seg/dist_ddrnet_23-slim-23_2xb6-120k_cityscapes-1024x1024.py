_base_ = ('mmseg::ddrnet/'
          'ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024.py')
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::ddrnet/'
        'ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024.py',
        checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/'
        'ddrnet/ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024/'
        'ddrnet_23_in1k-pre_2xb6-120k_cityscapes-1024x1024_20230425_162633-81601db0.pth'  # noqa: E501
    ),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
