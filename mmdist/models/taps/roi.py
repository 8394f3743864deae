"""RoI heads: a row is one of the student's sampled boxes."""
import inspect
from typing import List, Sequence

import torch
from torch import Tensor, nn

from .base import Call, LogitPair, LogitTap, activation_of, check_class_counts


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
    fewer.
    """
    method = 'loss_and_target'
    first_arguments = ('cls_score', )
    needs = ('rois', )
    instances = 'RoIs'

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Student and teacher must agree on classes and activation's width."""
        for path in self.heads:
            head = student.get_submodule(path)
            twin = teacher.get_submodule(self._twin(path))
            check_class_counts(head, twin)
            _check_one_softmax(head, 'model.student')
            _check_one_softmax(twin, 'model.teacher')
            if _num_columns(head) != _num_columns(twin):
                raise ValueError(
                    f'model.teacher scores a RoI with {_num_columns(twin)} '
                    f'numbers but model.student with {_num_columns(head)}; '
                    'use one kind of loss_cls in both box heads')
        _check_needs_features_only(
            teacher.get_submodule(_split(self.teacher_heads[0])[0]))

    def _twin(self, path: str) -> str:
        stage = _split(path)[1]
        return self.teacher_heads[min(stage, len(self.teacher_heads) - 1)]

    def pairs(self, calls: List[Call], student: nn.Module, teacher: nn.Module,
              features: Sequence[Tensor]) -> List[LogitPair]:
        """One pair of ``(RoIs, classes + background)`` logits a stage."""
        return [self._pair(call, student, teacher, features) for call in calls]

    def _pair(self, call: Call, student: nn.Module, teacher: nn.Module,
              features: Sequence[Tensor]) -> LogitPair:
        num_student = len(call.arguments['sampling_results'])
        if len(features[0]) != num_student:
            raise ValueError(
                f'model.student samples RoIs on {num_student} pictures but '
                f'model.teacher has features of {len(features[0])}; a student '
                'that multiplies its pictures cannot be distilled on RoIs')
        twin = self._twin(call.path)
        roi_head, stage = _split(call.path)
        weights = getattr(
            student.get_submodule(roi_head), 'stage_loss_weights', None)
        return LogitPair(
            student=call.arguments['cls_score'],
            teacher=_score(teacher, twin, features, call.arguments['rois']),
            student_activation=activation_of(student.get_submodule(call.path)),
            teacher_activation=activation_of(teacher.get_submodule(twin)),
            weight=weights[stage] if weights else 1.0,
            name=f'stage {stage}')

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``RoIs x 81 (softmax), stages 0-2``."""
        head = student.get_submodule(self.heads[0])
        stages = ', '.join(f'{path} <- {self._twin(path)}'
                           for path in self.heads)
        return (f'RoIs x {_num_columns(head)} ({activation_of(head)}), '
                f'{stages}')


def _check_one_softmax(head: nn.Module, field: str) -> None:
    """Raise ValueError if the class logits are no single distribution."""
    if getattr(head, 'custom_activation', False):
        loss = type(head.loss_cls).__name__
        raise ValueError(f'{field} has the loss_cls {loss}, whose logits are '
                         'not one distribution over the classes; use '
                         'CrossEntropyLoss or another softmax loss')


def _check_needs_features_only(roi_head: nn.Module) -> None:
    """Raise ValueError if scoring RoIs takes more than the neck's outputs."""
    for name in inspect.signature(roi_head._bbox_forward).parameters:
        # e.g. HTC's `semantic_feat`, used where the head is `with_semantic`
        branch = name.replace('_feat', '')
        if name.endswith('_feat') and getattr(roi_head, f'with_{branch}',
                                              False):
            raise ValueError(
                f'model.teacher.config has a {type(roi_head).__name__} that '
                f'scores RoIs with its {branch} branch, which distillation '
                'does not run; choose a teacher without it')


def _num_columns(head: nn.Module) -> int:
    """Columns of the class logits of a box head."""
    # Whether there is one for the background does not follow from the
    # activation: BBoxHead always has it, a sigmoid DIIHead has not.
    classifier = getattr(head, 'fc_cls', None)
    if hasattr(classifier, 'out_features'):
        return classifier.out_features
    return head.num_classes + (activation_of(head) == 'softmax')


@torch.no_grad()
def _score(teacher: nn.Module, path: str, features: Sequence[Tensor],
           rois: Tensor) -> Tensor:
    """The teacher's class logits for given RoIs, ``(R, C)``."""
    roi_path, stage = _split(path)
    forward = teacher.get_submodule(roi_path)._bbox_forward
    staged = 'stage' in inspect.signature(forward).parameters
    stage_argument = dict(stage=stage) if staged else {}
    return forward(x=features, rois=rois, **stage_argument)['cls_score']
