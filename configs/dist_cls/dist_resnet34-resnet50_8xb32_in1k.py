_base_ = 'mmpretrain::resnet/resnet34_8xb32_in1k.py'
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb32_in1k.py',
        checkpoint='https://download.openmmlab.com/mmclassification/v0/resnet/'
        'resnet50_8xb32_in1k_20210831-ea4938fc.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=2.0, gamma=2.0, tau=1.0),
    alpha=1.0)
