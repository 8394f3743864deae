_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
custom_imports = dict(imports=['mmdist'])
custom_hooks = [dict(type='mmdist.SeedHook')]
default_hooks = dict(
    checkpoint=dict(backend_args=dict(backend='mmdist.whole')))
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='mmpretrain::swin_transformer/swin-large_16xb64_in1k.py',
        checkpoint='https://download.openmmlab.com/mmclassification/v0/'
        'swin-transformer/convert/'
        'swin_large_patch4_window7_224_22kto1k-5f0996db.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=2.0, gamma=2.0, tau=1.0),
    alpha=1.0)
