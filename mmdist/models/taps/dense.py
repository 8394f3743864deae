"""Dense heads: a row is a location of a feature level."""
import inspect
from contextlib import contextmanager
from functools import partial
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple)

import torch
from torch import Tensor, nn

from .base import (LEAST_LOGIT, BoxLogits, Call, LogitPair, LogitTap,
                   activation_of, check_classes, check_tokens, class_logits,
                   reads_text, tensors_in, thresholds_of)
from .columns import (Columns, as_columns_of, class_log_odds,
                      class_probabilities, logits_of)
from .labels import labels_at, objects_of
from .probe import CannotSay, cannot_say, eval_mode, probed
from .teacher_batch import TeacherBatch
from .unread import left_out, unread_layers


class Reading(NamedTuple):
    """What an argument of the loss call of a dense head holds.

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
READINGS = {
    'cls_scores': Reading(),
    'center_heatmap_preds': Reading(probabilities=True,
                                    activation='sigmoid'),  # CenterNet
    'tl_heats': Reading(activation='sigmoid', place=0.),  # CornerNet
    'br_heats': Reading(activation='sigmoid', place=1.),
    'pred_maps': Reading(first_class=5, objectness=4),  # YOLOv3
    'mlvl_cls_preds': Reading()  # SOLO
}


def _no_labels(*_: Any, **__: Any) -> None:
    return None


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
    number, or other shapes), its score for a class is that of its best anchor,
    on either side.

    Args:
        student (nn.Module): The student.
        anchors_as_rows (bool): Read every anchor as a row and the ``C``
            classes as columns. A softmax head is always read so, since its
            probabilities sum to 1 within an anchor.
    """
    method = 'loss_by_feat'
    class_arguments = tuple(READINGS)
    instances = 'the locations of feature levels'

    def __init__(self,
                 student: nn.Module,
                 anchors_as_rows: bool = False) -> None:
        super().__init__(student)
        self.anchors_as_rows = anchors_as_rows
        # Heads whose anchors are not those of the teacher's.
        self.merged: List[str] = []
        # Layers of the teacher's heads that predict other than classes.
        self.unread: Dict[str, Dict[str, int]] = {}

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Dense heads, but for the proposal network: it knows no classes."""
        paths = [
            path for path in super().find(model)
            if 'rpn_head' not in path.split('.')
        ]
        return [] if paths and _only_proposes(model) else paths

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Classes, readings and strides must agree."""
        if len(self.heads) != len(self.teacher_heads):
            raise ValueError(
                f'model.teacher has {len(self.teacher_heads)} dense heads but '
                f'model.student has {len(self.heads)}')
        for path, twin in zip(self.heads, self.teacher_heads):
            head_s = student.get_submodule(path)
            head_t = teacher.get_submodule(twin)
            check_classes(head_s, head_t, self.class_map)
            _check_readings(self.names_of(head_s), self.names_of(head_t))
            _check_strides(_strides(head_s), _strides(head_t))
        self.merged = [
            path for path, twin in zip(self.heads, self.teacher_heads)
            if _anchors_differ(
                student.get_submodule(path), teacher.get_submodule(twin))
        ]

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """Also finds out what the teacher need not compute."""
        super().connect(student, teacher, class_map)
        for path in self.teacher_heads:
            head = teacher.get_submodule(path)
            sides = [Side(head, name) for name in self.names_of(head)]
            self.unread[path] = unread_layers(
                teacher, path, lambda outputs: [
                    tensor for side in sides
                    for tensor in tensors_in(side.read(outputs))
                ])
        for path, twin in zip(self.heads, self.teacher_heads):
            _check_levels(student, path, teacher, twin)

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, A * C, H, W)`` logits a level."""
        twin = self.teacher_heads[self.heads.index(call.path)]
        head_s = student.get_submodule(call.path)
        head_t = teacher.model.get_submodule(twin)
        pairs = []
        for name_s, name_t in zip(
                self.names_of(head_s), self.names_of(head_t)):
            student_side, other = Side(head_s, name_s), Side(head_t, name_t)
            # Where both predict apart whether there is an object, their
            # classes do not say it.
            apart = student_side.objects_apart and other.objects_apart
            thresholds = None if apart else thresholds_of(
                student, call.path, teacher.model, twin)
            # Heads return what their loss call takes, in this order, but
            # only in training: SOLO suppresses neighbours in eval mode.
            outputs = self._outputs(teacher, twin, head_s)
            levels_s = student_side.levels(
                list(call.arguments.values()), other)
            levels_t = other.levels(outputs, student_side)
            indices = _level_indices(head_s, head_t, len(levels_s),
                                     len(levels_t))
            pairs += [
                self._level_pair(maps, levels_t[level], student_side, other,
                                 f'level {i} of {name_s}', call.path
                                 in self.merged,
                                 partial(_labels, student_side, teacher,
                                         i), thresholds)
                for i, (maps, level) in enumerate(zip(levels_s, indices))
            ]
        return pairs

    def _outputs(self, teacher: TeacherBatch, path: str,
                 head_s: nn.Module) -> Any:
        """What a head of the teacher returns where a student's stands."""
        head = teacher.model.get_submodule(path)
        return teacher.head_outputs(
            [path], head_s.training,
            lambda _: left_out(head, self.unread[path]))[path]

    def _level_pair(
            self,
            maps_s: Tensor,
            maps_t: Tensor,
            student: 'Side',
            teacher: 'Side',
            name: str,
            merged: bool,
            labels_of: Callable = _no_labels,
            thresholds: Optional[Tuple[float, float]] = None) -> LogitPair:
        if maps_s.shape[3:] != maps_t.shape[3:]:
            raise ValueError(
                f'{name} of model.student has {tuple(maps_s.shape[3:])} '
                f'locations but of model.teacher {tuple(maps_t.shape[3:])}; '
                'give both heads the same strides or num_grids, and set '
                "pad_size_divisor of model.student's data_preprocessor to the "
                'largest stride')
        maps_s, maps_t = _spoken(maps_s, maps_t, student.text_masks)
        activation_s = activation_t = student.columns.activation
        if merged:
            maps_s, maps_t = student.best(maps_s), teacher.best(maps_t)
            if self.class_map is not None:
                maps_t = maps_t[:, :, self.class_map]
            activation_s = activation_t = 'sigmoid'
        else:
            maps_t, activation_t = as_columns_of(student.columns,
                                                 teacher.columns,
                                                 maps_t.flatten(0, 1),
                                                 self.class_map)
            maps_t = maps_t.view_as(maps_s)
        softmax = 'softmax' in (activation_s, activation_t)
        # The probabilities of a softmax sum to 1 within an anchor.
        merge = (0, 1) if self.anchors_as_rows or softmax else (1, 2)
        labels_of = partial(labels_of, maps_s.shape, merge == (0, 1))
        return LogitPair(
            student=maps_s.flatten(*merge),
            teacher=maps_t.flatten(*merge),
            student_activation=activation_s,
            teacher_activation=activation_t,
            name=name,
            num_classes=student.num_classes,
            labels=labels_of,
            areas=partial(labels_of, areas=True),
            background=student.columns.background and not merged
            and merge == (0, 1),
            thresholds=thresholds)

    def _rows_are_anchors(self, columns: Columns) -> bool:
        return self.anchors_as_rows or columns.activation == 'softmax'

    @classmethod
    def predicts_boxes(cls, head: nn.Module) -> bool:
        """Heads that decode a box at every location."""
        return cls.names_of(head) == ['cls_scores'] and Side(
            head, 'cls_scores').position == 0

    def own_boxes(self, call: Call, head: nn.Module, num_boxes: int,
                  teacher: TeacherBatch) -> BoxLogits:
        """The highest-scoring decoded boxes; their logits have a gradient."""
        side = Side(head, self.names_of(head)[0])
        with torch.no_grad(), eval_mode(head), _decoding(head):
            # Some decode what they predict in training otherwise (FCOS).
            outputs = head(**call.given)
            boxes = decoded_boxes(side, outputs,
                                  call.arguments['batch_img_metas'])
        rows = side.rows(list(call.arguments.values()))
        best = [
            class_probabilities(table.detach(), side.columns).amax(1).topk(
                min(num_boxes, len(table))).indices for table in rows
        ]
        return BoxLogits([b[i] for b, i in zip(boxes, best)],
                         [t[i] for t, i in zip(rows, best)], side.columns)

    @classmethod
    def answer_boxes(
        cls, teacher: TeacherBatch, heads: List[str], own: BoxLogits,
        call: Call, class_map: Optional[List[int]]
    ) -> Tuple[List[Tensor], List[Tensor], Columns]:
        """The location whose decoded box overlaps most with each box."""
        head = teacher.model.get_submodule(heads[0])
        side = Side(head, cls.names_of(head)[0])
        with _decoding(head):
            outputs = teacher.head_outputs(heads[:1])[heads[0]]
            metas = [sample.metainfo for sample in teacher.samples]
            decoded = decoded_boxes(side, outputs, metas)
        kept, logits = [], []
        for boxes, theirs, table in zip(own.boxes, decoded,
                                        side.rows(outputs)):
            best = _best_overlap(boxes, theirs)
            kept.append(torch.arange(len(boxes), device=boxes.device))
            logits.append(table[best])
        return kept, logits, side.columns

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``locations x 720 (sigmoid) of the strides 8, 16, 32``."""
        head = student.get_submodule(self.heads[0])
        columns = Side(head, self.names_of(head)[0]).columns
        rows, number = 'anchors', columns.number
        if self.heads[0] in self.merged:
            rows, number = 'best anchors of locations', columns.num_classes
        elif not self._rows_are_anchors(columns):
            rows, number = 'locations', columns.number * _num_anchors(head, 0)
        if reads_text(student):
            number = 'tokens'
        strides = _strides(head)
        levels = f' of the strides {_in_words(strides)}' if strides else ''
        return (f'{rows} x {number} ({columns.activation}){levels}, '
                f'{self.heads[0]} <- {self.teacher_heads[0]}')


class Side:
    """One head and one argument of its loss call.

    Args:
        head (nn.Module): Of the student or the teacher.
        name (str): The argument, a key of ``READINGS``.
    """

    def __init__(self, head: nn.Module, name: str) -> None:
        self.head, self.name = head, name
        self.reading = READINGS[name]
        activation = self.reading.activation or activation_of(head)
        number = getattr(head, 'cls_out_channels', head.num_classes)
        self.columns = Columns(head.num_classes, activation, number
                               > head.num_classes)

    @property
    def text_masks(self) -> Optional[Tensor]:
        """Which tokens a head of a text was given, ``(N, T)``."""
        return getattr(self.head, 'text_masks', None)

    @property
    def num_classes(self) -> int:
        """The classes that columns stand for; 0 if they are of tokens."""
        return self.columns.num_classes if self.text_masks is None else 0

    @property
    def position(self) -> int:
        """The position of the argument in the loss call."""
        return self._names.index(self.name)

    @property
    def objects_apart(self) -> bool:
        """Whether the head predicts that there is an object by itself."""
        return (self.reading.objectness is not None
                or OBJECTNESS in self._names)

    def read(self, outputs: Sequence[Any]) -> List[Any]:
        """Those of a head's outputs that :meth:`levels` reads."""
        names = {self.name, OBJECTNESS} & set(self._names)
        return [outputs[self._names.index(name)] for name in names]

    @property
    def _names(self) -> List[str]:
        return list(inspect.signature(self.head.loss_by_feat).parameters)

    def levels(self,
               outputs: Sequence[Any],
               beside: Optional['Side'] = None) -> List[Tensor]:
        """The logits of each level, ``(N, A, C, H, W)``.

        Args:
            outputs (Sequence): What the loss call takes, in its order.
            beside (Side, optional): The head that is compared with this one;
                None asks for what a prediction is made of.
        """
        scores = outputs[self.position]
        maps = [self.maps(level) for level in scores]
        given_objects = beside is not None and beside.objects_apart
        if not self.objects_apart or given_objects:
            return maps
        if self.reading.objectness is not None:
            objects = [
                self._anchors(s)[:, :, self.reading.objectness, None]
                for s in scores
            ]
        else:
            objects = [
                o.unsqueeze(2) for o in outputs[self._names.index(OBJECTNESS)]
            ]
        return [
            logits_of(m.sigmoid() * o.sigmoid())
            for m, o in zip(maps, objects)
        ]

    def _anchors(self, scores: Tensor) -> Tensor:
        """``(N, A * K, H, W)`` -> ``(N, A, K, H, W)``."""
        size = self.reading.first_class + self.columns.number
        return scores.unflatten(1, (-1, size))

    def maps(self, scores: Tensor) -> Tensor:
        """The class logits of a level, ``(N, A, C, H, W)``.

        Of a head that classifies tokens of a text (GLIP), ``(N, 1, T, L, 1)``
        with all anchors of all locations in one row.
        """
        if scores.dim() == 3:
            return scores.transpose(1, 2)[:, None, ..., None]
        if self.reading.probabilities:
            scores = logits_of(scores)
        else:
            scores = class_logits(scores, self.head)
        return self._anchors(scores)[:, :, self.reading.first_class:]

    def rows(self, outputs: Sequence[Any]) -> List[Tensor]:
        """The logits of a picture's anchors, ``(L, C)``, level by level,
        row by row, anchor by anchor; as :meth:`levels` of a prediction."""
        tables = [
            level.permute(0, 3, 4, 1, 2).flatten(1, 3)
            for level in self.levels(outputs)
        ]
        return list(torch.cat(tables, dim=1))

    def best(self, maps: Tensor) -> Tensor:
        """The highest score of a location's anchors, ``(N, 1, C, H, W)``."""
        num_images = len(maps)
        odds = class_log_odds(maps.flatten(0, 1), self.columns)
        return odds.unflatten(0, (num_images, -1)).amax(1, keepdim=True)


@torch.no_grad()
def decoded_boxes(side: Side, outputs: Sequence[Any],
                  metas: Sequence[dict]) -> List[Tensor]:
    """The box of every anchor of every location, as the head predicts them.

    Args:
        side (Side): A head and its class logits.
        outputs (Sequence): What its ``forward`` returns in eval mode.
        metas (Sequence[dict]): Of the pictures.

    Returns:
        list[Tensor]: ``(L, 4)`` a picture, in the order of ``Side.rows``.

    Raises:
        ValueError: If the head does not predict a box for each.
    """
    from mmengine.config import ConfigDict
    levels = [_in_order(scores, side) for scores in outputs[side.position]]
    keep_all = dict(score_thr=0., min_bbox_size=-1, nms_pre=10**9)
    results = side.head.predict_by_feat(
        levels,
        *outputs[1:],
        batch_img_metas=metas,
        cfg=ConfigDict({
            **(side.head.test_cfg or {}),
            **keep_all
        }),
        rescale=False,
        with_nms=False)
    boxes = [result.bboxes for result in results]
    number = sum(level[0].numel() for level in levels) // side.columns.number
    if any(len(b) != number for b in boxes):
        raise ValueError(
            f"model.tap has align='boxes', but {type(side.head).__name__} "
            'does not predict a box at every location; choose another model')
    return boxes


def _in_order(scores: Tensor, side: Side) -> Tensor:
    """Scores by which a prediction keeps every anchor once, in order.

    Predictions keep the classes above a threshold, highest first: here the
    first class of each anchor is, and decreases from anchor to anchor.
    """
    num_images, channels, height, width = scores.shape
    number = channels * height * width // side.columns.number
    table = scores.new_full((number, side.columns.number), -1e4).float()
    table[:, 0] = torch.linspace(3, -3, number, device=scores.device)
    if side.columns.background:
        table[:, -1] = 0
    if getattr(getattr(side.head, 'loss_cls', None), 'activated', False):
        table = table.sigmoid()
    return table.view(height, width,
                      channels).permute(2, 0,
                                        1).expand(num_images, -1, -1, -1)


@contextmanager
def _decoding(head: nn.Module) -> Iterator[None]:
    """Say so if a head predicts its boxes in a way of its own."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"model.tap has align='boxes', but the boxes of a "
            f'{type(head).__name__} cannot be decoded location by location '
            f'({type(error).__name__}: {error}); choose another model'
        ) from error


def _best_overlap(boxes: Tensor, others: Tensor) -> Tensor:
    """For each of some boxes, which of others overlaps most."""
    from mmdet.structures.bbox import bbox_overlaps

    # A picture may have 200,000 locations.
    best = [bbox_overlaps(b, others).argmax(1) for b in boxes.split(32)]
    return torch.cat(best) if best else boxes.new_zeros(0, dtype=torch.long)


def _spoken(maps_s: Tensor, maps_t: Tensor,
            masks: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Logits of the tokens that the captions of a batch have.

    What is no head of a text has none to leave out.
    """
    if masks is None:
        return maps_s, maps_t
    check_tokens(maps_s.shape[2], maps_t.shape[2])
    spoken = masks.bool()
    padding = ~spoken[:, None, :, None, None]
    maps_s, maps_t = (
        maps.masked_fill(padding, LEAST_LOGIT)[:, :, spoken.any(0)]
        for maps in (maps_s, maps_t))
    return maps_s, maps_t


def _labels(side: Side,
            teacher: TeacherBatch,
            level: int,
            shape: Sequence[int],
            anchors_are_rows: bool,
            areas: bool = False) -> Optional[Tensor]:
    """Labels of the rows of a level of shape ``(N, A, C, H, W)``."""
    objects = objects_of(teacher.samples, areas)
    if objects is None or len(objects) != shape[0] or len(shape) < 5:
        return None
    labels = labels_at(objects, tuple(shape[3:]), _strides(side.head), level,
                       side.reading.place)
    if anchors_are_rows:
        labels = labels.repeat_interleave(shape[1], dim=0)
    return labels


def _only_proposes(model: nn.Module) -> bool:
    """Whether the model is an RPN alone, which calls its head bbox_head."""
    from mmdet.models.detectors import RPN
    return isinstance(model, RPN)


def _check_readings(names_s: List[str], names_t: List[str]) -> None:
    """Raise ValueError unless both sides predict as many maps of classes."""
    if len(names_s) != len(names_t):
        raise ValueError(
            f'model.teacher predicts classes as {" and ".join(names_t)} but '
            f'model.student as {" and ".join(names_s)}; choose a teacher with '
            "the student's kind of head")


def _check_strides(strides_s: List, strides_t: List) -> None:
    missing = set(strides_s) - set(strides_t) if strides_t else ()
    if missing:
        raise ValueError(
            f'model.student has feature levels of the strides {strides_s} but '
            f'model.teacher of {strides_t}: nothing pairs with '
            f'{sorted(missing)}; choose a teacher with these strides, or '
            "change the neck and strides of the student's head")


def _check_levels(student: nn.Module, path: str, teacher: nn.Module,
                  twin: str) -> None:
    """Levels that are paired in order must be as many.

    How many a head without strides has, only a picture shows.
    """
    head_s, head_t = student.get_submodule(path), teacher.get_submodule(twin)
    if _strides(head_s) and _strides(head_t):
        return
    try:
        numbers = [_num_levels(student, path), _num_levels(teacher, twin)]
    except CannotSay:
        return  # the first iteration says it
    _level_indices(head_s, head_t, *numbers)


@torch.no_grad()
def _num_levels(model: nn.Module, path: str) -> int:
    """How many maps of classes a head predicts of a picture."""
    head = model.get_submodule(path)
    side = Side(head, DenseTap.names_of(head)[0])
    with probed(model, path) as outputs, cannot_say():
        return len(outputs()[side.position])


def _num_anchors(head: nn.Module, level: int) -> int:
    """Anchors a location of a level; SSD's levels differ."""
    anchors = getattr(head, 'num_base_priors', 1)
    return anchors[level] if isinstance(anchors, (list, tuple)) else anchors


def _anchors_differ(head_s: nn.Module, head_t: nn.Module) -> bool:
    """Whether the anchors of a location do not correspond one to one."""
    generators = [
        getattr(head, 'prior_generator', None) for head in (head_s, head_t)
    ]
    strides = _strides(head_s)
    levels = _level_indices(head_s, head_t, len(strides), len(strides))
    return any(
        _num_anchors(head_s, i) != _num_anchors(head_t, level)
        or not _same_shapes(*generators, i, level)
        for i, level in enumerate(levels or [0]))


def _same_shapes(generator_s: Optional[Any], generator_t: Optional[Any],
                 level_s: int, level_t: int) -> bool:
    """Whether the anchors of a location have like shapes, in one order.

    All may be larger by one factor, as for another octave_base_scale.
    """
    sides = []
    for generator, level in ((generator_s, level_s), (generator_t, level_t)):
        if not hasattr(generator, 'base_anchors'):
            return True  # points
        boxes = generator.base_anchors[level]
        extent = boxes[:, 2:4] - boxes[:, :2]
        sides.append(extent / extent.max())
    return torch.allclose(*sides, rtol=0.05)


def _in_words(numbers: List) -> str:
    return ', '.join(f'{number:g}' for number in numbers)


def _strides(head: nn.Module) -> List:
    """The stride of each level in pixels; empty where the head says none."""
    generator = getattr(head, 'prior_generator', None)
    strides = getattr(generator, 'strides', getattr(head, 'strides', ()))
    return [s[0] if isinstance(s, (list, tuple)) else s for s in strides]


def _level_indices(head_s: nn.Module, head_t: nn.Module, num_student: int,
                   num_teacher: int) -> List[int]:
    """For each level of the student, the teacher's level of that stride.

    Levels of heads that do not say their strides (heatmaps) are paired in
    order.
    """
    strides_s, strides_t = _strides(head_s), _strides(head_t)
    if strides_s and strides_t:
        return [
            # SOLO has several levels of one stride.
            [i for i, s in enumerate(strides_t)
             if s == stride][strides_s[:level].count(stride)]
            for level, stride in enumerate(strides_s)
        ]
    if num_student != num_teacher:
        raise ValueError(
            f'model.teacher predicts classes on {num_teacher} levels but '
            f'model.student has {num_student}; choose a teacher with as many')
    return list(range(num_student))
