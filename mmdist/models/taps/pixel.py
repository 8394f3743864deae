"""Decode heads: a row is a pixel of the head's own logits."""
from functools import lru_cache, partial
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from ..class_mapping import FIELD
from .base import LogitPair, LogitTap, pair_of, unknown_arguments
from .batch import TeacherBatch
from .columns import Columns, check_alike
from .labels import labels_of_maps, labels_of_pixels
from .watch import Call, LossCall, loss_call, tensors_in

DECODE, AUXILIARY = 'decode_head', 'auxiliary_head'
# How MMSegmentation prefixes the losses of its heads.
PREFIXES = {DECODE: 'decode', AUXILIARY: 'aux'}
CLASS_LOSSES = ('CrossEntropy', 'Focal')
POINTS = 'point_logits'  # of single points of the image (PointRend)
BOUNDARY_LOSS = 'loss_bd'  # PIDNet's; its other losses are on classes


@TAPS.register_module()
class PixelTap(LogitTap):
    """Decode and auxiliary heads that classify every pixel.

    As in the authors' segmentation code (https://github.com/hunto/DIST_KD),
    the rows are all pixels of the logits at the head's own size, before they
    are resized to the image, and the columns are the classes. Every pair is
    weighted as the student's head weights its own loss.

    The teacher's logits are resized bilinearly where they have another size.
    The stages of a cascade are paired from the last, and a missing one is
    replaced by the nearest; auxiliary heads are paired in their order, and
    one that the teacher does not have learns from the labels alone. A head
    with several outputs learns from as many of the teacher, and all of them
    from the teacher's prediction if it has another number. A head of single
    points (PointRend) learns what the teacher says at these points.

    Args:
        student (nn.Module): The student.
        ignore_label_pixels (bool): Leave out the pixels whose label is the
            head's ``ignore_index``.
    """
    priority = 80
    reads = (LossCall('loss_by_feat', ('seg_logits', 'seg_logit', POINTS)), )
    rows = 'pixels'

    def __init__(self,
                 student: nn.Module,
                 ignore_label_pixels: bool = False) -> None:
        super().__init__(student)
        self.ignore_label_pixels = ignore_label_pixels

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

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        """Pair decode heads from the last, and auxiliary heads in order."""
        own = _in_groups(student, self.heads, 'model.student')
        theirs = _in_groups(teacher, found, 'model.teacher.config')
        twins = dict(zip(own[AUXILIARY], theirs[AUXILIARY]))
        last = len(theirs[DECODE]) - 1
        for i, path in enumerate(reversed(own[DECODE])):
            twins[path] = theirs[DECODE][max(last - i, 0)]
        # A point may be looked up in a map of logits.
        for path in own[POINTS]:
            twins[path] = (theirs[POINTS] or theirs[DECODE])[-1]
        return twins

    def _check_heads(self, student_head: nn.Module,
                     teacher_head: nn.Module) -> None:
        heads = student_head, teacher_head
        if self.class_map is None:
            check_alike('scores a pixel with {} numbers',
                        *[head.out_channels for head in heads],
                        'set out_channels of the heads alike')
        elif any(head.out_channels != head.num_classes for head in heads):
            raise ConfigError(
                FIELD, 'it needs a column for each class',
                'set out_channels of both heads to their num_classes')

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, C, H, W)`` logits for each output of the head."""
        head, twin = call.head, self.heads[call.path]
        columns = _columns(batch.model.get_submodule(twin))
        points = call.arguments.get('points')
        outputs = _class_logits(call.logits, head)
        answers = self._teacher_outputs(batch, twin, points)
        if len(answers) != len(outputs):
            # The first is the one that a head with several predicts with.
            answers = answers[:1] * len(outputs)
        # Outputs of one size share the teacher's resized logits.
        resize = lru_cache(
            partial(
                F.interpolate,
                mode='bilinear',
                align_corners=head.align_corners))
        pairs = []
        for i, (own, theirs, weight) in enumerate(
                zip(outputs, answers, _loss_weights(head, len(outputs)))):
            size = own.shape[2:]
            if theirs.shape[2:] != size:
                theirs = resize(theirs, size)
            labels = lru_cache(
                partial(labels_of_maps, call.arguments['batch_data_samples'],
                        size, head.align_corners, points))
            kept = slice(None)
            if self.ignore_label_pixels and head.ignore_index is not None:
                kept = labels() != head.ignore_index
                own, theirs = (
                    logits.movedim(1, -1)[kept] for logits in (own, theirs))
            pair = pair_of(self, call, batch, (own, _columns(head)),
                           (theirs, columns))
            pair.weight, pair.name = weight, f'{call.path}, output {i}'
            pair.labels = lambda labels=labels, kept=kept: labels_of_pixels(
                labels()[kept], head)
            pairs.append(pair)
        return pairs

    def _teacher_outputs(self, batch: TeacherBatch, path: str,
                         points: Optional[Tensor]) -> List[Tensor]:
        """The teacher's class logits of one head, or at the student's points,
        ``(N, P, 2)`` in [0, 1]."""
        head = batch.model.get_submodule(path)
        # One forward for all heads that have maps.
        maps = [
            p for p in dict.fromkeys(filter(None, self.heads.values()))
            if not _has_points(batch.model.get_submodule(p))
        ]
        outputs = batch.head_outputs(maps)
        if path in maps:
            logits = _class_logits(outputs[path], head)
            if points is None:
                return logits
            from mmcv.ops import point_sample
            return [
                point_sample(
                    logits[0], points, align_corners=head.align_corners)
            ]
        # PointRend: its features and the head before, at the points.
        group, _, stage = path.rpartition('.')
        before = f'{group}.{int(stage) - 1}'
        coarse = batch.head_outputs([before])[before]
        with torch.no_grad():
            features = head._transform_inputs(batch.features(batch.images))
            return [
                head(
                    head._get_fine_grained_point_feats(features, points),
                    head._get_coarse_point_feats(coarse, points))
            ]

    def is_classification_loss(self, name: str) -> bool:
        """Losses of the tapped heads on classes, e.g. 'decode.loss_ce'."""
        prefix, _, loss = name.partition('.')
        if 'loss' not in loss or loss.startswith(BOUNDARY_LOSS):
            return False
        groups = [path.split('.') for path in self.heads]
        # 'auxiliary_head.1' logs 'aux_1'
        return prefix in [
            '_'.join([PREFIXES[group], *index]) for group, *index in groups
        ]

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``pixels x 19 (softmax), decode_head <- decode_head``."""
        columns = _columns(student.get_submodule(next(iter(self.heads))))
        parts = [f'pixels x {columns.number} ({columns.activation})']
        for path in _all_heads(student):
            twin = self.heads.get(path)
            fate = ('has no counterpart'
                    if path in self.heads else 'is left alone')
            parts.append(f'{path} {f"<- {twin}" if twin else fate}')
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


def _in_groups(model: nn.Module, paths: Sequence[str],
               field: str) -> Dict[str, List[str]]:
    """The decode heads, auxiliary heads and heads of points among some heads.

    Raises:
        ConfigError: If the decode head that predicts is not among them.
    """
    groups: Dict[str, List[str]] = {DECODE: [], AUXILIARY: [], POINTS: []}
    for path in paths:
        points = _has_points(model.get_submodule(path))
        groups[POINTS if points else path.partition('.')[0]].append(path)
    if groups[DECODE]:
        return groups
    path = [p for p in _all_heads(model) if p.startswith(DECODE)][-1]
    head = f'it has a {type(model.get_submodule(path)).__name__}'
    if path in PixelTap.find(model):
        raise ConfigError(
            field, f'{head} for a decode head that is frozen, so nothing '
            'can be distilled into it', 'let its parameters be trained')
    raise ConfigError(
        field, f'{head} for a decode head, which has no class logits for '
        f'pixels{unknown_arguments(model, PixelTap.reads)}', 'choose another')


def _has_points(head: nn.Module) -> bool:
    """Whether a head has logits of single points instead of maps."""
    return POINTS in loss_call(head, PixelTap.reads).class_arguments


def _class_logits(output: Any, head: nn.Module) -> List[Tensor]:
    """The ``(N, C, *)`` class logits among the outputs of a head."""
    return [
        logits for logits in tensors_in(output)
        if logits.dim() > 2 and logits.shape[1] == head.out_channels
    ]


def _losses_of(head: nn.Module) -> List[Any]:
    """The losses of a head, or of the first head within it (K-Net)."""
    losses = next((m.loss_decode
                   for m in head.modules() if hasattr(m, 'loss_decode')), None)
    return list(losses) if isinstance(losses,
                                      (nn.ModuleList, list)) else [losses]


def _classifies(loss: nn.Module) -> bool:
    """Whether it is a cross-entropy or focal loss, OHEM or not."""
    return any(word in type(loss).__name__ for word in CLASS_LOSSES)


def _of_main_loss(head: nn.Module, name: str, default: Any) -> Any:
    """An attribute of the head's loss on classes, or of its first."""
    losses = _losses_of(head)
    loss = next(filter(_classifies, losses), losses[0])
    return getattr(loss, name, default)


def _columns(head: nn.Module) -> Columns:
    """A column for each class, with the activation of the loss on classes."""
    sigmoid = head.out_channels == 1 or _of_main_loss(head, 'use_sigmoid',
                                                      False)
    return Columns(head.out_channels, 'sigmoid' if sigmoid else 'softmax')


def _loss_weights(head: nn.Module, num_outputs: int) -> List[float]:
    """The weights that a head gives the losses of its outputs."""
    losses = _losses_of(head)[:num_outputs]
    # One loss on classes for each output (DDRNet, PIDNet) …
    if len(losses) == num_outputs and all(map(_classifies, losses)):
        return [loss.loss_weight for loss in losses]
    # … or all losses on each.
    return [_of_main_loss(head, 'loss_weight', 1.)] * num_outputs
