"""Query heads: a row is a query of the student and the teacher's match."""
from typing import Any, Dict, List

import torch
from torch import Tensor, nn

from mmdist.registry import TAPS
from .base import LogitPair, LogitTap, pair_of
from .batch import Answered, TeacherBatch
from .columns import Columns, activation_of, check_alike, reads_text
from .labels import labels_of_queries, object_labels
from .matching import Queries, match_queries
from .watch import Call, LossCall, loss_call, owner_of, watch_method

OF_MASKS = 'all_cls_scores'  # of queries that are masks


@TAPS.register_module()
class QueryTap(LogitTap):
    """Heads that classify queries, which have no order.

    They are those of DETR and of MaskFormer, their descendants and SAN, and
    heads that refine learnt proposals (Sparse R-CNN, QueryInst). The
    student's queries are matched one to one with the teacher's by the
    assignment of the least cost, on class probabilities and on boxes (or
    masks) of the last decoder layer; with other numbers of queries the rest
    has no pair. Only the last layer is distilled, and denoising queries are
    left out.
    """
    priority = 70
    reads = (LossCall('loss_by_feat', ('all_layers_cls_scores', OF_MASKS)),
             LossCall(
                 'loss_and_target', ('cls_score', ), needs=('imgs_whwh', )))
    rows = 'queries'

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Heads of queries; of those in a row (Sparse R-CNN) the last."""
        last = {path.rpartition('.')[0]: path for path in super().find(model)}
        return list(last.values())

    def _check_heads(self, student_head: nn.Module,
                     teacher_head: nn.Module) -> None:
        check_alike(
            'matches its queries by {}', *[
                'boxes' if are_boxes(head) else 'masks'
                for head in (student_head, teacher_head)
            ])

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(matches, C)`` logits."""
        own = student_queries(call)
        theirs = teacher_queries(batch, self.heads[call.path])
        matches = match_queries(own, theirs, self.class_map)
        rows = [
            (torch.cat([table[i] for table, i in zip(queries.logits, indices)
                        ]), queries.columns)
            for queries, indices in zip((own, theirs), zip(*matches))
        ]
        labels = object_labels(
            batch, len(matches),
            lambda objects: labels_of_queries(objects, theirs, matches))
        return [pair_of(self, call, batch, *rows, name='queries', **labels)]

    def _describe_rows(self, student: nn.Module, path: str) -> str:
        head = student.get_submodule(path)
        columns = ('tokens'
                   if reads_text(student) else f'{head.num_classes} classes')
        return f'queries x {columns} ({activation_of(head)})'


def are_boxes(head: nn.Module) -> bool:
    """Whether queries of a head are boxes; MaskFormer's are masks."""
    return OF_MASKS not in loss_call(head, QueryTap.reads).class_arguments


def student_queries(call: Call) -> Queries:
    """The student's queries that take part in its final prediction."""
    arguments, head = call.arguments, call.head
    if 'imgs_whwh' in arguments:
        return _proposals(head, arguments['cls_score'], arguments['bbox_pred'],
                          arguments['imgs_whwh'])
    scores, places = list(arguments.values())[:2]
    meta = arguments.get('dn_meta') or {}
    # Denoising queries stand first, DDQ's dense ones last.
    first = meta.get('num_denoising_queries', 0)
    last = scores[-1].shape[1] - meta.get('num_dense_queries', 0)
    return _decoded(head, scores[-1][:, first:last], places[-1][:, first:last])


def teacher_queries(batch: TeacherBatch, path: str) -> Queries:
    """The queries of the last layer of a head of the teacher."""
    head = batch.model.get_submodule(path)
    roi_head, _, stage = path.partition('.bbox_head.')
    if not stage:
        outputs = batch.head_outputs([path])[path]
        # SAN returns its masks first.
        scores, places = sorted((o[-1] for o in outputs[:2]), key=Tensor.dim)
        return _decoded(head, scores, places)
    results: List[Dict[str, Any]] = []

    def read(arguments: Dict[str, Any], result: Dict[str, Any]) -> None:
        if arguments['stage'] == int(stage):
            results.append(result)
            raise Answered

    detector = batch.model.get_submodule(owner_of(batch.model, path))
    with watch_method(
            batch.model.get_submodule(roi_head), '_bbox_forward', read):
        batch.run([path], detector.predict, batch.renormalised(batch.images),
                  batch.samples)
    return _proposals(head, results[0]['cls_score'],
                      results[0]['decoded_bboxes'], batch.image_sizes())


def _decoded(head: nn.Module, scores: Tensor, places: Tensor) -> Queries:
    """Queries of a transformer, whose places are boxes or masks."""
    if places.dim() == 3:
        return _queries(head, scores, boxes=places)
    # Of videos they have a dimension for the frames.
    masks = places if places.dim() == 5 else places.unsqueeze(2)
    return _queries(head, scores, masks=masks)


def _proposals(head: nn.Module, scores: Tensor, corners: Tensor,
               size: Tensor) -> Queries:
    """Queries with boxes in pixels, of images of (w, h, w, h)."""
    from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
    corners = corners.view(len(size), -1, 4) / size.view(len(size), -1, 4)
    scores = scores.view(*corners.shape[:2], -1)
    return _queries(head, scores, boxes=bbox_xyxy_to_cxcywh(corners))


def _queries(head: nn.Module, scores: Tensor, **places: Tensor) -> Queries:
    activation, number = activation_of(head), scores.shape[-1]
    columns = Columns(number, activation)  # the tokens of a text, or classes
    if activation == 'softmax':
        background = number > head.num_classes
        columns = Columns(head.num_classes, activation, background)
    return Queries(scores, columns, **places)
