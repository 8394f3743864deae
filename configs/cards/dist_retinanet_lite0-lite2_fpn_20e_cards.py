_base_ = './retinanet_lite0_fpn_20e_cards.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillDetector',
    student={{_base_.model}},
    teacher=dict(
        config='configs/cards/retinanet_lite2_fpn_40e_cards.py',
        checkpoint='work_dirs/cards/retinanet_lite2_fpn_40e_cards/'
        'epoch_40.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
