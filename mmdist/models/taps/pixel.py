"""Decode heads: a row is a pixel of the head's own logits."""
from functools import lru_cache, partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Call, LogitPair, LogitTap, check_classes, unknown_arguments
from .labels import IGNORED, NONE
from .teacher_batch import TeacherBatch

AUXILIARY = 'auxiliary_head'
# How MMSegmentation prefixes the losses of its heads.
PREFIXES = {'decode_head': 'decode', AUXILIARY: 'aux'}
CLASS_LOSSES = ('CrossEntropy', 'Focal')
POINTS = 'point_logits'  # of single points of the picture (PointRend)
BOUNDARY_LOSS = 'loss_bd'  # PIDNet's; its other losses are on classes


class PixelTap(LogitTap):
    """Decode and auxiliary heads that classify every pixel.

    As in the authors' segmentation code (https://github.com/hunto/DIST_KD),
    the rows are all pixels of the logits at the head's own size, before they
    are resized to the picture, and the columns are the classes. Every pair is
    weighted as the student's head weights its own loss.

    The teacher's logits are resized bilinearly where they have another size.
    The stages of a cascade are paired from the last, and a missing one is
    replaced by the nearest; auxiliary heads are paired in their order, and
    one that the teacher does not have learns from the labels alone. A head
    with several outputs learns from as many of the teacher, and with all of
    them from the teacher's prediction if it has another number. A head of
    single points (PointRend) learns what the teacher says at these points.

    Args:
        student (nn.Module): The student.
        ignore_label_pixels (bool): Leave out the pixels whose label is the
            head's ``ignore_index``.
    """
    method = 'loss_by_feat'
    class_arguments = ('seg_logits', 'seg_logit', POINTS)
    instances = 'pixels'

    def __init__(self,
                 student: nn.Module,
                 ignore_label_pixels: bool = False) -> None:
        super().__init__(student)
        self.ignore_label_pixels = ignore_label_pixels
        # The teacher's head for each of the student's that has one.
        self.twins: Dict[str, str] = {}

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Heads of the model's own classes, not those within other heads."""
        paths: List[str] = []
        for path in super().find(model):
            nested = any(path.startswith(f'{outer}.') for outer in paths)
            head = model.get_submodule(path)
            # Heads that learn boundaries (STDC) make targets of their own.
            classes = head.num_classes == model.num_classes and not hasattr(
                head, 'boundary_threshold')
            if classes and not nested:
                paths.append(path)
        return paths

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Decode heads must pair, and pairs predict the same classes."""
        maps_s, points_s = self._maps_and_points(student, self.heads)
        maps_t, points_t = self._maps_and_points(teacher, self.teacher_heads)
        sides = ((student, maps_s, 'model.student'), (teacher, maps_t,
                                                      'model.teacher.config'))
        for model, heads, field in sides:
            if not _of_group('decode_head', heads):
                raise ValueError(self._why_unread(model, field))
        self.twins = _pair_up(maps_s, maps_t)
        # A point may be looked up in a map of logits.
        for path in points_s:
            self.twins[path] = (points_t
                                or _of_group('decode_head', maps_t))[-1]
        for path, twin in self.twins.items():
            head_s = student.get_submodule(path)
            head_t = teacher.get_submodule(twin)
            check_classes(head_s, head_t, self.class_map)
            if self.class_map is not None and not (
                    head_s.out_channels == head_s.num_classes
                    and head_t.out_channels == head_t.num_classes):
                raise ValueError(
                    'model.teacher.class_map needs a column a class; set '
                    'out_channels of both heads to their num_classes')
            if self.class_map is None and (head_s.out_channels
                                           != head_t.out_channels):
                raise ValueError(
                    f'model.teacher scores a pixel with {head_t.out_channels} '
                    f'numbers but model.student with {head_s.out_channels}; '
                    'set out_channels of the heads alike')

    def _why_unread(self, model: nn.Module, field: str) -> str:
        """The reason why the decode head that predicts is not tapped."""
        path = _of_group('decode_head', _all_heads(model))[-1]
        head = f'{field} has a {type(model.get_submodule(path)).__name__}'
        if path in self.find(model):
            return (f'{head} for a decode head that is frozen, so nothing can '
                    'be distilled into it; let its parameters be trained')
        return (f'{head} for a decode head, which has no class logits for '
                f'pixels{unknown_arguments(model, self.class_arguments)}; '
                'choose another')

    def _maps_and_points(self, model: nn.Module,
                         heads: List[str]) -> Tuple[List[str], List[str]]:
        """Heads of maps of logits, and those of single points."""
        points = [
            path for path in heads
            if POINTS in self.names_of(model.get_submodule(path))
        ]
        return [path for path in heads if path not in points], points

    def distilled_heads(self) -> List[str]:
        """Paths of the heads of which the teacher has a counterpart."""
        return list(self.twins)

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, C, H, W)`` logits an output of the head."""
        path = self.twins[call.path]
        head_s = student.get_submodule(call.path)
        output = self._outputs(teacher).get(path)
        if POINTS in self.names_of(head_s):
            output = _at_points(teacher, path, output,
                                call.arguments['points'])
        return self._head_pairs(call, head_s, output,
                                teacher.model.get_submodule(path))

    def _outputs(self, teacher: TeacherBatch) -> Dict[str, Any]:
        """What the heads of maps return; one forward, which is kept."""
        maps, _ = self._maps_and_points(teacher.model, self.teacher_heads)
        return teacher.head_outputs(
            [p for p in dict.fromkeys(self.twins.values()) if p in maps])

    def _head_pairs(self, call: Call, head_s: nn.Module, output_t: Any,
                    head_t: nn.Module) -> List[LogitPair]:
        name = self.names_of(head_s)[0]
        outputs_s = _class_logits(call.arguments[name], head_s.out_channels)
        outputs_t = _class_logits(output_t, head_t.out_channels)
        if len(outputs_t) != len(outputs_s):
            # The first is the one that a head with several predicts with.
            outputs_t = outputs_t[:1] * len(outputs_s)
        # Outputs of one size share the teacher's resized logits.
        resize = lru_cache(
            partial(
                F.interpolate,
                mode='bilinear',
                align_corners=head_s.align_corners))
        pairs = []
        for i, (logits_s, logits_t, weight) in enumerate(
                zip(outputs_s, outputs_t,
                    _loss_weights(head_s, len(outputs_s)))):
            size = logits_s.shape[2:]
            if logits_t.shape[2:] != size:
                logits_t = resize(logits_t, size)
            if self.class_map is not None:
                logits_t = logits_t[:, self.class_map]
            labels = partial(_labels, call, head_s, size)
            if self.ignore_label_pixels and head_s.ignore_index is not None:
                logits_s, logits_t, labels = _without_ignored(
                    logits_s, logits_t, labels(), head_s.ignore_index)
            pairs.append(
                LogitPair(
                    logits_s,
                    logits_t,
                    student_activation=_activation_of(head_s),
                    teacher_activation=_activation_of(head_t),
                    weight=weight,
                    name=f'{call.path}, output {i}',
                    num_classes=head_s.out_channels,
                    labels=partial(_known, labels, head_s),
                    thresholds=_thresholds(head_s, head_t)))
        return pairs

    def is_classification_loss(self, name: str) -> bool:
        """The losses of the tapped heads on classes, e.g. 'decode.loss_ce'."""
        prefix, _, loss = name.partition('.')
        classes = 'loss' in loss and not loss.startswith(BOUNDARY_LOSS)
        return classes and prefix in map(_prefix, self.heads)

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``pixels x 19 (softmax), decode_head <- decode_head``."""
        head = student.get_submodule(self.heads[0])
        parts = [f'pixels x {head.out_channels} ({_activation_of(head)})']
        for path in _all_heads(student):
            if path in self.twins:
                parts.append(f'{path} <- {self.twins[path]}')
            elif path in self.heads:
                parts.append(f'{path} has no counterpart')
            else:
                parts.append(f'{path} is left alone')
        return ', '.join(parts)


def _all_heads(model: nn.Module) -> List[str]:
    """Paths of all heads, whatever they predict."""
    paths: List[str] = []
    for group in PREFIXES:
        heads = getattr(model, group, None)
        if isinstance(heads, nn.ModuleList):
            paths += [f'{group}.{i}' for i in range(len(heads))]
        elif heads is not None:
            paths.append(group)
    return paths


def _pair_up(own: Sequence[str], theirs: Sequence[str]) -> Dict[str, str]:
    """The teacher's head for each of the student's that has one."""
    twins = {}
    for group in PREFIXES:
        own_part, their_part = _of_group(group, own), _of_group(group, theirs)
        # Auxiliary heads are counted from the first, stages from the last.
        shift = 0 if group == AUXILIARY else len(their_part) - len(own_part)
        for i, path in enumerate(own_part, start=shift):
            if i < len(their_part):
                twins[path] = their_part[max(i, 0)]
    return twins


def _of_group(group: str, paths: Sequence[str]) -> List[str]:
    return [path for path in paths if path.partition('.')[0] == group]


def _prefix(path: str) -> str:
    """``'auxiliary_head.1'`` -> ``'aux_1'``."""
    group, _, index = path.partition('.')
    return '_'.join(filter(None, [PREFIXES[group], index]))


def _sample(maps: Tensor, points: Tensor, align_corners: bool,
            mode: str) -> Tensor:
    """``(N, C, H, W)`` at ``(N, P, 2)`` points in [0, 1]: ``(N, C, P)``."""
    from mmcv.ops import point_sample
    return point_sample(maps, points, mode=mode, align_corners=align_corners)


@torch.no_grad()
def _at_points(teacher: TeacherBatch, path: str, output: Any,
               points: Tensor) -> Tensor:
    """The teacher's logits at the student's points, ``(N, C, P)``.

    Args:
        teacher (TeacherBatch): The batch.
        path (str): A point head, or another that has maps.
        output (Any): What a head that has maps returns.
        points (Tensor): ``(N, P, 2)`` in [0, 1].
    """
    head = teacher.model.get_submodule(path)
    if output is not None:
        maps = _class_logits(output, head.out_channels)[0]
        return _sample(maps, points, head.align_corners, 'bilinear')
    # PointRend: its features and the head before, at the points.
    group, _, stage = path.rpartition('.')
    before = f'{group}.{int(stage) - 1}'
    coarse = teacher.head_outputs([before])[before]
    features = head._transform_inputs(teacher.all_features())
    return head(
        head._get_fine_grained_point_feats(features, points),
        head._get_coarse_point_feats(coarse, points))


def _class_logits(output: Any, num_columns: int) -> List[Tensor]:
    """The ``(N, C, *)`` class logits among the outputs of a head."""
    outputs = [output] if isinstance(output, Tensor) else output
    return [
        logits for logits in outputs
        if logits.dim() > 2 and logits.shape[1] == num_columns
    ]


def _losses_of(head: nn.Module) -> List[nn.Module]:
    """The losses of a head, or of the first head within it (K-Net)."""
    losses = next((m.loss_decode
                   for m in head.modules() if hasattr(m, 'loss_decode')), [])
    return list(losses) if isinstance(losses,
                                      (nn.ModuleList, list)) else [losses]


def _classifies(loss: nn.Module) -> bool:
    """Whether it is a cross-entropy or focal loss, OHEM or not."""
    return any(word in type(loss).__name__ for word in CLASS_LOSSES)


def _main_loss(head: nn.Module) -> Any:
    """The loss that stands for the head: that on classes, or the first."""
    losses = _losses_of(head)
    return next(filter(_classifies, losses), losses[0] if losses else None)


def _activation_of(head: nn.Module) -> str:
    """'softmax' or 'sigmoid', as the head's loss on classes has it."""
    if head.out_channels == 1:
        return 'sigmoid'
    sigmoid = getattr(_main_loss(head), 'use_sigmoid', False)
    return 'sigmoid' if sigmoid else 'softmax'


def _loss_weights(head: nn.Module, num_outputs: int) -> List[float]:
    """The weights that a head gives the losses of its outputs."""
    losses = _losses_of(head)[:num_outputs]
    # One loss on classes an output (DDRNet, PIDNet) …
    if len(losses) == num_outputs and all(map(_classifies, losses)):
        return [loss.loss_weight for loss in losses]
    # … or all losses on each.
    return [getattr(_main_loss(head), 'loss_weight', 1.0)] * num_outputs


def _labels(call: Call, head: nn.Module, size: Sequence[int]) -> Tensor:
    """The label at each logit of a call, ``(N, *size)``."""
    labels = torch.stack([
        sample.gt_sem_seg.data
        for sample in call.arguments['batch_data_samples']
    ])
    if 'points' in call.arguments:
        return _sample(labels.float(), call.arguments['points'],
                       head.align_corners, 'nearest')[:, 0]
    rows, columns = (_nearest(length, count, head.align_corners, labels.device)
                     for length, count in zip(labels.shape[2:], size))
    return labels[:, 0, rows[:, None], columns]


def _without_ignored(logits_s: Tensor, logits_t: Tensor, labels: Tensor,
                     ignore_index: int) -> Tuple[Tensor, Tensor, Callable]:
    """Both logits, as ``(R, C)`` of the labelled pixels, and the labels."""
    kept = labels != ignore_index
    return (logits_s.movedim(1, -1)[kept], logits_t.movedim(1, -1)[kept],
            lambda: labels[kept])


def _known(labels: Callable[[], Tensor], head: nn.Module) -> Tensor:
    """Labels of the head's classes, without those to ignore.

    One column is of the class 1; 0 says that it is not there.
    """
    found = labels().long()
    if head.out_channels == 1:
        answers = found.new_tensor([NONE, 0])
        known = (found >= 0) & (found < 2) & (found != head.ignore_index)
        return torch.where(known, answers[found.clamp(0, 1)], IGNORED)
    others = (found == head.ignore_index) | (found >= head.out_channels)
    return found.masked_fill(others, NONE)


def _thresholds(head_s: nn.Module,
                head_t: nn.Module) -> Optional[Tuple[float, float]]:
    """The probabilities above which heads of one column say 1, not 0."""
    if head_s.out_channels != 1:
        return None
    return head_s.threshold, head_t.threshold


def _nearest(length: int, count: int, align_corners: bool,
             device: torch.device) -> Tensor:
    """The label under each of `count` logits along a side; int64."""
    if align_corners:
        return torch.linspace(
            0, length - 1, count, device=device).round().long()
    centres = (torch.arange(count, device=device) + 0.5) * length / count
    return centres.long()
