"""Backbones of the paper that MMPretrain lacks.

They need MMPretrain, so ``import mmdist`` leaves them out; a config imports
them by ``custom_imports``, as ``'mmdist.models.backbones'``.
"""
from .cifar import NarrowResNet, WideResNet

__all__ = ['NarrowResNet', 'WideResNet']
