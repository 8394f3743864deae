"""Dense heads: a row is a location of a feature level."""
import inspect
from dataclasses import replace
from typing import (TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional,
                    Sequence)

import torch
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from .base import LogitPair, LogitTap, pair_of
from .columns import (ClassLogits, Columns, activation_of, class_log_odds,
                      class_logits, logits_of)
from .labels import Objects, labels_at, object_labels
from .probe import CannotSay, cannot_say, probed
from .text import common_tokens, reads_text
from .unread import left_out, unread_layers
from .watch import Call, LossCall, loss_call, tensors_in

if TYPE_CHECKING:
    from ..teacher.batch import TeacherBatch


class Layout(NamedTuple):
    """Contents of an argument of the loss call of a dense head.

    Attributes:
        probabilities (bool): Sigmoid probabilities instead of logits.
        first_class (int): Channels of an anchor before its classes.
        activation (str, optional): Where the head's loss does not say it.
        objectness (int, optional): The channel of an anchor that says
            whether there is an object.
        place (float): Where an object is, 0.5 for the centre of its box and 0
            for the left top corner.
    """
    probabilities: bool = False
    first_class: int = 0
    activation: Optional[str] = None
    objectness: Optional[int] = None
    place: float = 0.5


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
    """The maps of class logits that a dense head predicts.

    Args:
        head (nn.Module): Of the student or the teacher.
        name (str): An argument of its loss call, a key of ``LAYOUTS``.
    """

    def __init__(self, head: nn.Module, name: str) -> None:
        self.head, self.name, self.layout = head, name, LAYOUTS[name]
        # Heads return what their loss call takes, in this order.
        self.names = list(inspect.signature(head.loss_by_feat).parameters)
        self.position = self.names.index(name)
        self.columns = Columns(
            head.num_classes, self.layout.activation or activation_of(head),
            getattr(head, 'cls_out_channels', head.num_classes)
            > head.num_classes)
        # Some predict classes given that there is an object, and that apart.
        self.objects_apart = (
            self.layout.objectness is not None or OBJECTNESS in self.names)

    def read(self, outputs: Sequence[Any]) -> List[Tensor]:
        """The tensors among a head's outputs that :meth:`levels` reads."""
        names = {self.name, OBJECTNESS} & set(self.names)
        return list(
            tensors_in([outputs[self.names.index(name)] for name in names]))

    def levels(self,
               outputs: Sequence[Any],
               given_object: bool = False) -> List[Tensor]:
        """The logits of each level, ``(N, A, C, H, W)``.

        Of a head that classifies tokens of a text (GLIP), ``(N, 1, T, L, 1)``
        with all anchors of all locations in one row.

        Args:
            outputs (Sequence): What the loss call takes, in its order.
            given_object (bool): Leave the probability of an object out, where
                the head predicts it apart.
        """
        levels = []
        for i, scores in enumerate(outputs[self.position]):
            if scores.dim() == 3:
                levels.append(scores.transpose(1, 2)[:, None, ..., None])
                continue
            if self.layout.probabilities:
                logits = logits_of(scores)
            else:
                logits = class_logits(scores, self.head)
            maps = self._by_anchor(logits)[:, :, self.layout.first_class:]
            if self.objects_apart and not given_object:
                if self.layout.objectness is not None:
                    objects = self._by_anchor(scores)[:, :,
                                                      self.layout.objectness,
                                                      None]
                else:
                    objects = outputs[self.names.index(OBJECTNESS)][i]
                    objects = objects.unsqueeze(2)
                maps = logits_of(maps.sigmoid() * objects.sigmoid())
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

    def best(self, maps: Tensor) -> Tensor:
        """The highest score of a location's anchors, ``(N, 1, C, H, W)``."""
        odds = class_log_odds(maps.flatten(0, 1), self.columns)
        return odds.unflatten(0, (len(maps), -1)).amax(1, keepdim=True)


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

    def _check_heads(self, head_s: nn.Module, head_t: nn.Module) -> None:
        names_s, names_t = ([maps.name for maps in class_maps(head)]
                            for head in (head_s, head_t))
        if len(names_s) != len(names_t):
            raise ConfigError(
                'model.teacher.config',
                f'it predicts classes as {" and ".join(names_t)} but '
                f'model.student as {" and ".join(names_s)}',
                "choose a teacher with the student's kind of head")
        strides_s, strides_t = strides_of(head_s), strides_of(head_t)
        missing = set(strides_s) - set(strides_t) if strides_t else ()
        if missing:
            raise ConfigError(
                'model.teacher.config',
                f'its feature levels have the strides {strides_t} but those '
                f'of model.student {strides_s}: nothing pairs with '
                f'{sorted(missing)}', 'choose a teacher with these strides, '
                "or change the neck and strides of the student's head")

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """Also find out whether anchors correspond, and what the teacher
        need not compute."""
        super().connect(student, teacher, class_map)
        self._merged = []
        for path, twin in self.heads.items():
            head_s = student.get_submodule(path)
            head_t = teacher.get_submodule(twin)
            if _anchors_differ(head_s, head_t):
                self._merged.append(path)
            every = class_maps(head_t)
            self._unread[twin] = unread_layers(
                teacher,
                twin,
                lambda outputs, every=every:
                [t for maps in every for t in maps.read(outputs)])
            if not (strides_of(head_s) and strides_of(head_t)):
                # How many levels a head has then, only an image shows.
                try:
                    numbers = [
                        _num_levels(student, path),
                        _num_levels(teacher, twin)
                    ]
                except CannotSay:
                    continue  # the first iteration says it
                _match_levels(head_s, head_t, *numbers)

    def pairs(self, call: Call, batch: 'TeacherBatch') -> List[LogitPair]:
        """One pair of ``(N, A * C, H, W)`` logits for each level."""
        twin = self.heads[call.path]
        head_s = call.head
        head_t = batch.model.get_submodule(twin)
        outputs_s = list(call.arguments.values())
        # SOLO suppresses neighbours in eval mode.
        outputs_t = batch.head_outputs(
            [twin], head_s.training,
            lambda _: left_out(head_t, self._unread[twin]))[twin]
        pairs = []
        for maps_s, maps_t in zip(class_maps(head_s), class_maps(head_t)):
            # Where both predict objects apart, their classes do not say
            # whether there is one.
            apart = maps_s.objects_apart and maps_t.objects_apart
            levels_s = maps_s.levels(outputs_s, given_object=apart)
            levels_t = maps_t.levels(outputs_t, given_object=apart)
            indices = _match_levels(head_s, head_t, len(levels_s),
                                    len(levels_t))
            for i, index in enumerate(indices):
                pair = self._pair_level(call, batch, maps_s, maps_t, i,
                                        levels_s[i], levels_t[index])
                if apart:
                    pair.thresholds = None
                pairs.append(pair)
        return pairs

    def _pair_level(self, call: Call, batch: 'TeacherBatch', maps_s: ClassMaps,
                    maps_t: ClassMaps, level: int, logits_s: Tensor,
                    logits_t: Tensor) -> LogitPair:
        """The pair of two maps ``(N, A, C, H, W)``."""
        name = f'level {level} of {maps_s.name}'
        grid = tuple(logits_s.shape[3:])
        if logits_t.shape[3:] != grid:
            raise ConfigError(
                'model.student.data_preprocessor.pad_size_divisor',
                f'{name} has {grid} locations but {tuple(logits_t.shape[3:])} '
                'in model.teacher', 'set it to the largest stride, and give '
                'both heads the same strides or num_grids')
        others: Dict[str, Any] = {}
        masks = getattr(maps_s.head, 'text_masks', None)
        if masks is not None:  # of the tokens of each caption
            logits_s, logits_t = common_tokens(
                logits_s, logits_t, 2,
                masks.bool()[:, None, :, None, None])
            others['num_classes'] = 0
        columns_s, columns_t = maps_s.columns, maps_t.columns
        if call.path in self._merged:
            logits_s, logits_t = maps_s.best(logits_s), maps_t.best(logits_t)
            columns_s = Columns(columns_s.num_classes, 'sigmoid')
            columns_t = Columns(columns_t.num_classes, 'sigmoid')
        num_images, num_anchors = logits_s.shape[:2]
        pair = pair_of(
            self,
            call,
            batch,
            ClassLogits(logits_s.flatten(0, 1), columns_s),
            ClassLogits(logits_t.flatten(0, 1), columns_t),
            name=name,
            **others)
        # The probabilities of a softmax sum to 1 within an anchor.
        by_anchor = self.anchors_as_rows or 'softmax' in (
            pair.student_activation, pair.teacher_activation)
        if not by_anchor:
            pair.student, pair.teacher = (
                logits.unflatten(0, (num_images, -1)).flatten(1, 2)
                for logits in (pair.student, pair.teacher))
            pair.background = False

        def assign(objects: Sequence[Objects]) -> Tensor:
            labels = labels_at(objects, grid, strides_of(maps_s.head), level,
                               maps_s.layout.place)
            return labels.repeat_interleave(
                num_anchors if by_anchor else 1, dim=0)

        return replace(pair, **object_labels(batch, num_images, assign))

    def _describe_rows(self, student: nn.Module) -> str:
        path = next(iter(self.heads))
        head = student.get_submodule(path)
        columns = class_maps(head)[0].columns
        if path in self._merged:
            rows, number = 'best anchors of locations', columns.num_classes
        elif self.anchors_as_rows or columns.activation == 'softmax':
            rows, number = 'anchors', columns.number
        else:
            rows, number = 'locations', columns.number * _num_anchors(head, 0)
        if reads_text(student):
            number = 'tokens'
        strides = ', '.join(f'{stride:g}' for stride in strides_of(head))
        levels = f' of the strides {strides}' if strides else ''
        return f'{rows} x {number} ({columns.activation}){levels}'


def class_maps(head: nn.Module) -> List[ClassMaps]:
    """All maps of class logits of a dense head."""
    names = loss_call(head, DenseTap.reads).class_arguments
    return [ClassMaps(head, name) for name in names]


@torch.no_grad()
def _num_levels(model: nn.Module, path: str) -> int:
    """Number of maps of classes that a head predicts of an image."""
    maps = class_maps(model.get_submodule(path))[0]
    with probed(model, path) as outputs, cannot_say():
        return len(outputs()[maps.position])


def strides_of(head: nn.Module) -> List[float]:
    """The stride of each level in pixels; empty where the head says none."""
    generator = getattr(head, 'prior_generator', None)
    strides = getattr(generator, 'strides', getattr(head, 'strides', ()))
    return [s[0] if isinstance(s, (list, tuple)) else s for s in strides]


def _match_levels(head_s: nn.Module, head_t: nn.Module, number_s: int,
                  number_t: int) -> List[int]:
    """For each level of the student, the teacher's level of that stride.

    Levels of heads that do not say their strides (heatmaps) are paired in
    order.
    """
    strides_s, strides_t = strides_of(head_s), strides_of(head_t)
    if strides_s and strides_t:
        return [
            # SOLO has several levels of one stride.
            [i for i, s in enumerate(strides_t)
             if s == stride][strides_s[:level].count(stride)]
            for level, stride in enumerate(strides_s)
        ]
    if number_s != number_t:
        raise ConfigError(
            'model.teacher.config', f'it predicts classes on {number_t} '
            f'levels but model.student has {number_s}',
            'choose a teacher with as many')
    return list(range(number_s))


def _num_anchors(head: nn.Module, level: int) -> int:
    """Anchors of a location of a level; SSD's levels differ."""
    anchors = getattr(head, 'num_base_priors', 1)
    return anchors[level] if isinstance(anchors, (list, tuple)) else anchors


def _anchors_differ(head_s: nn.Module, head_t: nn.Module) -> bool:
    """Whether the anchors of a location do not correspond one to one.

    All may be larger by one factor, as for another octave_base_scale.
    """
    strides = strides_of(head_s)
    levels = _match_levels(head_s, head_t, len(strides), len(strides))
    for level_s, level_t in enumerate(levels or [0]):
        if _num_anchors(head_s, level_s) != _num_anchors(head_t, level_t):
            return True
        shapes = []
        for head, level in ((head_s, level_s), (head_t, level_t)):
            generator = getattr(head, 'prior_generator', None)
            if hasattr(generator, 'base_anchors'):  # otherwise points
                boxes = generator.base_anchors[level]
                extent = boxes[:, 2:4] - boxes[:, :2]
                shapes.append(extent / extent.max())
        if len(shapes) == 2 and not torch.allclose(*shapes, rtol=0.05):
            return True
    return False
