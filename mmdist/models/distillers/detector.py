"""Distillation of detectors."""
from typing import Type

from torch import nn

from mmdist.registry import MODELS
from mmdist.utils import check_version
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
        import mmdet
        from mmdet.models.detectors import BaseDetector
        check_version('mmdet', mmdet.__version__)
        return BaseDetector
