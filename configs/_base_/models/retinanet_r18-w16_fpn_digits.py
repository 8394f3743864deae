# RetinaNet for 160x160 images, trained from scratch: ResNet-18 at a quarter
# of its width, the levels of the demo's Faster R-CNN and a short head.
_base_ = 'mmdet::_base_/models/retinanet_r50_fpn.py'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=16,
        stem_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None),
    neck=dict(
        in_channels=[16, 32, 64, 128],
        out_channels=32,
        start_level=0,
        add_extra_convs=False,
        num_outs=4),
    bbox_head=dict(
        num_classes=10,
        in_channels=32,
        feat_channels=32,
        stacked_convs=2,
        anchor_generator=dict(
            octave_base_scale=4, scales_per_octave=1, strides=[4, 8, 16, 32])))
