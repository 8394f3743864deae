_base_ = 'mmpretrain::resnet/resnet50_8xb32_in1k.py'
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    backbone=dict(_delete_=True, type='mmdist.MobileNetV1'),
    head=dict(in_channels=1024))
