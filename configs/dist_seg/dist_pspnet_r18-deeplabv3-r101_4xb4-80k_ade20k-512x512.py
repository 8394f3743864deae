_base_ = 'pspnet_r18-d8_4xb4-80k_ade20k-512x512.py'
custom_imports = dict(imports=['mmdist'])
model = dict(
    _delete_=True,
    type='mmdist.DistillSegmentor',
    student={{_base_.model}},
    teacher=dict(
        config='mmseg::deeplabv3/'
        'deeplabv3_r101-d8_4xb4-160k_ade20k-512x512.py',
        checkpoint='https://download.openmmlab.com/mmsegmentation/v0.5/'
        'deeplabv3/deeplabv3_r101-d8_512x512_160k_ade20k/'
        'deeplabv3_r101-d8_512x512_160k_ade20k_20200615_105816-b1f72b3b.pth'  # noqa: E501
    ),
    distill_loss=dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0),
    alpha=1.0)
