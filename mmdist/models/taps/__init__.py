import inspect
from typing import Any, Dict, Type

from torch import nn

from mmdist.errors import NoClassLogitsError
from .base import (LogitPair, LogitTap, reads_text, tensors_in,
                   unknown_arguments, watch_method)
from .boxes import BoxTap
from .dense import DenseTap
from .image import ImageTap
from .pixel import PixelTap
from .query import ProposalTap, TransformerTap
from .roi import RoITap
from .teacher_batch import TeacherBatch

# The later a head decides in a detector, the earlier its tap stands here: a
# two-stage model is read off its RoI head.
TAPS = (RoITap, ProposalTap, DenseTap, TransformerTap, PixelTap, ImageTap)


def build_tap(student: nn.Module, **options: Any) -> LogitTap:
    """Choose the tap that reads the student's class logits.

    Args:
        student (nn.Module): A detector, segmentor or classifier.
        **options: Options of the tap, e.g. ``anchors_as_rows=True``;
            ``align='boxes'`` for a teacher of another family.

    Returns:
        LogitTap: The tap for the head that decides last.

    Raises:
        ValueError: If no head has class logits, or an option is unknown.
    """
    align = options.pop('align', None)
    if align not in (None, 'boxes'):
        raise ValueError("model.tap: align can be 'boxes' or left out, but is "
                         f'{align!r}')
    for tap in TAPS:
        if tap.find(student):
            if align == 'boxes':
                return _build(
                    BoxTap, student, options, own=tap(student), kinds=TAPS)
            return _build(tap, student, options)
    known = dict.fromkeys(name for tap in TAPS for name in tap.class_arguments)
    raise NoClassLogitsError(
        'model.student',
        f'it is a {type(student).__name__}, and none of its heads has class '
        f'logits to distil{unknown_arguments(student, list(known))}')


def _build(tap: Type[LogitTap], student: nn.Module, options: Dict[str, Any],
           **parts: Any) -> LogitTap:
    known = set(inspect.signature(tap).parameters) - {'student', *parts}
    unknown = sorted(set(options) - known)
    if unknown:
        raise ValueError(
            f'model.tap: {tap.__name__} does not take {", ".join(unknown)}, '
            f'but {", ".join(sorted(known)) or "no options"}')
    built = tap(student, **parts, **options)
    if not built.heads:
        raise ValueError(
            f'model.student is a {type(student).__name__} whose heads are '
            'frozen, so nothing can be distilled into them')
    return built


__all__ = [
    'BoxTap', 'DenseTap', 'ImageTap', 'LogitPair', 'LogitTap', 'PixelTap',
    'ProposalTap', 'RoITap', 'TeacherBatch', 'TransformerTap', 'build_tap',
    'reads_text', 'tensors_in', 'watch_method'
]
