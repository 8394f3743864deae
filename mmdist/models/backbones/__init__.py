"""Backbones that OpenMMLab lacks.

They need MMDetection or MMPretrain, so ``import mmdist`` leaves them out; the
registry imports them when it builds its first model.
"""
from importlib.util import find_spec

__all__ = []

if find_spec('mmdet') or find_spec('mmpretrain'):
    from .efficientnet_lite import EfficientNetLite
    __all__ += ['EfficientNetLite']

if find_spec('mmpretrain'):
    from .cifar import (CIFARShuffleNetV1, CIFARShuffleNetV2, HalfMobileNetV2,
                        NarrowResNet, WideResNet)
    from .mobilenet_v1 import MobileNetV1
    __all__ += [
        'CIFARShuffleNetV1', 'CIFARShuffleNetV2', 'HalfMobileNetV2',
        'MobileNetV1', 'NarrowResNet', 'WideResNet'
    ]
