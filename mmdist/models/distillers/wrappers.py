"""The wrappers for the models of each library."""
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


@MODELS.register_module()
class DistillSegmentor(BaseDistiller):
    """Trains a segmentor of MMSegmentation with a teacher.

    The student learns on all pixels of the logits of its decode and auxiliary
    heads; see :class:`mmdist.models.taps.PixelTap`. The arguments are those of
    :class:`BaseDistiller`; ``tap=dict(ignore_label_pixels=True)`` leaves out
    the pixels that have no label.
    """

    @classmethod
    def model_classes(cls) -> Tuple[Type[nn.Module], ...]:
        """``mmseg.models.BaseSegmentor``."""
        import mmseg
        from mmseg.models.segmentors import BaseSegmentor
        check_version('mmseg', mmseg.__version__)
        return (BaseSegmentor, )


@MODELS.register_module()
class DistillClassifier(BaseDistiller):
    """Trains a classifier of MMPretrain with a teacher.

    The student learns on the images of the batch; see
    :class:`mmdist.models.taps.ImageTap`. The paper takes ``beta=2, gamma=2``
    here, ``tau=4`` on CIFAR-100 and ``tau=1`` on ImageNet. The arguments are
    those of :class:`BaseDistiller`.
    """

    @classmethod
    def model_classes(cls) -> Tuple[Type[nn.Module], ...]:
        """``mmpretrain.models.BaseClassifier``."""
        import mmpretrain
        from mmpretrain.models.classifiers import BaseClassifier
        check_version('mmpretrain', mmpretrain.__version__)
        return (BaseClassifier, )
