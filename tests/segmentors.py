"""Small segmentors with the zoo's own heads, the counterpart of helpers.py."""
import copy
import os.path as osp

import mmseg
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from mmseg.utils import register_all_modules

from tests.helpers import merged
from tests.helpers import run_cfg as detection_run_cfg
from tests.helpers import zoo_model

register_all_modules(init_default_scope=False)

ZOO = osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs')
NUM_CLASSES = 4
CLASSES = ('ground', 'disc', 'square', 'bar')
IGNORED = 255
SIZE = 64
CROSS_ENTROPY = dict(type='CrossEntropyLoss', use_sigmoid=False)
RESNET = dict(depth=18, base_channels=8, stem_channels=8)


def resnet(decode_head=None, auxiliary_head=None):
    """Overrides that make a dilated ResNet segmentor narrow."""
    return dict(
        backbone=RESNET,
        decode_head=dict(in_channels=64, channels=16, **(decode_head or {})),
        auxiliary_head=dict(
            in_channels=32, channels=8, **(auxiliary_head or {})))


# name: (config of the zoo, overrides, weights of the pairs in order)
SEGMENTORS = dict(
    pspnet=('pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py', resnet(),
            (1, 0.4)),
    deeplabv3=('deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py',
               resnet(), (1, 0.4)),
    danet=('danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
           resnet(dict(pam_channels=8)), (1, 1, 1, 0.4)),
    encnet=('encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
            dict(
                resnet(),
                decode_head=dict(
                    in_channels=[16, 32, 64], channels=16,
                    num_codes=4)), (1, 0.4)),
    ocrnet=('ocrnet/ocrnet_r101-d8_4xb2-40k_cityscapes-512x1024.py',
            dict(
                backbone=RESNET,
                decode_head=[
                    dict(in_channels=32, channels=8),
                    dict(in_channels=64, channels=16, ocr_channels=8)
                ]), (0.4, 1)),
    ddrnet=('ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-'
            '1024x1024.py',
            dict(
                backbone=dict(channels=8, ppm_channels=8),
                decode_head=dict(in_channels=32, channels=8)), (1, 0.4)),
    pidnet=('pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
            dict(
                backbone=dict(channels=8, ppm_channels=8),
                decode_head=dict(in_channels=32, channels=8)), (0.4, 1)),
    stdc=('stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', {}, (1, 1, 1)),
    bisenetv1=('bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-'
               '1024x1024.py', {}, (1, 1, 1)),
    bisenetv2=('bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py', {},
               (1, 1, 1, 1, 1)),
    icnet=('icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py',
           dict(
               backbone=dict(
                   backbone_cfg=dict(RESNET, stem_channels=8),
                   layer_channels=(16, 64),
                   light_branch_middle_channels=8,
                   psp_out_channels=16,
                   out_channels=(8, 16, 16)),
               neck=dict(in_channels=(8, 16, 16), out_channels=8),
               decode_head=dict(in_channels=8, channels=8),
               auxiliary_head=[
                   dict(in_channels=8, channels=8),
                   dict(in_channels=8, channels=8)
               ]), (1, 0.4, 0.4)),
    knet=('knet/knet-s3_r50-d8_pspnet_8xb2-adamw-80k_ade20k-512x512.py',
          dict(
              backbone=RESNET,
              decode_head=dict(
                  num_stages=2,
                  kernel_update_head=[
                      dict(
                          type='KernelUpdateHead',
                          num_heads=2,
                          feedforward_channels=16,
                          in_channels=16,
                          out_channels=16,
                          conv_kernel_size=1,
                          ffn_act_cfg=dict(type='ReLU', inplace=True),
                          feat_transform_cfg=dict(
                              conv_cfg=dict(type='Conv2d'), act_cfg=None),
                          kernel_updator_cfg=dict(
                              type='KernelUpdator',
                              in_channels=8,
                              feat_channels=8,
                              out_channels=8))
                  ] * 2,
                  kernel_generate_head=dict(in_channels=64, channels=16)),
              auxiliary_head=dict(in_channels=32,
                                  channels=8)), (1, 1, 1, 0.4)),
    pointrend=('point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
               dict(
                   backbone=RESNET,
                   neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
                   decode_head=[
                       dict(in_channels=[16] * 4, channels=8),
                       dict(in_channels=[16], channels=16, num_fcs=1)
                   ],
                   train_cfg=dict(num_points=64)), (1, 1)),
    segformer=('segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
               dict(
                   backbone=dict(embed_dims=8),
                   decode_head=dict(in_channels=[8, 16, 40, 64],
                                    channels=16)), (1, )))


def segmentor(name, num_classes=NUM_CLASSES, **override):
    """The model dict of a small segmentor.

    Args:
        name (str): A key of ``SEGMENTORS``.
        num_classes (int): Of the heads that classify the data set's classes.
        **override: Goes on top of the model dict.
    """
    path, narrow, _ = SEGMENTORS[name]
    model = zoo_model(osp.join(ZOO, path))
    model = prepared_for_cpu(merged(model, narrow))
    model['data_preprocessor']['size'] = (SIZE, SIZE)
    for key in ('decode_head', 'auxiliary_head'):
        heads = model.get(key) or []
        for head in heads if isinstance(heads, list) else [heads]:
            for part in inner_heads(head):
                part['num_classes'] = num_classes
                drop_class_weights(part)
    return merged(model, override)


def one_column(threshold=0.3):
    """A segmentor that says with one sigmoid a pixel where the class 1 is."""
    head = dict(
        out_channels=1,
        threshold=threshold,
        loss_decode=dict(use_sigmoid=True))
    return segmentor(
        'pspnet', num_classes=2, decode_head=head, auxiliary_head=head)


def binary(data):
    """A batch whose labels are 0, 1 and ignored."""
    for each in data['data_samples']:
        labels = each.gt_sem_seg.data
        labels[(labels != IGNORED) & (labels < 2)] = 0
        labels[(labels != IGNORED) & (labels >= 2)] = 1
    return data


def inner_heads(head):
    """The heads that predict the data set's classes: K-Net's are several."""
    if head['type'] == 'IterativeDecodeHead':
        return [head['kernel_generate_head'], *head['kernel_update_head']]
    return [] if head['type'] == 'STDCHead' else [head]


def prepared_for_cpu(part):
    """Batch norms of one process, no pretrained weights, no sampler."""
    if isinstance(part, list):
        return [prepared_for_cpu(item) for item in part]
    if not isinstance(part, dict):
        return 'BN' if part == 'SyncBN' else part
    return {
        key:
        None if key in ('pretrained', 'init_cfg') else prepared_for_cpu(value)
        for key, value in part.items() if key != 'sampler'
    }


def drop_class_weights(head):
    """Cityscapes' weights are for 19 classes; OHEM would keep few pixels."""
    losses = head.get('loss_decode', [])
    for loss in losses if isinstance(losses, list) else [losses]:
        loss.pop('class_weight', None)
        if 'min_kept' in loss:
            loss['min_kept'] = 100


def build(model, seed=0):
    """Build a model with MMSegmentation alone, from a seed."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmseg'):
        return MODELS.build(Config(dict(model=copy.deepcopy(model))).model)


def save_teacher(model, folder, seed=1, **content):
    """Write the checkpoint of a randomly initialised model.

    Returns:
        dict: ``model.teacher`` of a distiller.
    """
    path = str(folder / f'segmentor_{seed}.pth')
    weights = build(model, seed).state_dict()
    torch.save(dict(state_dict=weights, **content), path)
    return dict(config=copy.deepcopy(model), checkpoint=path)


def distiller_cfg(student, teacher, **options):
    """The `model` of a config."""
    return {
        'type': 'mmdist.DistillSegmentor',
        'student': student,
        'teacher': teacher,
        'distill_loss': dict(type='mmdist.DISTLoss'),
        **options
    }


def build_distiller(student, teacher, seed=0, **options):
    """Build a distiller as a runner would."""
    return build(distiller_cfg(student, teacher, **options), seed)


def batch(size=(SIZE, SIZE), num=2, seed=0):
    """What a data loader yields: pictures and masks, a tenth ignored."""
    rng = np.random.default_rng(seed)
    return dict(
        inputs=[
            torch.from_numpy(rng.integers(0, 256, (3, *size), np.uint8))
            for _ in range(num)
        ],
        data_samples=[sample(size, rng) for _ in range(num)])


def sample(size, rng):
    """The labels of a picture, in blocks of 8 pixels."""
    blocks = rng.integers(0, NUM_CLASSES, (size[0] // 8, size[1] // 8))
    blocks[rng.random(blocks.shape) < 0.1] = IGNORED
    labels = torch.from_numpy(np.kron(blocks, np.ones((8, 8), np.int64)))
    edges = torch.zeros(1, *size, dtype=torch.long)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size)
    return SegDataSample(
        gt_sem_seg=PixelData(data=labels[None]),
        gt_edge_map=PixelData(data=edges),
        metainfo=meta)


def prepared(model, data, training=True):
    """Inputs and data samples as the model gets them."""
    data = model.data_preprocessor(copy.deepcopy(data), training)
    return data['inputs'], data['data_samples']


def write_masks(root, num=6, size=SIZE, seed=0):
    """A toy data set: pictures and masks of bright rectangles."""
    import cv2
    rng = np.random.default_rng(seed)
    for folder in ('img', 'ann'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(num):
        picture = rng.integers(0, 60, (size, size, 3), dtype=np.uint8)
        mask = np.zeros((size, size), np.uint8)
        for label in range(1, NUM_CLASSES):
            x, y, w, h = (int(v) for v in rng.integers(12, size // 2, 4))
            picture[y:y + h, x:x + w] = rng.integers(100, 256, 3)
            mask[y:y + h, x:x + w] = label
        mask[:4] = IGNORED
        cv2.imwrite(str(root / f'img/{i}.png'), picture)
        cv2.imwrite(str(root / f'ann/{i}.png'), mask)
    return root


def loader(root, training):
    """A data loader of the toy data set, always in the same order."""
    return dict(
        batch_size=2,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=training),
        dataset=dict(
            type='BaseSegDataset',
            data_root=f'{root}/',
            data_prefix=dict(img_path='img', seg_map_path='ann'),
            img_suffix='.png',
            seg_map_suffix='.png',
            metainfo=dict(
                classes=CLASSES, palette=[[40 * i] * 3 for i in range(4)]),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations'),
                dict(type='PackSegInputs')
            ]))


def run_cfg(model, root, work_dir, epochs=2, **override):
    """A config that trains and tests on the toy data set, on the CPU.

    Args:
        model (dict): The `model`.
        root (Path): Where :func:`write_masks` wrote.
        work_dir (Path): The work directory.
        epochs (int): Epochs, a checkpoint each.
        **override: Goes on top of the config.
    """
    cfg = detection_run_cfg(
        model,
        root,
        work_dir,
        epochs,
        default_scope='mmseg',
        train_dataloader=loader(root, True),
        test_dataloader=loader(root, False),
        test_evaluator=dict(type='IoUMetric', iou_metrics=['mIoU']),
        visualizer=dict(
            type='SegLocalVisualizer',
            name=str(work_dir),
            vis_backends=[dict(type='LocalVisBackend')]))
    cfg.default_hooks.visualization = dict(type='SegVisualizationHook')
    return Config({**cfg, **override})


def make_runner(*args, **kwargs):
    """A runner in this process; the arguments are those of ``run_cfg``."""
    return Runner.from_cfg(run_cfg(*args, **kwargs))


def train(*args, **kwargs):
    """Train in this process; the arguments are those of ``run_cfg``."""
    runner = make_runner(*args, **kwargs)
    runner.train()
    return runner
