"""Narrow classifiers of MMPretrain, and batches of noise for them."""
import copy

import pytest
import torch

pytest.importorskip(
    'mmpretrain',
    reason='MMPretrain is not installed: make test MMDIST_STACK=cls')
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmpretrain.structures import DataSample  # noqa: E402

import mmdist  # noqa: E402, F401
import mmdist.models.backbones  # noqa: E402, F401

NUM_CLASSES = 10
PREPROCESSOR = dict(
    type='ClsDataPreprocessor',
    num_classes=NUM_CLASSES,
    mean=[100., 110., 120.],
    std=[50., 60., 70.],
    to_rgb=True)


def classifier(backbone, head, neck=True, **more):
    """A model dict."""
    return dict(
        type='ImageClassifier',
        backbone=backbone,
        neck=dict(type='GlobalAveragePooling') if neck else None,
        head=head,
        data_preprocessor=PREPROCESSOR,
        **more)


def linear(in_channels, num_classes=NUM_CLASSES, **more):
    """A usual head."""
    return dict(
        type='LinearClsHead',
        num_classes=num_classes,
        in_channels=in_channels,
        **more)


def resnet(depth=8, channels=4, **head):
    """A ResNet of three stages."""
    return classifier(
        dict(
            type='mmdist.NarrowResNet',
            depth=depth,
            stem_channels=channels,
            base_channels=channels), linear(4 * channels, **head))


def multi_label():
    """Several labels a picture."""
    model = resnet()
    model['head'] = dict(
        type='MultiLabelLinearClsHead',
        num_classes=NUM_CLASSES,
        in_channels=16,
        loss=dict(type='CrossEntropyLoss', use_sigmoid=True))
    return model


def models():
    """One of each kind of head, by name."""
    return dict(
        linear=resnet(),
        smooth=resnet(loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1)),
        wide=classifier(
            dict(type='mmdist.WideResNet', depth=10, width=1), linear(64)),
        lenet=lenet(),
        vit=classifier(
            dict(
                type='VisionTransformer',
                arch=dict(
                    embed_dims=16,
                    num_layers=2,
                    num_heads=2,
                    feedforward_channels=32),
                img_size=32,
                patch_size=8),
            dict(
                type='VisionTransformerClsHead',
                num_classes=NUM_CLASSES,
                in_channels=16,
                init_cfg=dict(type='Normal', layer='Linear', std=1.)),
            neck=False),
        conformer=conformer(),
        multi_label=multi_label())


def of_timm():
    """A classifier of timm: it is its own head, and its checkpoints have
    other keys than its parameters."""
    return dict(
        type='TimmClassifier',
        model_name='test_resnet',
        num_classes=NUM_CLASSES,
        loss=dict(type='CrossEntropyLoss'),
        data_preprocessor=PREPROCESSOR)


def lenet():
    """A backbone with the last layer in it, for grey pictures."""
    model = classifier(
        dict(type='LeNet5', num_classes=NUM_CLASSES),
        dict(type='ClsHead'),
        neck=False)
    model['data_preprocessor'] = dict(
        type='ClsDataPreprocessor', num_classes=NUM_CLASSES)
    return model


def conformer():
    """A head with two outputs, which predicts with their sum."""
    return classifier(
        dict(
            type='Conformer',
            arch=dict(embed_dims=32, channel_ratio=1, num_heads=2, depths=12)),
        dict(
            type='ConformerHead',
            num_classes=NUM_CLASSES,
            in_channels=[256, 32]),
        neck=False)


def build(model, seed=0):
    """Build a model with MMPretrain alone, from a seed."""
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        built = MODELS.build(copy.deepcopy(model))
        built.init_weights()
    return built


def save_teacher(model, folder, seed=1):
    """A teacher's config and checkpoint."""
    path = str(folder / f'teacher_{seed}.pth')
    torch.save(build(model, seed).state_dict(), path)
    return dict(config=model, checkpoint=path)


def build_distiller(student, teacher, seed=0, **options):
    """A wrapper whose student is that of :func:`build`."""
    options.setdefault('distill_loss', dict(type='mmdist.DISTLoss'))
    return build(
        dict(
            type='mmdist.DistillClassifier',
            student=student,
            teacher=teacher,
            **options), seed)


def batch(model, num=6, seed=0, training=True, size=32):
    """Pictures of noise with one label each, or two."""
    rng = torch.Generator().manual_seed(seed)
    backbone = getattr(model, 'backbone', None)
    channels = 1 if 'LeNet' in type(backbone).__name__ else 3
    pictures = torch.randint(
        0, 256, (num, channels, size, size), generator=rng)
    two = 'MultiLabel' in type(getattr(model, 'head', None)).__name__
    samples = [
        DataSample().set_gt_label([i % NUM_CLASSES, 3] if two else i %
                                  NUM_CLASSES) for i in range(num)
    ]
    data = dict(inputs=list(pictures.float()), data_samples=samples)
    data = model.data_preprocessor(data, training)
    return data['inputs'], data['data_samples']


@torch.no_grad()
def outputs_of(model, inputs):
    """What the plain model's forward returns, in a list."""
    outputs = model(inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
