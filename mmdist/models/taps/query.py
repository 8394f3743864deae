"""Query heads: a row is a query of the student and the teacher's match."""
from abc import abstractmethod
from functools import partial
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .base import (LEAST_LOGIT, BoxLogits, Call, LogitPair, LogitTap,
                   activation_of, check_classes, check_tokens, reads_text,
                   thresholds_of)
from .columns import Columns, as_columns_of, class_probabilities
from .labels import NONE, Objects, objects_of
from .teacher_batch import TeacherBatch

# Weights of the costs of a match, those of Deformable DETR and Mask2Former.
CLASS_COST, L1_COST, GIOU_COST, DICE_COST = 2., 5., 2., 5.
OF_BOXES = 'all_layers_cls_scores'  # of queries that are boxes


class Queries(NamedTuple):
    """What a model predicts for its queries, in its last decoder layer.

    Attributes:
        logits (Tensor): Class logits, ``(N, Q, C)``.
        boxes (Tensor, optional): ``(N, Q, 4)``, (cx, cy, w, h) as parts of
            the picture.
        masks (Tensor, optional): Mask logits, ``(N, Q, T, H, W)``; of
            pictures ``T`` is 1.
    """
    logits: Tensor
    boxes: Optional[Tensor] = None
    masks: Optional[Tensor] = None


class QueryTap(LogitTap):
    """Heads that classify queries, which have no order.

    The student's queries are matched one to one with the teacher's by the
    assignment of the least cost, on class probabilities and on boxes (or
    masks) of the last decoder layer; with other numbers of queries the rest
    has no pair. Only the last layer is distilled, and denoising queries are
    left out.
    """
    instances = 'queries'

    def __init__(self, student: nn.Module) -> None:
        super().__init__(student)
        self.teacher_kind = type(self)

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """As of every tap; any kind of queries may learn from any other."""
        self.teacher_kind = next(
            (kind for kind in KINDS if kind.find(teacher)), type(self))
        super().connect(student, teacher, class_map)

    def _find_teacher(self, teacher: nn.Module) -> List[str]:
        return self.teacher_kind.find(teacher)

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Both must agree on classes, and predict boxes or both masks."""
        head_s = student.get_submodule(self.heads[-1])
        head_t = teacher.get_submodule(self.teacher_heads[-1])
        check_classes(head_s, head_t, self.class_map)
        if self.predicts_boxes(head_s) != self.teacher_kind.predicts_boxes(
                head_t):
            kinds = [type(model).__name__ for model in (teacher, student)]
            raise ValueError(
                f'model.teacher.config is a {kinds[0]} and model.student a '
                f'{kinds[1]}: one predicts boxes, the other masks, by which '
                'queries are matched; choose a teacher of the same kind')

    @abstractmethod
    def queries_of(self, call: Call) -> Queries:
        """The student's queries."""

    @staticmethod
    @abstractmethod
    def ask(teacher: TeacherBatch, head: str, call: Call) -> Queries:
        """The teacher's queries.

        Args:
            teacher (TeacherBatch): The batch.
            head (str): The last of the teacher's heads.
            call (Call): The student's.
        """

    def distilled_heads(self) -> List[str]:
        """The last head."""
        return self.heads[-1:]

    def own_boxes(self, call: Call, head: nn.Module, num_boxes: int,
                  teacher: TeacherBatch) -> BoxLogits:
        """The boxes of all queries."""
        from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
        queries = self.queries_of(call)
        sizes = teacher.picture_sizes()[:, None]
        boxes = bbox_cxcywh_to_xyxy(queries.boxes.detach()) * sizes
        return BoxLogits(
            list(boxes), list(queries.logits), _columns(head, queries), True)

    @classmethod
    def answer_boxes(
        cls, teacher: TeacherBatch, heads: List[str], own: BoxLogits,
        call: Call, class_map: Optional[List[int]]
    ) -> Tuple[List[Tensor], List[Tensor], Columns]:
        """The query of the least cost for each box.

        They are assigned one to one where the boxes are a student's queries;
        of RoIs and locations many are of one object.
        """
        from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
        queries = cls.ask(teacher, heads[-1], call)
        columns = _columns(teacher.model.get_submodule(heads[-1]), queries)
        kept, logits = [], []
        for i, size in enumerate(teacher.picture_sizes()):
            theirs = Queries(queries.logits[i:i + 1], queries.boxes[i:i + 1])
            boxes = bbox_xyxy_to_cxcywh(own.boxes[i] / size)
            ours = Queries(own.logits[i][None], boxes[None])
            (match_s, match_t), = match_queries(ours, own.columns, theirs,
                                                columns, class_map,
                                                own.one_to_one)
            kept.append(match_s)
            logits.append(queries.logits[i][match_t])
        return kept, logits, columns

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(matches, C)`` logits."""
        twin = self.teacher_heads[-1]
        queries_s = self.queries_of(call)
        queries_t = self.teacher_kind.ask(teacher, twin, call)
        columns_s = _columns(student.get_submodule(call.path), queries_s)
        columns_t = _columns(teacher.model.get_submodule(twin), queries_t)
        matches = match_queries(queries_s, columns_s, queries_t, columns_t,
                                self.class_map)
        rows_s, rows_t = (torch.cat([
            logits[index] for logits, index in zip(queries.logits, indices)
        ]) for queries, indices in zip((queries_s, queries_t), zip(*matches)))
        if reads_text(student):
            rows_s, rows_t = _without_padding(rows_s, rows_t)
        rows_t, activation_t = as_columns_of(columns_s, columns_t, rows_t,
                                             self.class_map)
        labels_of = partial(_labels, queries_t, matches, teacher)
        return [
            LogitPair(
                student=rows_s,
                teacher=rows_t,
                student_activation=columns_s.activation,
                teacher_activation=activation_t,
                name='queries',
                num_classes=0
                if reads_text(student) else columns_s.num_classes,
                labels=labels_of,
                areas=partial(labels_of, areas=True),
                background=columns_s.background,
                thresholds=thresholds_of(student, call.path, teacher.model,
                                         twin))
        ]

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``queries x 80 classes (sigmoid), bbox_head <- bbox_head``."""
        head = student.get_submodule(self.heads[-1])
        columns = f'{head.num_classes} classes'
        if reads_text(student):
            columns = 'tokens'
        return (f'queries x {columns} ({activation_of(head)}), '
                f'{self.heads[-1]} <- {self.teacher_heads[-1]}')


class TransformerTap(QueryTap):
    """Heads of DETR and of MaskFormer, their descendants and SAN."""
    method = 'loss_by_feat'
    class_arguments = (OF_BOXES, 'all_cls_scores')

    @classmethod
    def predicts_boxes(cls, head: nn.Module) -> bool:
        """Whether its queries are boxes; MaskFormer's are masks."""
        return OF_BOXES in cls.names_of(head)

    def queries_of(self, call: Call) -> Queries:
        """Those of the last layer that take part in the final prediction."""
        scores, places = list(call.arguments.values())[:2]
        meta = call.arguments.get('dn_meta') or {}
        # Denoising queries stand first, DDQ's dense ones last.
        first = meta.get('num_denoising_queries', 0)
        last = scores[-1].shape[1] - meta.get('num_dense_queries', 0)
        return _queries(scores[-1][:, first:last], places[-1][:, first:last])

    @staticmethod
    def ask(teacher: TeacherBatch, head: str, call: Call) -> Queries:
        """The last layer of what the teacher's head returns."""
        outputs = teacher.head_outputs([head])[head]
        # SAN returns its masks first.
        scores, places = sorted((o[-1] for o in outputs[:2]), key=Tensor.dim)
        return _queries(scores, places)


class ProposalTap(QueryTap):
    """Heads that refine learnt proposals (Sparse R-CNN, QueryInst)."""
    method = 'loss_and_target'
    class_arguments = ('cls_score', )
    needs = ('imgs_whwh', )

    @classmethod
    def predicts_boxes(cls, head: nn.Module) -> bool:
        """Always."""
        return True

    def queries_of(self, call: Call) -> Queries:
        """Those of the last stage."""
        size = call.arguments['imgs_whwh']
        return _refined(call.arguments['cls_score'],
                        call.arguments['bbox_pred'], size)

    @staticmethod
    def ask(teacher: TeacherBatch, head: str, call: Call) -> Queries:
        """What the last stage returns while the teacher predicts."""
        roi_head, _, last = head.partition('.bbox_head.')
        results = teacher.result_of(
            roi_head, '_bbox_forward',
            lambda arguments: arguments['stage'] == int(last))
        sizes = teacher.picture_sizes()
        return _refined(results['cls_score'], results['decoded_bboxes'], sizes)


KINDS: Sequence[Any] = (TransformerTap, ProposalTap)


def _queries(scores: Tensor, places: Tensor) -> Queries:
    if places.dim() == 3:
        return Queries(scores, boxes=places)
    # Of videos they have a dimension for the frames.
    masks = places if places.dim() == 5 else places.unsqueeze(2)
    return Queries(scores, masks=masks)


def _refined(scores: Tensor, corners: Tensor, size: Tensor) -> Queries:
    """Queries with boxes in pixels, of pictures of (w, h, w, h)."""
    corners = corners.view(len(size), -1, 4) / size.view(len(size), -1, 4)
    left_top, right_bottom = corners.split(2, dim=-1)
    boxes = torch.cat([(left_top + right_bottom) / 2, right_bottom - left_top],
                      dim=-1)
    return Queries(scores.view(*boxes.shape[:2], -1), boxes=boxes)


def _columns(head: nn.Module, queries: Queries) -> Columns:
    activation = activation_of(head)
    number = queries.logits.shape[-1]
    if activation == 'sigmoid':  # the tokens of a text, or the classes
        return Columns(number, activation, False)
    return Columns(head.num_classes, activation, number > head.num_classes)


@torch.no_grad()
def match_queries(student: Queries,
                  columns_s: Columns,
                  teacher: Queries,
                  columns_t: Columns,
                  class_map: Optional[List[int]] = None,
                  one_to_one: bool = True) -> List[Tuple[Tensor, Tensor]]:
    """Match the queries of each picture one to one.

    Args:
        student (Queries): The student's.
        columns_s (Columns): Of the student's logits.
        teacher (Queries): The teacher's.
        columns_t (Columns): Of the teacher's logits.
        class_map (list[int], optional): The teacher's class for each of the
            student's.
        one_to_one (bool): Otherwise several of the student's may have one of
            the teacher's.

    Returns:
        list[tuple[Tensor, Tensor]]: For each picture the indices of matched
        queries of the student and of the teacher, int64.
    """
    # A mask of ones overflows in half precision.
    with torch.autocast(student.logits.device.type, enabled=False):
        return [
            _match_picture(
                Queries(*(p if p is None else p[i]
                          for p in student)), columns_s,
                Queries(*(p if p is None else p[i]
                          for p in teacher)), columns_t, class_map, one_to_one)
            for i in range(len(student.logits))
        ]


def _match_picture(student: Queries, columns_s: Columns, teacher: Queries,
                   columns_t: Columns, class_map: Optional[List[int]],
                   one_to_one: bool) -> Tuple[Tensor, Tensor]:
    """As :func:`match_queries`, of one picture."""
    from scipy.optimize import linear_sum_assignment
    p_s = class_probabilities(student.logits, columns_s)
    p_t = class_probabilities(teacher.logits, columns_t)
    if class_map is not None:
        p_t = p_t[:, class_map]
    # half the absolute difference
    cost = CLASS_COST * torch.cdist(p_s, p_t, p=1) / 2
    cost = cost + _place_cost(student, teacher)
    # Predictions that overflowed match nothing in particular.
    cost = cost.nan_to_num(1e6, 1e6, 1e6)
    if one_to_one:
        own, theirs = linear_sum_assignment(cost.cpu())
    else:
        own, theirs = range(len(cost)), cost.argmin(dim=1)
    return (torch.as_tensor(own, device=cost.device),
            torch.as_tensor(theirs, device=cost.device))


def _place_cost(student: Queries, teacher: Queries) -> Tensor:
    """How far the boxes and masks of one picture are apart, ``(S, T)``."""
    cost = teacher.logits.new_zeros(())
    if student.boxes is not None and teacher.boxes is not None:
        cost = cost + _box_cost(student.boxes, teacher.boxes)
    if student.masks is not None and teacher.masks is not None:
        cost = cost + _mask_cost(student.masks, teacher.masks)
    return cost


def _box_cost(student: Tensor, teacher: Tensor) -> Tensor:
    """L1 and GIoU of boxes (cx, cy, w, h), ``(S, T)``."""
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
    student, teacher = student.float(), teacher.float()
    overlaps = bbox_overlaps(
        bbox_cxcywh_to_xyxy(student), bbox_cxcywh_to_xyxy(teacher), 'giou')
    return (L1_COST * torch.cdist(student, teacher, p=1) + GIOU_COST *
            (1 - overlaps))


def _mask_cost(student: Tensor, teacher: Tensor) -> Tensor:
    """Dice distance of mask logits, at the smaller side's size, ``(S, T)``."""
    size = min(student.shape[-2:], teacher.shape[-2:])
    a, b = (
        nn.functional.interpolate(
            masks.float(), size, mode='bilinear',
            align_corners=False).sigmoid().flatten(1)
        for masks in (student, teacher))
    squares = a.square().sum(1)[:, None] + b.square().sum(1)
    return DICE_COST * (1 - 2 * a @ b.T / squares.clamp(min=1e-6))


def _without_padding(rows_s: Tensor, rows_t: Tensor) -> Tuple[Tensor, Tensor]:
    """Leave out the text tokens that no caption of the batch has.

    Their logits are minus infinity; so are those of tokens that some captions
    have, in the others' rows, where they become a low number.
    """
    check_tokens(rows_s.shape[1], rows_t.shape[1])
    kept = rows_s.isfinite().any(0) & rows_t.isfinite().any(0)
    return (rows_s[:, kept].clamp(min=LEAST_LOGIT),
            rows_t[:, kept].clamp(min=LEAST_LOGIT))


@torch.no_grad()
def _labels(queries: Queries,
            matches: List[Tuple[Tensor, Tensor]],
            teacher: TeacherBatch,
            areas: bool = False) -> Optional[Tensor]:
    """Labels of matched rows: an object's has the teacher's nearest query."""
    objects = objects_of(teacher.samples, areas)
    if objects is None or len(objects) != len(matches):
        return None
    labels = []
    for i, (truth, (_, match)) in enumerate(zip(objects, matches)):
        theirs = Queries(*(p if p is None else p[i] for p in queries))
        row_labels = truth.labels.new_full((len(match), ), NONE)
        places = _places_of(truth, theirs)
        if places is not None and len(truth.labels):
            nearest = _place_cost(places, theirs).argmin(1)
            found, which = (nearest[:, None] == match).nonzero().T
            row_labels[which] = truth.labels[found]
        labels.append(row_labels)
    return torch.cat(labels)


def _places_of(truth: Objects, like: Queries) -> Optional[Queries]:
    """Objects as queries, with boxes or masks as those of some others."""
    from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
    if like.boxes is not None:
        size = truth.boxes.new_tensor(truth.size).flip(0).repeat(2)
        return Queries(
            truth.labels, boxes=bbox_xyxy_to_cxcywh(truth.boxes / size))
    if truth.masks is None:
        return None
    masks = truth.masks
    if not isinstance(masks, Tensor):  # BoxInst's are tensors
        masks = masks.to_tensor(torch.float32, truth.labels.device)
    certain = 40 * masks.float() - 20
    return Queries(truth.labels, masks=certain.unsqueeze(1))
