"""Distillation of detectors."""
from typing import Tuple, Type

from torch import nn

from mmdist.registry import MODELS
from mmdist.utils import check_version
from .base import BaseDistiller


@MODELS.register_module()
class DistillDetector(BaseDistiller):
    """Trains a detector of MMDetection with a teacher.

    Two-stage students learn on their sampled RoIs, dense students on the
    locations of every level, and others on their queries; see
    :mod:`mmdist.models.taps`. The arguments are those of
    :class:`BaseDistiller`.
    """

    @classmethod
    def model_classes(cls) -> Tuple[Type[nn.Module], ...]:
        """``mmdet.models.BaseDetector`` and the models of videos."""
        import mmdet
        from mmdet.models.detectors import BaseDetector
        from mmdet.models.mot import BaseMOTModel
        check_version('mmdet', mmdet.__version__)
        return BaseDetector, BaseMOTModel
