"""Teachers of another family: a row is a box, whoever predicted it."""
from functools import partial
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from mmengine.config import ConfigDict
from torch import Tensor, nn

from mmdist.errors import ConfigError
from .base import LogitPair, LogitTap, find_tap, pair_of
from .batch import TeacherBatch
from .columns import ClassLogits, Columns, class_probabilities
from .dense import ClassMaps, DenseTap, class_maps
from .labels import labels_of_boxes, object_labels
from .matching import Queries, match_queries
from .probe import eval_mode
from .query import QueryTap, are_boxes, student_queries, teacher_queries
from .roi import RoITap, roi_logits, score_rois, stage_weight
from .watch import Call


class Boxes(NamedTuple):
    """Boxes of a student and the class logits that belong to them."""
    boxes: List[Tensor]  # (R, 4) per image, corners in pixels, no gradient
    logits: List[Tensor]  # (R, C) per image
    columns: Columns


# The student's boxes that the teacher has an answer for, and the answers.
Answer = Tuple[Boxes, ClassLogits]


class BoxTap(LogitTap):
    """Asks both models for the classes of the student's own boxes.

    They are the RoIs that a two-stage student sampled, the ``num_boxes`` boxes
    of an image that a dense student scores highest, with the logits of their
    locations, or the boxes of a student's queries. The teacher answers by its
    kind: a RoI head scores the boxes, of a cascade in its first stage; a
    dense head answers with the location whose decoded box overlaps most; of
    queries, each box gets one by the cheapest assignment.

    Args:
        student (nn.Module): The student.
        num_boxes (int): Boxes of an image of a dense student.
    """
    rows = 'boxes'

    def __init__(self, student: nn.Module, num_boxes: int = 256) -> None:
        if type(num_boxes) is not int or num_boxes < 1:
            raise ConfigError(
                'model.tap.num_boxes', 'it must be a whole number of at least '
                f'1, but is {num_boxes!r}')
        # The tap that would read the student without align='boxes'.
        self._own = find_tap(student)(student)
        self.reads, self.num_boxes = self._own.reads, num_boxes
        super().__init__(student)
        self._asks: Any = None  # the class that reads the student's boxes
        self._answers: Any = None  # the class that answers for the teacher

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """The heads that the model's own kind of tap reads."""
        tap = find_tap(model)
        return tap.find(model) if tap else []

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        self._asks = _source(student, list(self.heads), 'model.student')
        self._answers = _source(teacher, found, 'model.teacher.config')
        return dict.fromkeys(self.heads, found[0])

    def _check_images(self, calls: List[Call], batch: TeacherBatch) -> None:
        if self._asks is not RoIBoxes:
            super()._check_images(calls, batch)

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(boxes, C)`` logits."""
        own, theirs = self._answers.answer(
            self, call, batch, self._asks.own(call, self.num_boxes, batch))
        labels = object_labels(batch, len(own.boxes),
                               partial(labels_of_boxes, boxes=own.boxes))
        pair = pair_of(self, call, batch, (torch.cat(own.logits), own.columns),
                       theirs, **labels)
        pair.name = f'boxes of {call.path}'
        if self._asks is RoIBoxes:
            pair.weight = stage_weight(call)
        return [pair]

    def is_classification_loss(self, name: str) -> bool:
        """Ask the tap that reads the student without align='boxes'."""
        return self._own.is_classification_loss(name)


class RoIBoxes:
    """Boxes of RoI heads."""

    @staticmethod
    def own(call: Call, num_boxes: int, batch: TeacherBatch) -> Boxes:
        """The sampled RoIs."""
        rois = call.arguments['rois'].detach()
        table, columns = roi_logits(call.arguments['cls_score'], call.head)
        num_images = len(call.images)
        images = [rois[:, 0] % num_images == i for i in range(num_images)]
        return Boxes([rois[i, 1:] for i in images], [table[i] for i in images],
                     columns)

    @staticmethod
    def answer(tap: BoxTap, call: Call, batch: TeacherBatch,
               own: Boxes) -> Answer:
        """The scores of the boxes as RoIs."""
        from mmdet.structures.bbox import bbox2roi

        # An untrained student may predict boxes inside out.
        rois = bbox2roi([
            torch.cat([b[:, :2], b[:, 2:].maximum(b[:, :2])], dim=1)
            for b in own.boxes
        ])
        return own, score_rois(batch, tap.heads[call.path], call.images, rois)


class DenseBoxes:
    """Boxes that dense heads decode at every location."""

    @staticmethod
    def own(call: Call, num_boxes: int, batch: TeacherBatch) -> Boxes:
        """The highest-scoring decoded boxes; their logits have a gradient."""
        head = call.head
        maps, = class_maps(head)
        with torch.no_grad(), eval_mode(head):
            # Some decode what they predict in training otherwise (FCOS).
            boxes = decoded_boxes(maps, head(**call.given),
                                  call.arguments['batch_img_metas'])
        rows = maps.rows(list(call.arguments.values()))
        best = [
            class_probabilities(table.detach(), maps.columns).amax(1).topk(
                min(num_boxes, len(table))).indices for table in rows
        ]
        return Boxes([b[i] for b, i in zip(boxes, best)],
                     [t[i] for t, i in zip(rows, best)], maps.columns)

    @staticmethod
    def answer(tap: BoxTap, call: Call, batch: TeacherBatch,
               own: Boxes) -> Answer:
        """The location whose decoded box overlaps most with each box."""
        from mmdet.structures.bbox import bbox_overlaps
        path = tap.heads[call.path]
        head = batch.model.get_submodule(path)
        maps, = class_maps(head)
        outputs = batch.head_outputs([path])[path]
        metas = [sample.metainfo for sample in batch.samples]
        decoded = decoded_boxes(maps, outputs, metas)
        logits = []
        for boxes, theirs, table in zip(own.boxes, decoded,
                                        maps.rows(outputs)):
            # An image may have 200,000 locations.
            best = [
                bbox_overlaps(b, theirs).argmax(1) for b in boxes.split(32)
            ]
            logits.append(table[torch.cat(best)] if best else table[:0])
        return own, (torch.cat(logits), maps.columns)


class QueryBoxes:
    """Boxes of queries."""

    @staticmethod
    def own(call: Call, num_boxes: int, batch: TeacherBatch) -> Boxes:
        """The boxes of all queries."""
        from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
        queries = student_queries(call)
        boxes = bbox_cxcywh_to_xyxy(queries.boxes.detach())
        boxes = boxes * batch.image_sizes()[:, None]
        return Boxes(list(boxes), list(queries.logits), queries.columns)

    @staticmethod
    def answer(tap: BoxTap, call: Call, batch: TeacherBatch,
               own: Boxes) -> Answer:
        """The query of the least cost for each box.

        They are assigned one to one where the boxes are a student's queries;
        of RoIs and locations many are of one object.
        """
        from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
        queries = teacher_queries(batch, tap.heads[call.path])
        kept, logits = Boxes([], [], own.columns), []
        for i, size in enumerate(batch.image_sizes()):
            boxes = bbox_xyxy_to_cxcywh(own.boxes[i] / size)
            (index, match), = match_queries(
                Queries(own.logits[i][None], own.columns, boxes[None]),
                queries.of_image(slice(i, i + 1)), tap.class_map, tap._asks
                is QueryBoxes)
            kept.boxes.append(own.boxes[i][index])
            kept.logits.append(own.logits[i][index])
            logits.append(queries.logits[i][match])
        return kept, (torch.cat(logits), queries.columns)


def _source(model: nn.Module, heads: Sequence[str], field: str) -> Any:
    """The class that reads a model's boxes."""
    kind, head = find_tap(model), model.get_submodule(heads[-1])
    if issubclass(kind, RoITap):
        return RoIBoxes
    if issubclass(kind, QueryTap) and are_boxes(head):
        return QueryBoxes
    if issubclass(kind, DenseTap):
        maps = class_maps(head)
        if maps[0].position == 0 and [m.name for m in maps] == ['cls_scores']:
            return DenseBoxes
    raise ConfigError(
        field, f'it is a {type(model).__name__}, whose boxes cannot be read, '
        "but model.tap has align='boxes'",
        'choose a two-stage detector, a dense one whose head takes '
        '`cls_scores` first, or one with queries of boxes')


@torch.no_grad()
def decoded_boxes(maps: ClassMaps, outputs: Sequence[Any],
                  metas: Sequence[dict]) -> List[Tensor]:
    """The box of every anchor of every location, as the head predicts them.

    Predictions keep the classes above a threshold, highest first. So the head
    is given made-up scores in which the first class of each anchor is above
    it, and decreases from anchor to anchor.

    Returns:
        list[Tensor]: ``(L, 4)`` for each image, as ``ClassMaps.rows``.
    """
    head, columns = maps.head, maps.columns
    levels, number_of_boxes = [], 0
    for scores in outputs[maps.position]:
        num_images, channels, height, width = scores.shape
        number = channels * height * width // columns.number
        table = scores.new_full((number, columns.number), -1e4).float()
        table[:, 0] = torch.linspace(3, -3, number, device=scores.device)
        if columns.background:
            table[:, -1] = 0
        if getattr(getattr(head, 'loss_cls', None), 'activated', False):
            table = table.sigmoid()
        made_up = table.view(height, width, channels).permute(2, 0, 1)
        levels.append(made_up.expand(num_images, -1, -1, -1))
        number_of_boxes += number
    keep_all = dict(score_thr=0., min_bbox_size=-1, nms_pre=10**9)
    try:
        results = head.predict_by_feat(
            levels,
            *outputs[1:],
            batch_img_metas=metas,
            cfg=ConfigDict(head.test_cfg or {}, **keep_all),
            rescale=False,
            with_nms=False)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConfigError(
            'model.tap.align', f'the boxes of a {type(head).__name__} cannot '
            f'be decoded location by location ({type(error).__name__}: '
            f'{error})',
            "choose another model, or leave out align='boxes'") from error
    boxes = [result.bboxes for result in results]
    if any(len(b) != number_of_boxes for b in boxes):
        raise ConfigError(
            'model.tap.align', f"'boxes' needs a box at every location, which "
            f'a {type(head).__name__} does not predict',
            'choose another model')
    return boxes
