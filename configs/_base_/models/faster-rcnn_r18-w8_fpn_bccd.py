# Faster R-CNN for 320x240 images, trained from scratch: ResNet-18 at an
# eighth of its width and a narrow FPN without the finest level, since the
# smallest cells are 20 pixels wide.
_base_ = 'mmdet::_base_/models/faster-rcnn_r50_fpn.py'
model = dict(
    backbone=dict(
        depth=18,
        base_channels=8,
        stem_channels=8,
        frozen_stages=-1,
        norm_eval=False,
        init_cfg=None),
    neck=dict(
        in_channels=[8, 16, 32, 64],
        out_channels=32,
        start_level=1,
        num_outs=3),
    rpn_head=dict(
        in_channels=32,
        feat_channels=32,
        anchor_generator=dict(scales=[3], strides=[8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(
            roi_layer=dict(sampling_ratio=2),
            out_channels=32,
            featmap_strides=[8, 16, 32],
            finest_scale=40),
        bbox_head=dict(in_channels=32, fc_out_channels=128, num_classes=3)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)))
