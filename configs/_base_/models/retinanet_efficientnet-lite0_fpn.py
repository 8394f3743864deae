# RetinaNet for small images on a CPU: EfficientNet-Lite0 with ImageNet weights
# (docs/en/cards.md says how to get them), a narrow FPN of strides 16 and 32,
# one convolution in the head. The first stages and all batch norms of the
# backbone stay as they are, as in mmdet's ResNets.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    data_preprocessor=dict(
        mean=[127.0] * 3, std=[128.0] * 3, pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type='mmdist.EfficientNetLite',
        arch='lite0',
        out_indices=(4, 5),
        frozen_stages=3,
        norm_eval=True,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/efficientnet-lite0.pth',
            prefix='backbone.')),
    neck=dict(
        in_channels=[112, 320], out_channels=96, start_level=0, num_outs=2),
    bbox_head=dict(
        in_channels=96,
        stacked_convs=1,
        feat_channels=96,
        anchor_generator=dict(octave_base_scale=3, strides=[16, 32])))
