# RetinaNet for 256x256 images on two CPU cores: EfficientNet-Lite0 with
# ImageNet weights (docs/en/cards.md says how to get them), a narrow FPN of
# strides 8 to 64, two convolutions in the head. Like mmdet's ResNets, the
# first stages and all batch norms of the backbone stay as they are.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    data_preprocessor=dict(
        mean=[127.0] * 3, std=[128.0] * 3, pad_size_divisor=64),
    backbone=dict(
        _delete_=True,
        type='mmdist.EfficientNetLite',
        arch='lite0',
        out_indices=(3, 4, 5),
        frozen_stages=3,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/efficientnet-lite0.pth',
            prefix='backbone.')),
    neck=dict(
        in_channels=[40, 112, 320],
        out_channels=96,
        start_level=0,
        num_outs=4),
    bbox_head=dict(
        in_channels=96,
        stacked_convs=2,
        feat_channels=96,
        anchor_generator=dict(strides=[8, 16, 32, 64])))
