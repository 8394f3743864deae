# DeepLabV3 on a ResNet-18 of three eighths of its width, from scratch. The
# dilations suit 23x30 positions: those of the zoo are for 64x128.
_base_ = 'mmseg::_base_/models/deeplabv3_r50-d8.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(180, 240)),
    pretrained=None,
    backbone=dict(
        depth=18, base_channels=24, stem_channels=24, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=192,
        channels=48,
        dilations=(1, 4, 8, 12),
        num_classes=11,
        norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=96, channels=24, num_classes=11, norm_cfg=norm_cfg))
