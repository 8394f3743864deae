_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::segformer/'
        'segformer_mit-b3_8xb2-160k_ade20k-512x512.py',
        checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/'
        'segformer/segformer_mit-b3_512x512_160k_ade20k/'
        'segformer_mit-b3_512x512_160k_ade20k_20210726_081410-962b98d2.pth'  # noqa: E501
    ),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
