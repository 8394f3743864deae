"""Distillation of detectors."""
from typing import Type

from torch import nn

from mmdist.registry import MODELS
from .base import BaseDistiller


@MODELS.register_module()
class DistillDetector(BaseDistiller):
    """Trains a detector of MMDetection with a teacher.

    Two-stage students learn on their sampled RoIs, dense students on the
    locations of every level; see :mod:`mmdist.models.taps`. The arguments are
    those of :class:`BaseDistiller`.
    """

    @property
    def model_class(self) -> Type[nn.Module]:
        """``mmdet.models.BaseDetector``."""
        from mmdet.models.detectors import BaseDetector
        return BaseDetector
