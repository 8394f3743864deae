_base_ = './fpn_lite0_20e_camvid-180x240.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='configs/camvid/fpn_lite2_40e_camvid-180x240.py',
        checkpoint='work_dirs/camvid/fpn_lite2_40e_camvid-180x240/'
        'epoch_40.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
