"""Distillation of classifiers."""
from typing import Tuple, Type

from torch import nn

from mmdist.registry import MODELS
from mmdist.utils import check_version
from .base import BaseDistiller


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
