"""Backbones that OpenMMLab lacks.

They need MMDetection or MMPretrain, so ``import mmdist`` leaves them out; a
config imports them by ``custom_imports``, as ``'mmdist.models.backbones'``.
"""
from importlib.util import find_spec

from .efficientnet_lite import EfficientNetLite

__all__ = ['EfficientNetLite']

if find_spec('mmpretrain'):
    from .cifar import NarrowResNet, WideResNet
    __all__ += ['NarrowResNet', 'WideResNet']
