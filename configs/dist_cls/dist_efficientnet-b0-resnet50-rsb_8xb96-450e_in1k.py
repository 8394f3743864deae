_base_ = 'efficientnet-b0_8xb96-450e_in1k.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillClassifier',
    student={{_base_.model}},
    teacher=dict(
        config='mmpretrain::resnet/resnet50_8xb256-rsb-a1-600e_in1k.py',
        checkpoint='https://download.openmmlab.com/mmclassification/v0/resnet/'
        'resnet50_8xb256-rsb-a1-600e_in1k_20211228-20e21305.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=2.0, gamma=2.0, tau=1.0),
    alpha=1.0)
