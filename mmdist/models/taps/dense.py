"""Dense heads: a row is a location of a feature level."""
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from .base import LogitPair, LogitTap, pair_of
from .batch import TeacherBatch
from .columns import (Columns, activation_of, check_alike, class_log_odds,
                      class_logits, logits_of, reads_text)
from .labels import Objects, labels_at, object_labels
from .probe import CannotSay, left_out, probed, unread_layers
from .watch import Call, LossCall, loss_call, signature_of


class Layout(NamedTuple):
    """Contents of an argument of the loss call of a dense head."""
    probabilities: bool = False  # of a sigmoid, instead of logits
    first_class: int = 0  # channels of an anchor before its classes
    activation: Optional[str] = None  # where the head's loss does not say it
    objectness: Optional[int] = None  # channel that says if there is an object
    place: float = 0.5  # of an object in its box: the centre; 0 is left top


OBJECTNESS = 'objectnesses'  # YOLOX's, an argument by itself
LAYOUTS = {
    'cls_scores': Layout(),
    'center_heatmap_preds': Layout(probabilities=True,
                                   activation='sigmoid'),  # CenterNet
    'tl_heats': Layout(activation='sigmoid', place=0.),  # CornerNet
    'br_heats': Layout(activation='sigmoid', place=1.),
    'pred_maps': Layout(first_class=5, objectness=4),  # YOLOv3
    'mlvl_cls_preds': Layout()  # SOLO
}


class ClassMaps:
    """The maps of class logits that a dense head predicts, by the name of an
    argument of its loss call, a key of ``LAYOUTS``."""

    def __init__(self, head: nn.Module, name: str) -> None:
        self.head, self.name, self.layout = head, name, LAYOUTS[name]
        # Heads return what their loss call takes, in this order.
        self.names = list(signature_of(head.loss_by_feat).parameters)
        self.position = self.names.index(name)
        self.columns = Columns(
            head.num_classes, self.layout.activation or activation_of(head),
            getattr(head, 'cls_out_channels', head.num_classes)
            > head.num_classes)
        # Some predict classes given that there is an object, and that apart.
        self.objects_apart = (
            self.layout.objectness is not None or OBJECTNESS in self.names)

    def levels(self,
               outputs: Sequence[Any],
               given_object: bool = False) -> List[Tensor]:
        """The logits of each level, ``(N, A, C, H, W)``.

        A head that classifies tokens of a text (GLIP) has ``(N, 1, T, L, 1)``
        with all anchors of all locations in one row. With ``given_object``,
        the probability of an object is left out where it is predicted apart.
        """
        layout, levels = self.layout, []
        for i, scores in enumerate(outputs[self.position]):
            if scores.dim() == 3:
                levels.append(scores.transpose(1, 2)[:, None, ..., None])
                continue
            logits = (
                logits_of(scores) if layout.probabilities else class_logits(
                    scores, self.head))
            maps = self._by_anchor(logits)[:, :, layout.first_class:]
            if self.objects_apart and not given_object:
                if layout.objectness is None:
                    objects = outputs[self.names.index(OBJECTNESS)][i]
                else:
                    objects = self._by_anchor(scores)[:, :, layout.objectness]
                maps = logits_of(maps.sigmoid() *
                                 objects.sigmoid().unsqueeze(2))
            levels.append(maps)
        return levels

    def _by_anchor(self, scores: Tensor) -> Tensor:
        size = self.layout.first_class + self.columns.number
        return scores.unflatten(1, (-1, size))

    def rows(self, outputs: Sequence[Any]) -> List[Tensor]:
        """The logits of an image's anchors, ``(L, C)``, level by level, row
        by row, anchor by anchor; with the probability of an object."""
        tables = [
            level.permute(0, 3, 4, 1, 2).flatten(1, 3)
            for level in self.levels(outputs)
        ]
        return list(torch.cat(tables, dim=1))


@TAPS.register_module()
class DenseTap(LogitTap):
    """Heads that classify every location of every level.

    As in the authors' detection code, the rows are the ``N * H * W``
    locations of a level, the columns its ``A * C`` channels (anchors times
    classes), and the loss is summed over the levels. Levels are paired by
    stride. Heatmaps of keypoints (CenterNet, CornerNet) and the grids of SOLO
    are levels, too.

    Some heads predict classes given that there is an object, and the object
    apart (YOLOX, YOLOv3). Beside a head that does not, and for boxes, their
    class probabilities are multiplied by that of an object.

    Where the anchors of a location do not correspond one to one (another
    number, or other shapes), its score for a class is that of its best
    anchor, in both models.

    Args:
        student (nn.Module): The student.
        anchors_as_rows (bool): Read every anchor as a row and the ``C``
            classes as columns. A softmax head is always read so, since its
            probabilities sum to 1 within an anchor.
    """
    priority = 60
    reads = (LossCall('loss_by_feat', tuple(LAYOUTS)), )
    rows = 'the locations of feature levels'

    def __init__(self,
                 student: nn.Module,
                 anchors_as_rows: bool = False) -> None:
        super().__init__(student)
        self.anchors_as_rows = anchors_as_rows
        # Heads whose anchors are not those of the teacher's.
        self._merged: List[str] = []
        # Layers of the teacher's heads that predict other than classes.
        self._unread: Dict[str, Dict[str, int]] = {}

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Dense heads, but for proposal networks, which know no classes."""
        paths = [
            path for path in super().find(model)
            if 'rpn_head' not in path.split('.')
        ]
        if paths:
            from mmdet.models.detectors import RPN
            if isinstance(model, RPN):  # which calls its head bbox_head
                return []
        return paths

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """Connect the heads, compare their anchors, and find the layers of
        the teacher that need not run."""
        super().connect(student, teacher, class_map)
        self._merged = []
        for path, twin in self.heads.items():
            heads = student.get_submodule(path), teacher.get_submodule(twin)
            if _anchors_differ(*heads):
                self._merged.append(path)
            maps = class_maps(heads[1])
            self._unread[twin] = unread_layers(
                teacher,
                twin,
                lambda outputs, maps=maps:
                [level for part in maps for level in part.levels(outputs)])
            if not all(map(strides_of, heads)):
                # Then only an image shows how many levels a head has.
                try:
                    _match_levels(*heads, _num_levels(student, path),
                                  _num_levels(teacher, twin))
                except CannotSay:
                    pass  # the first iteration says it

    def _check_heads(self, student_head: nn.Module,
                     teacher_head: nn.Module) -> None:
        check_alike(
            'predicts {} maps of classes per level',
            *[len(class_maps(head)) for head in (student_head, teacher_head)])
        own, theirs = strides_of(student_head), strides_of(teacher_head)
        missing = set(own) - set(theirs) if theirs else ()
        if missing:
            raise ConfigError(
                'model.teacher.config',
                f'its feature levels have the strides {theirs} but those of '
                f'model.student {own}: nothing pairs with {sorted(missing)}',
                'choose a teacher with these strides, or change the neck and '
                "strides of the student's head")

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, A * C, H, W)`` logits for each level."""
        twin = self.heads[call.path]
        heads = call.head, batch.model.get_submodule(twin)
        # SOLO suppresses neighbours in eval mode.
        outputs = list(call.arguments.values()), batch.head_outputs(
            [twin], call.head.training, left_out(heads[1],
                                                 self._unread[twin]))[twin]
        pairs = []
        for maps in zip(*map(class_maps, heads)):
            # Where both predict objects apart, their classes do not say
            # whether there is one.
            apart = all(part.objects_apart for part in maps)
            own, theirs = (part.levels(output, given_object=apart)
                           for part, output in zip(maps, outputs))
            fields = dict(thresholds=None) if apart else {}
            pairs += [
                self._pair_level(call, batch, maps, i, [own[i], theirs[index]],
                                 fields)
                for i, index in enumerate(
                    _match_levels(*heads, len(own), len(theirs)))
            ]
        return pairs

    def _pair_level(self, call: Call, batch: TeacherBatch,
                    maps: Tuple[ClassMaps, ClassMaps], level: int,
                    logits: List[Tensor], fields: dict) -> LogitPair:
        """The pair of two maps ``(N, A, C, H, W)``."""

        def assign(objects: Sequence[Objects]) -> Tensor:
            labels = labels_at(objects, grid, strides_of(head), level,
                               maps[0].layout.place)
            return labels.repeat_interleave(num_anchors, dim=0)

        head, columns = maps[0].head, [part.columns for part in maps]
        name = f'level {level} of {maps[0].name}'
        grid, theirs = (tuple(each.shape[3:]) for each in logits)
        if grid != theirs:
            raise ConfigError(
                'model.student.data_preprocessor.pad_size_divisor',
                f'{name} has {grid} locations but {theirs} in model.teacher',
                'set it to the largest stride, and give both heads the same '
                'strides or num_grids')
        masks = getattr(head, 'text_masks', None)
        if masks is not None:  # of the tokens of each caption
            missing = ~masks.bool()[:, None, :, None, None]
            logits = [each.masked_fill(missing, -torch.inf) for each in logits]
        num_images, num_anchors = logits[0].shape[:2]
        logits = [each.flatten(0, 1) for each in logits]
        if call.path in self._merged:  # the best anchor for each class
            logits = [
                class_log_odds(each, c).unflatten(0, (num_images, -1)).amax(1)
                for each, c in zip(logits, columns)
            ]
            columns = [Columns(c.num_classes, 'sigmoid') for c in columns]
            num_anchors = 1
        pair = pair_of(
            self,
            call,
            batch,
            *zip(logits, columns),
            name=name,
            **object_labels(batch, num_images, assign),
            **fields)
        # The probabilities of a softmax sum to 1 within an anchor.
        if not self.anchors_as_rows and 'softmax' not in (
                pair.student_activation, pair.teacher_activation):
            num_anchors, pair.background = 1, False
            pair.student, pair.teacher = (
                each.unflatten(0, (num_images, -1)).flatten(1, 2)
                for each in (pair.student, pair.teacher))
        return pair

    def _describe_rows(self, student: nn.Module, path: str) -> str:
        head = student.get_submodule(path)
        columns = class_maps(head)[0].columns
        rows, number = 'locations', columns.number * _anchors(head, 0)[0]
        if path in self._merged:
            rows, number = 'best anchors of locations', columns.num_classes
        elif self.anchors_as_rows or columns.activation == 'softmax':
            rows, number = 'anchors', columns.number
        if reads_text(student):
            number = 'tokens'
        strides = ', '.join(f'{stride:g}' for stride in strides_of(head))
        levels = f' of the strides {strides}' if strides else ''
        return f'{rows} x {number} ({columns.activation}){levels}'


def class_maps(head: nn.Module) -> List[ClassMaps]:
    """All maps of class logits of a dense head."""
    names = loss_call(head, DenseTap.reads).class_arguments
    return [ClassMaps(head, name) for name in names]


def _num_levels(model: nn.Module, path: str) -> int:
    """Number of maps of classes that a head predicts of an image."""
    maps = class_maps(model.get_submodule(path))[0]
    with probed(model, path) as outputs:
        return len(outputs()[maps.position])


def strides_of(head: nn.Module) -> List[float]:
    """The stride of each level in pixels; empty where the head says none."""
    generator = getattr(head, 'prior_generator', None)
    strides = getattr(generator, 'strides', getattr(head, 'strides', ()))
    return [s[0] if isinstance(s, (list, tuple)) else s for s in strides]


def _match_levels(student_head: nn.Module, teacher_head: nn.Module,
                  number: int, teacher_number: int) -> List[int]:
    """For each level of the student, the teacher's level of that stride.

    Levels of heads that do not say their strides (heatmaps) are paired in
    order.
    """
    own, theirs = strides_of(student_head), strides_of(teacher_head)
    if own and theirs:
        return [
            # SOLO has several levels of one stride.
            [i for i, s in enumerate(theirs)
             if s == stride][own[:level].count(stride)]
            for level, stride in enumerate(own)
        ]
    check_alike('predicts classes on {} levels', number, teacher_number)
    return list(range(number))


def _anchors(head: nn.Module, level: int) -> Tuple[int, Optional[Tensor]]:
    """The number of anchors of a location of a level, and their shapes; None
    for points."""
    number = getattr(head, 'num_base_priors', 1)
    if isinstance(number, (list, tuple)):  # SSD's levels differ
        number = number[level]
    boxes = getattr(
        getattr(head, 'prior_generator', None), 'base_anchors', None)
    if boxes is None:
        return number, None
    extent = boxes[level][:, 2:4] - boxes[level][:, :2]
    return number, extent / extent.max()


def _anchors_differ(student_head: nn.Module, teacher_head: nn.Module) -> bool:
    """Whether the anchors of a location do not correspond one to one.

    All may be larger by one factor, as for another octave_base_scale.
    """
    number = len(strides_of(student_head))
    levels = _match_levels(student_head, teacher_head, number, number)
    for level, index in enumerate(levels or [0]):
        own, shapes = _anchors(student_head, level)
        theirs, their_shapes = _anchors(teacher_head, index)
        points = shapes is None or their_shapes is None
        if own != theirs or not (points or torch.allclose(
                shapes, their_shapes, rtol=0.05)):
            return True
    return False
