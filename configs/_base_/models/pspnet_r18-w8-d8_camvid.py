# PSPNet on a ResNet-18 of an eighth of its width, trained from scratch.
_base_ = 'mmseg::_base_/models/pspnet_r50-d8.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(180, 240)),
    pretrained=None,
    backbone=dict(
        depth=18, base_channels=8, stem_channels=8, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=64, channels=16, num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=32, channels=8, num_classes=11, norm_cfg=norm_cfg))
