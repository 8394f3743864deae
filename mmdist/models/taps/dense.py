"""Dense heads: a row is a location of a feature level."""
from typing import List, Sequence

import torch
from torch import Tensor, nn

from .base import Call, LogitPair, LogitTap, activation_of, check_class_counts


class DenseTap(LogitTap):
    """Heads that classify every location of every level.

    As in the authors' detection code, the rows are the ``N * H * W``
    locations of a level, the columns its ``A * C`` channels (anchors times
    classes), and the loss is summed over the levels. Levels are paired by
    stride.

    Args:
        student (nn.Module): The student.
        anchors_as_rows (bool): Read every anchor as a row and the ``C``
            classes as columns. A softmax head is always read so, since its
            probabilities sum to 1 within an anchor.
    """
    method = 'loss_by_feat'
    first_arguments = ('cls_scores', )
    instances = 'the locations of feature levels'

    def __init__(self,
                 student: nn.Module,
                 anchors_as_rows: bool = False) -> None:
        super().__init__(student)
        self.anchors_as_rows = anchors_as_rows

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Dense heads, but for the proposal network: it knows no classes."""
        paths = [
            path for path in super().find(model)
            if 'rpn_head' not in path.split('.')
        ]
        return [] if paths and _only_proposes(model) else paths

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Classes, anchors a location and strides must agree."""
        if len(self.heads) != len(self.teacher_heads):
            raise ValueError(
                f'model.teacher has {len(self.teacher_heads)} dense heads but '
                f'model.student has {len(self.heads)}')
        for path, twin in zip(self.heads, self.teacher_heads):
            head_s = student.get_submodule(path)
            head_t = teacher.get_submodule(twin)
            check_class_counts(head_s, head_t)
            _check_anchors(head_s, head_t)

    def pairs(self, calls: List[Call], student: nn.Module, teacher: nn.Module,
              features: Sequence[Tensor]) -> List[LogitPair]:
        """One pair of ``(N, A * C, H, W)`` logits a head and level."""
        pairs = []
        for call in calls:
            twin = self.teacher_heads[self.heads.index(call.path)]
            pairs += self._level_pairs(call, student.get_submodule(call.path),
                                       teacher.get_submodule(twin), features)
        return pairs

    def _level_pairs(self, call: Call, head_s: nn.Module, head_t: nn.Module,
                     features: Sequence[Tensor]) -> List[LogitPair]:
        student_levels = call.arguments[self.first_arguments[0]]
        with torch.no_grad():
            # Every head returns its class logits first, for its loss call
            # takes them first.
            teacher_levels = head_t(features)[0]
        return [
            self._level_pair(head_s, head_t, logits, teacher_levels[level],
                             f'level {i}')
            for i, (logits, level) in enumerate(
                zip(student_levels, _level_indices(head_s, head_t)))
        ]

    def _level_pair(self, head_s: nn.Module, head_t: nn.Module,
                    logits_s: Tensor, logits_t: Tensor,
                    name: str) -> LogitPair:
        if logits_s.shape[-2:] != logits_t.shape[-2:]:
            raise ValueError(
                f'{name} of model.student has {tuple(logits_s.shape[-2:])} '
                f'locations but of model.teacher {tuple(logits_t.shape[-2:])};'
                " set pad_size_divisor of model.student's data_preprocessor "
                'to the largest stride')
        logits_s, logits_t = _logits(logits_s,
                                     head_s), _logits(logits_t, head_t)
        if self._rows_are_anchors(head_s, head_t):
            logits_s = _anchors_as_rows(logits_s, head_s.cls_out_channels)
            logits_t = _anchors_as_rows(logits_t, head_t.cls_out_channels)
        return LogitPair(
            student=logits_s,
            teacher=logits_t,
            student_activation=activation_of(head_s),
            teacher_activation=activation_of(head_t),
            name=name)

    def _rows_are_anchors(self, head_s: nn.Module, head_t: nn.Module) -> bool:
        return self.anchors_as_rows or 'softmax' in (activation_of(head_s),
                                                     activation_of(head_t))

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``locations x 720 (sigmoid) of the strides 8, 16, 32``."""
        head = student.get_submodule(self.heads[0])
        head_t = teacher.get_submodule(self.teacher_heads[0])
        rows = 'locations'
        columns = head.cls_out_channels * _num_anchors(head, 0)
        if self._rows_are_anchors(head, head_t):
            rows, columns = 'anchors', head.cls_out_channels
        strides = ', '.join(map(str, _strides(head, 'model.student')))
        return (f'{rows} x {columns} ({activation_of(head)}) of the strides '
                f'{strides}, {self.heads[0]} <- {self.teacher_heads[0]}')


def _only_proposes(model: nn.Module) -> bool:
    """Whether the model is an RPN alone, which calls its head bbox_head."""
    from mmdet.models.detectors import RPN
    return isinstance(model, RPN)


def _anchors_as_rows(logits: Tensor, num_columns: int) -> Tensor:
    """``(N, A * C, H, W)`` -> ``(N * A, C, H, W)``."""
    return logits.reshape(-1, num_columns, *logits.shape[-2:])


def _logits(scores: Tensor, head: nn.Module) -> Tensor:
    """Class logits, also of a head whose loss takes probabilities (TOOD)."""
    if getattr(getattr(head, 'loss_cls', None), 'activated', False):
        return torch.logit(scores.float(), eps=1e-6)
    return scores


def _num_anchors(head: nn.Module, level: int) -> int:
    """Anchors a location of a level; SSD's levels differ."""
    anchors = getattr(head, 'num_base_priors', 1)
    return anchors[level] if isinstance(anchors, (list, tuple)) else anchors


def _check_anchors(head_s: nn.Module, head_t: nn.Module) -> None:
    levels = _level_indices(head_s, head_t)
    anchors_s = [_num_anchors(head_s, i) for i in range(len(levels))]
    anchors_t = [_num_anchors(head_t, level) for level in levels]
    if anchors_s != anchors_t:
        raise ValueError(
            f'model.teacher has {_in_words(anchors_t)} anchors a location but '
            f'model.student has {_in_words(anchors_s)}; choose a teacher '
            "whose anchor_generator is the student's")
    for i, level in enumerate(levels):
        if not _same_shapes(head_s, head_t, i, level):
            raise ValueError(
                'model.teacher lists the shapes of its anchors in another '
                'order than model.student; choose a teacher whose '
                "anchor_generator has the student's ratios and scales")
    if head_s.cls_out_channels != head_t.cls_out_channels:
        raise ValueError(
            f'model.teacher scores an anchor with {head_t.cls_out_channels} '
            f'numbers but model.student with {head_s.cls_out_channels}; use '
            'use_sigmoid alike in the loss_cls of both')


def _same_shapes(head_s: nn.Module, head_t: nn.Module, level_s: int,
                 level_t: int) -> bool:
    """Whether the anchors of a location have like shapes, in one order.

    All may be larger by one factor, as for another octave_base_scale.
    """
    sides = []
    for head, level in ((head_s, level_s), (head_t, level_t)):
        generator = getattr(head, 'prior_generator', None)
        if not hasattr(generator, 'base_anchors'):
            return True  # points
        boxes = generator.base_anchors[level]
        extent = boxes[:, 2:4] - boxes[:, :2]
        sides.append(extent / extent.max())
    return torch.allclose(*sides, rtol=0.05)


def _in_words(anchors: List[int]) -> str:
    """``'9'``, or ``'4, 6, 6'`` where levels differ."""
    few = anchors if len(set(anchors)) > 1 else anchors[:1]
    return ', '.join(map(str, few))


def _strides(head: nn.Module, field: str) -> List[int]:
    """The stride of each level in pixels."""
    generator = getattr(head, 'prior_generator', None)
    strides = getattr(generator, 'strides', getattr(head, 'strides', None))
    if strides is None:
        raise ValueError(f'{field} has a {type(head).__name__}, which does '
                         'not say the strides of its levels')
    return [s[0] if isinstance(s, (list, tuple)) else s for s in strides]


def _level_indices(head_s: nn.Module, head_t: nn.Module) -> List[int]:
    """For each level of the student, the teacher's level of that stride."""
    strides_s = _strides(head_s, 'model.student')
    strides_t = _strides(head_t, 'model.teacher')
    missing = [s for s in strides_s if s not in strides_t]
    if missing:
        raise ValueError(
            f'model.student has feature levels of the strides {strides_s} but '
            f'model.teacher of {strides_t}: nothing pairs with {missing}; '
            'choose a teacher with these strides, or change the neck and '
            "strides of the student's head")
    return [strides_t.index(stride) for stride in strides_s]
