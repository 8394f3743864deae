import inspect
from typing import Any

from torch import nn

from mmdist.errors import ConfigError, NoClassLogitsError
from mmdist.registry import TAPS
from .base import (LogitPair, LogitTap, find_tap, pair_logits, pair_of,
                   unknown_arguments)
from .box_alignment import BoxTap
from .columns import reads_text
from .dense import DenseTap
from .image import ImageTap
from .pixel import PixelTap
from .query import QueryTap
from .roi import RoITap
from .watch import (Call, LossCall, owner_of, tensors_in, watch_heads,
                    watch_method)

ProposalTap = TransformerTap = QueryTap  # names of the first edition


def build_tap(student: nn.Module, **options: Any) -> LogitTap:
    """Choose the tap that reads the student's class logits.

    Args:
        student (nn.Module): A detector, segmentor or classifier.
        **options: Options of the tap, e.g. ``anchors_as_rows=True``;
            ``align='boxes'`` for a teacher of another family.

    Returns:
        LogitTap: The first by priority that finds a head.

    Raises:
        ConfigError: If no head has class logits, or an option is unknown.
    """
    align = options.pop('align', None)
    if align not in (None, 'boxes'):
        raise ConfigError('model.tap.align',
                          f"it can be 'boxes' or left out, but is {align!r}")
    kind = find_tap(student)
    if kind is None:
        reads = [c for tap in TAPS.module_dict.values() for c in tap.reads]
        raise NoClassLogitsError(
            'model.student', f'it is a {type(student).__name__}, and none of '
            f'its heads has class logits to distil'
            f'{unknown_arguments(student, reads)}',
            'distil feature maps (model.feature_loss without '
            'model.distill_loss), or write a tap')
    kind = BoxTap if align else kind
    known = list(inspect.signature(kind).parameters)[1:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ConfigError(
            'model.tap', f'{kind.__name__} does not take '
            f'{", ".join(unknown)}; it takes '
            f'{", ".join(known) or "no options"}')
    tap = kind(student, **options)
    # A teacher within the student (semi-supervised) does not learn.
    for path in list(tap.heads):
        parameters = list(student.get_submodule(path).parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            del tap.heads[path]
    if not tap.heads:
        raise ConfigError(
            'model.student', f'it is a {type(student).__name__} whose heads '
            'are frozen, so nothing can be distilled into them')
    return tap


__all__ = [
    'BoxTap', 'Call', 'DenseTap', 'ImageTap', 'LogitPair', 'LogitTap',
    'LossCall', 'PixelTap', 'ProposalTap', 'QueryTap', 'RoITap',
    'TransformerTap', 'build_tap', 'owner_of', 'pair_logits', 'pair_of',
    'reads_text', 'tensors_in', 'watch_heads', 'watch_method'
]
