_base_ = './pspnet_r18-w8-d8_1xb8-1k_camvid-180x240.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='configs/camvid/deeplabv3_r18-w24-d8_1xb8-1k_camvid-180x240.py',
        checkpoint='work_dirs/camvid/'
        'deeplabv3_r18-w24-d8_1xb8-1k_camvid-180x240/iter_1000.pth'),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
