from typing import Any

from torch import nn

from .base import LogitPair, LogitTap, watch_method
from .dense import DenseTap
from .pixel import PixelTap
from .roi import RoITap

# The later a head decides in a detector, the earlier its tap stands here: a
# two-stage model is read off its RoI head.
TAPS = (RoITap, DenseTap, PixelTap)


def build_tap(student: nn.Module, **options: Any) -> LogitTap:
    """Choose the tap that reads the student's class logits.

    Args:
        student (nn.Module): A detector or segmentor.
        **options: Options of the tap, e.g. ``anchors_as_rows=True``.

    Returns:
        LogitTap: The tap for the head that decides last.

    Raises:
        ValueError: If no head has class logits, or an option is unknown.
    """
    for tap in TAPS:
        if tap.find(student):
            try:
                return tap(student, **options)
            except TypeError as error:
                raise ValueError(f'model.tap: {tap.__name__} does not take '
                                 f'{sorted(options)} ({error})') from error
    raise ValueError(f'model.student is a {type(student).__name__}, and none '
                     'of its heads has class logits to distil')


__all__ = [
    'DenseTap', 'LogitPair', 'LogitTap', 'PixelTap', 'RoITap', 'build_tap',
    'watch_method'
]
