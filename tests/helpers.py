"""Small detectors with the zoo's own heads, and what tests do with them.

Everything here is plain MMDetection: the tests compare mmdist with it.
"""
import copy
import functools
import json
import os.path as osp

import mmdet
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import (DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS,
                               OPTIMIZERS, PARAM_SCHEDULERS, TASK_UTILS,
                               TRANSFORMS, VISBACKENDS, VISUALIZERS,
                               DefaultScope)
from mmengine.runner import Runner
from mmengine.structures import InstanceData

register_all_modules(init_default_scope=False)

ZOO = osp.join(osp.dirname(mmdet.__file__), '.mim', 'configs')
NUM_CLASSES = 3
CLASSES = ('disc', 'square', 'bar')
RESNET = dict(
    backbone=dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16))
CSP = dict(
    backbone=dict(deepen_factor=0.167, widen_factor=0.125, init_cfg=None),
    neck=dict(in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1))
TWO_STAGE_LIMITS = dict(
    rpn_proposal=dict(nms_pre=100, max_per_img=50),
    rpn=dict(sampler=dict(num=32)))


def two_stage(bbox_head, rcnn, mask_head=None):
    """Overrides that make a two-stage detector narrow."""
    roi_head = dict(
        bbox_roi_extractor=dict(out_channels=16), bbox_head=bbox_head)
    if mask_head:
        roi_head.update(
            mask_roi_extractor=dict(out_channels=16), mask_head=mask_head)
    return dict(
        RESNET,
        rpn_head=dict(in_channels=16, feat_channels=16),
        roi_head=roi_head,
        train_cfg=dict(TWO_STAGE_LIMITS, rcnn=rcnn),
        test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50)))


def dense(**head):
    """Overrides that make a dense detector narrow."""
    return dict(
        RESNET,
        bbox_head=dict(
            num_classes=NUM_CLASSES, in_channels=16, feat_channels=16, **head))


BOX_HEAD = dict(num_classes=NUM_CLASSES, in_channels=16, fc_out_channels=32)
MASK_HEAD = dict(
    num_classes=NUM_CLASSES, in_channels=16, conv_out_channels=8, num_convs=1)
GN = dict(type='GN', num_groups=4)
RCNN = dict(sampler=dict(num=24))
# name: (config of the zoo, overrides)
DETECTORS = dict(
    faster=('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
            two_stage(BOX_HEAD, RCNN)),
    mask=('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
          two_stage(BOX_HEAD, RCNN, MASK_HEAD)),
    cascade=('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
             two_stage([BOX_HEAD] * 3, [RCNN] * 3)),
    retina=('retinanet/retinanet_r50_fpn_1x_coco.py', dense(stacked_convs=1)),
    fcos=('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
          dense(stacked_convs=1, norm_cfg=GN)),
    atss=('atss/atss_r50_fpn_1x_coco.py', dense(stacked_convs=1, norm_cfg=GN)),
    gfl=('gfl/gfl_r50_fpn_1x_coco.py', dense(stacked_convs=1, norm_cfg=GN)),
    rtmdet=('rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
            dict(CSP, bbox_head=dense(stacked_convs=1)['bbox_head'])),
    yolox=(
        'yolox/yolox_tiny_8xb8-300e_coco.py',
        dict(
            CSP,
            bbox_head=dense(stacked_convs=1)['bbox_head'],
            # Raw pictures saturate the sigmoids of random weights.
            data_preprocessor=dict(
                batch_augments=None, mean=[128.] * 3, std=[64.] * 3))))
# Heads that need care; they are no part of the tables of all detectors.
UNUSUAL = dict(
    tood=('tood/tood_r50_fpn_1x_coco.py', dense(stacked_convs=1, norm_cfg=GN)),
    pisa=('pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py',
          two_stage(BOX_HEAD, RCNN)),
    free_anchor=('free_anchor/freeanchor_r50_fpn_1x_coco.py',
                 dense(stacked_convs=1)))


def transformer(channels, out_indices, **override):
    """Overrides of a narrow backbone for a detector with queries."""
    return dict(
        backbone=dict(RESNET['backbone'], out_indices=out_indices),
        neck=dict(in_channels=channels),
        **override)


MASK_QUERIES = dict(
    backbone=RESNET['backbone'],
    data_preprocessor=dict(batch_augments=None),
    panoptic_head=dict(
        in_channels=[8, 16, 32, 64],
        num_things_classes=NUM_CLASSES,
        num_stuff_classes=0,
        loss_cls=dict(class_weight=[1.] * NUM_CLASSES + [0.1])),
    panoptic_fusion_head=dict(
        num_things_classes=NUM_CLASSES, num_stuff_classes=0))
QUERY_HEAD = dict(num_classes=NUM_CLASSES)
QUERY_HEAD_32 = dict(QUERY_HEAD, embed_dims=32)
# name: (config of the zoo, overrides); the rest is narrowed by `few_queries`
QUERIES = dict(
    detr=('detr/detr_r50_8xb2-150e_coco.py',
          transformer([64], (3, ), bbox_head=QUERY_HEAD)),
    deformable=('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
                transformer([16, 32, 64], (1, 2, 3), bbox_head=QUERY_HEAD_32)),
    dino=('dino/dino-4scale_r50_8xb2-12e_coco.py',
          transformer([16, 32, 64], (1, 2, 3), bbox_head=QUERY_HEAD)),
    sparse_rcnn=(
        'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
        dict(
            backbone=RESNET['backbone'],
            neck=dict(in_channels=[8, 16, 32, 64]),
            roi_head=dict(
                num_stages=2,
                stage_loss_weights=[1, 1],
                bbox_head=[
                    dict(QUERY_HEAD, dynamic_conv_cfg=dict(feat_channels=8))
                ] * 2),
            train_cfg=dict(rcnn=[{}] * 2))),
    maskformer=('maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
                MASK_QUERIES),
    mask2former=('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
                 dict(MASK_QUERIES, train_cfg=dict(num_points=64))))
NUM_QUERIES = 8
# Sizes of transformers, by their keys.
FEW = dict(
    feedforward_channels=32,
    num_layers=2,
    num_queries=NUM_QUERIES,
    num_proposals=NUM_QUERIES)
NARROW = dict(
    FEW,
    embed_dims=32,
    feat_channels=32,
    out_channels=32,
    proposal_feature_channel=32,
    num_feats=16)


def few_queries(part, sizes):
    """A model dict of few queries, two layers and few channels."""
    if isinstance(part, (list, tuple)):
        return [few_queries(item, sizes) for item in part]
    if not isinstance(part, dict):
        return part
    small = {
        key:
        sizes[key] if key in sizes and isinstance(value, int) else few_queries(
            value, sizes)
        for key, value in part.items()
    }
    if part.get('in_channels') == 256:
        small['in_channels'] = sizes.get('out_channels', 256)
    return small


TWO_STAGE = ('faster', 'mask', 'cascade')
DENSE = ('retina', 'fcos', 'atss', 'gfl', 'rtmdet', 'yolox')


def merged(base, override):
    """``override`` on top of ``base``; lists are merged item by item."""
    if isinstance(base, dict) and isinstance(override, dict):
        new = {k: merged(base.get(k), v) for k, v in override.items()}
        return {**copy.deepcopy(dict(base)), **new}
    if isinstance(base, list) and isinstance(override, list) and any(
            isinstance(item, dict) for item in base):
        return [merged(b, o) for b, o in zip(base, override)]
    return copy.deepcopy(override)


@functools.lru_cache(None)
def zoo_model(path):
    """The model dict of a config, which is not to be changed."""
    return Config.fromfile(path).model.to_dict()


def detector(name, **override):
    """The model dict of a narrow detector.

    Args:
        name (str): A key of ``DETECTORS``, ``UNUSUAL`` or ``QUERIES``.
        **override: Goes on top of the model dict.
    """
    path, narrow = {**DETECTORS, **UNUSUAL, **QUERIES}[name]
    model = zoo_model(osp.join(ZOO, path))
    if name in QUERIES:
        # DINO encodes coordinates in 256 channels whatever the width.
        model = few_queries(model, FEW if name == 'dino' else NARROW)
    return merged(merged(model, narrow), override)


def ssd(**head):
    """A softmax dense head with as many anchors a level as SSD's."""
    model = detector('retina')
    zoo = Config.fromfile(osp.join(ZOO, 'ssd/ssd300_coco.py')).model.to_dict()
    model['neck'].update(start_level=1, num_outs=3, add_extra_convs=False)
    model['train_cfg'] = zoo['train_cfg']
    model['bbox_head'] = merged(
        zoo['bbox_head'],
        dict(
            in_channels=[16] * 3,
            num_classes=NUM_CLASSES,
            anchor_generator=dict(
                strides=[8, 16, 32],
                ratios=([2], [2, 3], [2, 3]),
                min_sizes=[16, 32, 64],
                max_sizes=[32, 64, 128])))
    for key in ('basesize_ratio_range', 'input_size'):
        del model['bbox_head']['anchor_generator'][key]
    model['bbox_head'] = merged(model['bbox_head'], head)
    return model


def build(model, seed=0):
    """Build a model with MMDetection alone, from a seed."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmdet'):
        built = MODELS.build(Config(dict(model=copy.deepcopy(model))).model)
    # Deformable DETR leaves what was in memory there until init_weights.
    if isinstance(getattr(built, 'level_embed', None), torch.nn.Parameter):
        torch.nn.init.normal_(built.level_embed)
    return built


def save_teacher(model, folder, seed=1, **content):
    """Write the checkpoint of a randomly initialised model.

    The weights are those of construction: with ``init_weights`` a head
    predicts nearly the same everywhere and comparisons mean little.

    Returns:
        dict: ``model.teacher`` of a distiller.
    """
    weights = build(model, seed).state_dict()
    path = str(folder / f'teacher_{seed}.pth')
    torch.save(dict(state_dict=weights, **content), path)
    return dict(config=copy.deepcopy(model), checkpoint=path)


def distiller_cfg(student, teacher, **options):
    """The `model` of a config."""
    return {
        'type': 'mmdist.DistillDetector',
        'student': student,
        'teacher': teacher,
        'distill_loss': dict(type='mmdist.DISTLoss'),
        **options
    }


def build_distiller(student, teacher, seed=0, **options):
    """Build a distiller as a runner would."""
    return build(distiller_cfg(student, teacher, **options), seed)


def batch(name='', sizes=((128, 128), (96, 128)), seed=0):
    """What a data loader yields: pictures and annotations.

    Args:
        name (str): The detector; some refuse masks, Mask R-CNN needs them.
        sizes (Sequence[tuple[int, int]]): Height and width of each picture.
        seed (int): Of the pictures and boxes.
    """
    rng = np.random.default_rng(seed)
    return dict(
        inputs=[
            torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8))
            for size in sizes
        ],
        data_samples=[sample(size, rng, 'mask' in name) for size in sizes])


def sample(size, rng, with_masks, num_boxes=3):
    """Annotations of a picture: boxes, labels and masks."""
    height, width = size
    corners = rng.uniform(0, 0.6, (num_boxes, 2))
    extent = rng.uniform(0.15, 0.4, (num_boxes, 2))
    boxes = np.concatenate([corners, corners + extent], 1)
    boxes *= np.tile([width, height], 2)
    instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        labels=torch.from_numpy(rng.integers(0, NUM_CLASSES, num_boxes)))
    if with_masks:
        instances.masks = BitmapMasks(
            filled(boxes, height, width), height, width)
    meta = dict(
        img_shape=size, ori_shape=size, scale_factor=(1., 1.), img_id=0)
    return DetDataSample(gt_instances=instances, metainfo=meta)


def filled(boxes, height, width):
    """A mask a box, (N, H, W)."""
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int)):
        mask[y1:y2, x1:x2] = 1
    return masks


def prepared(model, data, training=True):
    """Inputs and data samples as the model gets them."""
    data = model.data_preprocessor(copy.deepcopy(data), training)
    return data['inputs'], data['data_samples']


def total(losses):
    """The sum that is trained: every loss, levels summed."""
    values = [v for k, v in losses.items() if 'loss' in k]
    return sum(sum(v) if isinstance(v, list) else v for v in values)


def flat(losses):
    """Losses by name, a list of levels spread into names."""
    spread = {}
    for name, value in losses.items():
        levels = value if isinstance(value, list) else [value]
        spread.update({f'{name}.{i}': v for i, v in enumerate(levels)})
    return spread


def gradients(model):
    """Gradients by name; None where there is none."""
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_same(ours, plain):
    """Two dicts of tensors (or None) are equal bit for bit."""
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        if value is None:
            assert ours[name] is None, name
        else:
            assert torch.equal(ours[name], value), name


def pearson_dist(student, teacher, eps=1e-8):
    """DIST of two probability tables (R, C), spelt out: (inter, intra)."""

    def distance(a, b):
        a, b = a - a.mean(), b - b.mean()
        return 1 - (a * b).sum() / (a.norm() * b.norm() + eps)

    student, teacher = student.double(), teacher.double()
    inter = torch.stack([distance(s, t) for s, t in zip(student, teacher)])
    intra = torch.stack([distance(s, t) for s, t in zip(student.T, teacher.T)])
    return inter.mean(), intra.mean()


def write_coco(root, num=6, size=64, seed=0, classes=CLASSES):
    """A toy COCO data set: bright rectangles on a dark ground."""
    import cv2
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    coco = dict(
        images=[],
        annotations=[],
        categories=[
            dict(id=i + 1, name=name) for i, name in enumerate(classes)
        ])
    for image_id in range(1, num + 1):
        picture = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        for label in range(2):
            x, y, w, h = (int(v) for v in rng.integers(12, size // 2, 4))
            w, h = min(w, size - x), min(h, size - y)
            picture[y:y + h, x:x + w] = rng.integers(100, 256, 3)
            coco['annotations'].append(
                dict(
                    id=len(coco['annotations']) + 1,
                    image_id=image_id,
                    category_id=label + 1,
                    bbox=[x, y, w, h],
                    area=w * h,
                    iscrowd=0))
        cv2.imwrite(str(root / f'{image_id}.png'), picture)
        coco['images'].append(
            dict(
                id=image_id,
                file_name=f'{image_id}.png',
                width=size,
                height=size))
    (root / 'coco.json').write_text(json.dumps(coco))
    return root


PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(64, 64), keep_ratio=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                   'scale_factor'))
]


def loader(root, training, **dataset):
    """A data loader of the toy data set, always in the same order."""
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=training),
        dataset=dict(
            type='CocoDataset',
            data_root=f'{root}/',
            ann_file='coco.json',
            data_prefix=dict(img=''),
            metainfo=dict(classes=CLASSES),
            test_mode=not training,
            pipeline=copy.deepcopy(PIPELINE),
            **dataset))


def run_cfg(model, root, work_dir, epochs=2, **override):
    """A config that trains and tests on the toy data set, on the CPU.

    Args:
        model (dict): The `model`.
        root (Path): Where :func:`write_coco` wrote.
        work_dir (Path): The work directory.
        epochs (int): Epochs, a checkpoint each.
        **override: Goes on top of the config.
    """
    evaluator = dict(
        type='CocoMetric', ann_file=f'{root}/coco.json', metric='bbox')
    cfg = dict(
        default_scope='mmdet',
        custom_imports=dict(imports=['mmdist']),
        # MMEngine keeps what a run logs by the experiment's name.
        experiment_name=str(work_dir).replace('/', '_'),
        model=model,
        work_dir=str(work_dir),
        train_dataloader=loader(root, True),
        test_dataloader=loader(root, False),
        test_evaluator=evaluator,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        test_cfg=dict(),
        optim_wrapper=dict(
            optimizer=dict(type='SGD', lr=0.01, momentum=0.9),
            clip_grad=dict(max_norm=5)),
        param_scheduler=dict(type='MultiStepLR', milestones=[1], gamma=0.5),
        default_hooks=dict(
            logger=dict(type='LoggerHook', interval=1),
            checkpoint=dict(type='CheckpointHook', interval=1),
            visualization=dict(type='DetVisualizationHook')),
        env_cfg=dict(
            mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
            dist_cfg=dict(backend='gloo')),
        visualizer=dict(
            type='DetLocalVisualizer',
            name=str(work_dir),
            vis_backends=[dict(type='LocalVisBackend')]),
        randomness=dict(seed=0, deterministic=False),
        auto_scale_lr=dict(enable=False, base_batch_size=16))
    return Config({**cfg, **override})


class _Name(str):
    """The name of a class, which a config writes without quotes."""
    __repr__ = str.__str__


def write_new_style(cfg, path):
    """Write a config whose types are imported classes, and no scope.

    Args:
        cfg (Config): Of MMDetection or MMSegmentation.
        path (Path): The file.
    """
    registries = (MODELS, TASK_UTILS, TRANSFORMS, DATASETS, DATA_SAMPLERS,
                  METRICS, HOOKS, VISUALIZERS, VISBACKENDS, OPTIMIZERS,
                  PARAM_SCHEDULERS)
    scope, imports = cfg.default_scope, set()

    def classes_in(part):
        if isinstance(part, (list, tuple)):
            return type(part)(classes_in(item) for item in part)
        if not isinstance(part, dict):
            return part
        part = {key: classes_in(value) for key, value in part.items()}
        for registry in registries if 'type' in part else ():
            with registry.switch_scope_and_registry(scope) as found:
                kind = found.get(part['type'])
            if kind:
                imports.add(f'from {kind.__module__} import {kind.__name__}')
                part['type'] = _Name(kind.__name__)
                break
        return part

    fields = classes_in({**cfg.to_dict(), 'default_scope': None})
    path.write_text('\n'.join([
        *sorted(imports),
        *(f'{key} = {value!r}' for key, value in fields.items()), ''
    ]))


def make_runner(*args, **kwargs):
    """A runner in this process; the arguments are those of ``run_cfg``."""
    return Runner.from_cfg(run_cfg(*args, **kwargs))


def train(*args, **kwargs):
    """Train in this process; the arguments are those of ``run_cfg``."""
    runner = make_runner(*args, **kwargs)
    runner.train()
    return runner


def checkpoint(runner_or_dir, epoch):
    """The checkpoint that a run wrote after an epoch."""
    folder = getattr(runner_or_dir, 'work_dir', runner_or_dir)
    return torch.load(
        osp.join(str(folder), f'epoch_{epoch}.pth'), weights_only=False)


def tensors_of(state, prefix=''):
    """Every tensor of a nested optimizer state, by path."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(
        state if isinstance(state, (list, tuple)) else ())
    found = {}
    for key, value in items:
        found.update(tensors_of(value, f'{prefix}.{key}'))
    return found
