# Semantic FPN for small images, trained from scratch: ResNet-18 at a fifth
# of its width.
_base_ = 'mmseg::_base_/models/fpn_r50.py'
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(96, 96), test_cfg=dict(size_divisor=32)),
    pretrained=None,
    backbone=dict(
        depth=18, base_channels=12, stem_channels=12, norm_cfg=norm_cfg),
    neck=dict(in_channels=[12, 24, 48, 96], out_channels=24),
    decode_head=dict(
        in_channels=[24] * 4,
        channels=24,
        num_classes=11,
        norm_cfg=norm_cfg,
        # Unweighted, the background (85 % of the pixels) holds the students
        # back for half of the training.
        loss_decode=dict(class_weight=[0.3] + [1.] * 10)))
