"""RoI heads: a row is one of the student's sampled boxes."""
import inspect
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from .base import (BoxLogits, Call, LogitPair, LogitTap, activation_of,
                   check_classes, class_logits, thresholds_of)
from .columns import Columns, as_columns_of
from .labels import NONE, areas_of
from .teacher_batch import TeacherBatch, owner_of


def _split(path: str) -> Sequence[str]:
    """``'roi_head.bbox_head.2'`` -> the RoI head's path and the stage."""
    roi_head, _, stage = path.partition('.bbox_head')
    return roi_head, int(stage[1:] or 0)


class RoITap(LogitTap):
    """Box heads that classify RoIs with one softmax (or sigmoid) a box.

    The teacher is scored on the very RoIs that the student sampled, as in the
    authors' detection code (https://github.com/hunto/DIST_KD): it pools its
    own features at them, and neither proposes nor samples. Stage i of a
    cascade learns from stage i, and from the nearest where the teacher has
    fewer. A head that predicts several boxes a RoI (CrowdDet) has as many
    rows.
    """
    # `loss_and_target` ends in this call, which PISA and Soft Teacher make
    # themselves.
    method = 'loss'
    class_arguments = ('cls_score', )
    needs = ('rois', )
    instances = 'RoIs'

    @classmethod
    def names_of(cls, head: nn.Module) -> List[str]:
        """As of every tap; DIIHead inherits the call but does not make it."""
        targets = getattr(head, 'loss_and_target', None)
        if targets and 'rois' not in inspect.signature(targets).parameters:
            return []
        return super().names_of(head)

    def entry(self, path: str) -> str:
        """The RoI extractor of a head's stage."""
        return path.replace('.bbox_head', '.bbox_roi_extractor')

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Student and teacher must agree on classes."""
        for path in self.heads:
            head = student.get_submodule(path)
            twin = teacher.get_submodule(self._twin(path))
            check_classes(head, twin, self.class_map)
            _check_width(head, 'model.student')
            _check_width(twin, 'model.teacher')

    def _twin(self, path: str) -> str:
        stage = _split(path)[1]
        return self.teacher_heads[min(stage, len(self.teacher_heads) - 1)]

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(RoIs, classes + background)`` logits."""
        twin = self._twin(call.path)
        head_s = student.get_submodule(call.path)
        head_t = teacher.model.get_submodule(twin)
        scores = _score(teacher, twin, call.images, call.arguments['rois'])
        logits_t, activation_t = as_columns_of(
            _columns(head_s), _columns(head_t), _table(scores, head_t),
            self.class_map)
        return [
            LogitPair(
                student=_table(call.arguments['cls_score'], head_s),
                teacher=logits_t,
                student_activation=activation_of(head_s),
                teacher_activation=activation_t,
                weight=self.weight_of(call, student),
                name=f'stage {_split(call.path)[1]}',
                num_classes=head_s.num_classes,
                labels=partial(_labels, call, head_s),
                areas=partial(areas_of, call.arguments['rois'][:, 1:]),
                background=_columns(head_s).background,
                thresholds=thresholds_of(student, call.path, teacher.model,
                                         twin))
        ]

    @classmethod
    def predicts_boxes(cls, head: nn.Module) -> bool:
        """Always."""
        return True

    def check_batch(self, calls: List[Call], images: Any) -> None:
        """RoIs may be of any images whose features are known."""
        if any(call.images is None for call in calls):
            raise ValueError(
                'model.student does not compute its features by '
                '`extract_feat`, so the teacher cannot be shown the pictures '
                'of its RoIs')

    def decides(self, call: Call) -> bool:
        """PISA's sampler asks for losses, too, without naming the RoIs."""
        return call.arguments['rois'] is not None

    def weight_of(self, call: Call, student: nn.Module) -> float:
        """The weight of the stage."""
        roi_head, stage = _split(call.path)
        weights = getattr(
            student.get_submodule(roi_head), 'stage_loss_weights', None)
        return weights[stage] if weights else 1.0

    def own_boxes(self, call: Call, head: nn.Module, num_boxes: int,
                  teacher: TeacherBatch) -> BoxLogits:
        """The sampled RoIs."""
        rois = call.arguments['rois'].detach()
        table = _table(call.arguments['cls_score'], head)
        num_images = len(call.images)
        pictures = [rois[:, 0] % num_images == i for i in range(num_images)]
        return BoxLogits([rois[p, 1:] for p in pictures],
                         [table[p] for p in pictures], _columns(head))

    @classmethod
    def answer_boxes(
        cls, teacher: TeacherBatch, heads: List[str], own: BoxLogits,
        call: Call, class_map: Optional[List[int]]
    ) -> Tuple[List[Tensor], List[Tensor], Columns]:
        """The scores of the boxes as RoIs, by the first stage."""
        from mmdet.structures.bbox import bbox2roi

        # An untrained student may predict boxes inside out.
        rois = bbox2roi([
            torch.cat([b[:, :2], b[:, 2:].maximum(b[:, :2])], dim=1)
            for b in own.boxes
        ])
        head = teacher.model.get_submodule(heads[0])
        table = _table(_score(teacher, heads[0], call.images, rois), head)
        lengths = [len(boxes) for boxes in own.boxes]
        kept = [torch.arange(n, device=rois.device) for n in lengths]
        return kept, list(table.split(lengths)), _columns(head)

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``RoIs x 81 (softmax), stages 0-2``."""
        head = student.get_submodule(self.heads[0])
        stages = ', '.join(f'{path} <- {self._twin(path)}'
                           for path in self.heads)
        columns = _columns(head)
        return f'RoIs x {columns.number} ({columns.activation}), {stages}'


def _columns(head: nn.Module) -> Columns:
    """The columns of the class logits of a box head."""
    # Whether there is one for the background does not follow from the
    # activation: BBoxHead always has it, a sigmoid DIIHead has not.
    classifier = getattr(head, 'fc_cls', None)
    activation = activation_of(head)
    if hasattr(classifier, 'out_features') and not _is_custom(head):
        background = classifier.out_features > head.num_classes
    else:
        several = isinstance(classifier, nn.ModuleList)
        background = several or activation == 'softmax'
    return Columns(head.num_classes, activation, background)


def _check_width(head: nn.Module, field: str) -> None:
    """Raise ValueError if the columns are not classes and a background."""
    width = getattr(getattr(head, 'fc_cls', None), 'out_features', None)
    known = head.num_classes, head.num_classes + 1
    if width is not None and width not in known and not _is_custom(head):
        raise ValueError(
            f'{field} scores a RoI with {width} numbers for '
            f'{head.num_classes} classes; use a loss_cls with one column a '
            'class and one for the background')


def _is_custom(head: nn.Module) -> bool:
    """Whether the loss has its own way from logits to probabilities."""
    return getattr(head, 'custom_activation', False)


def _labels(call: Call, head: nn.Module) -> Optional[Tensor]:
    """The labels that the head is trained with, without the background's."""
    labels = call.arguments.get('labels')
    rows = len(_table(call.arguments['cls_score'], head))
    if labels is None or labels.shape != (rows, ):  # CrowdDet's two a RoI
        return None
    return labels.masked_fill(labels >= head.num_classes, NONE)


def _table(cls_score: Tensor, head: nn.Module) -> Tensor:
    """``(R, C)`` logits of one distribution a row."""
    return class_logits(cls_score, head).reshape(-1, _columns(head).number)


def _score(teacher: TeacherBatch, path: str, images: Tensor,
           rois: Tensor) -> Tensor:
    """The teacher's class logits for given RoIs, ``(R, C)``."""
    roi_path, stage = _split(path)
    features = teacher.features(images, owner_of(teacher.model, path))
    num_images = len(features[0])
    # A student that multiplies its pictures (TridentNet) puts the copies
    # behind them.
    rois = torch.cat([rois[:, :1] % num_images, rois[:, 1:]], dim=1)
    roi_head = teacher.model.get_submodule(roi_path)
    known = dict(stage=stage, x=features, rois=rois)
    names = inspect.signature(roi_head._bbox_forward).parameters
    arguments = {name: known[name] for name in names if name in known}
    if set(names) - set(known):
        arguments = {**_more(teacher, roi_path, features, rois), **arguments}
    with teacher.computing():
        return roi_head._bbox_forward(**arguments)['cls_score']


def _more(teacher: TeacherBatch, roi_path: str, features: Sequence[Tensor],
          rois: Tensor) -> Dict[str, Any]:
    """What else a RoI head takes to score RoIs, e.g. HTC's semantics.

    It computes them itself when it is given the RoIs as proposals.
    """
    proposals = [
        InstanceData(bboxes=rois[rois[:, 0] == i, 1:])
        for i in range(len(features[0]))
    ]
    roi_head = teacher.model.get_submodule(roi_path)
    return teacher.arguments_of(roi_path, '_bbox_forward', roi_head.predict,
                                features, proposals, teacher.samples) or {}
