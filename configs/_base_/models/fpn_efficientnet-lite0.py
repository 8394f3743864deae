# Semantic FPN on EfficientNet-Lite0 with ImageNet weights (docs/en/cards.md
# says how to get them). The first stages and all batch norms of the backbone
# stay as they are, as in mmdet's ResNets.
_base_ = 'mmseg::_base_/models/fpn_r50.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(
        mean=[127.0] * 3,
        std=[128.0] * 3,
        size=(180, 240),
        test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(
        _delete_=True,
        type='mmdist.EfficientNetLite',
        arch='lite0',
        out_indices=(2, 3, 4, 5),
        frozen_stages=3,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/efficientnet-lite0.pth',
            prefix='backbone.')),
    neck=dict(in_channels=[24, 40, 112, 320], out_channels=48),
    decode_head=dict(
        in_channels=[48] * 4,
        channels=48,
        num_classes=11,
        norm_cfg=norm_cfg,
        # as in MMSegmentation's configs of U-Net: poles, signs, fences and
        # people are 4 % of the pixels
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce'),
            dict(
                type='DiceLoss',
                loss_name='loss_dice',
                use_sigmoid=False,
                loss_weight=3.0)
        ]))
