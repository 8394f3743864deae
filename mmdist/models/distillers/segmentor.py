"""Distillation of segmentors."""
from typing import Tuple, Type

from torch import nn

from mmdist.registry import MODELS
from mmdist.utils import check_version
from .base import BaseDistiller


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
