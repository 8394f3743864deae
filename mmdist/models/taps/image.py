"""Classification heads: a row is an image."""
from functools import partial
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..class_mapping import check_numbers
from .base import Call, LogitPair, LogitTap, check_classes
from .labels import IGNORED, NONE
from .teacher_batch import TeacherBatch


class ImageTap(LogitTap):
    """Heads that classify whole images (MMPretrain).

    As in the authors' classification code (https://github.com/hunto/DIST_KD),
    the rows are the images of the batch and the columns its classes. The
    teacher is shown the very pictures that the student sees, after mixup,
    CutMix and the like.

    A head with several outputs (Conformer) learns from as many of the
    teacher, and with all of them from their sum, by which such heads predict,
    if the teacher has another number.

    Args:
        student (nn.Module): The student.
    """
    method = '_get_loss'
    class_arguments = ('cls_score', )
    instances = 'images'

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Classes must agree, where heads say how many they have."""
        sides = (student, self.heads,
                 'model.student'), (teacher, self.teacher_heads,
                                    'model.teacher.config')
        for model, paths, field in sides:
            if len(paths) > 1:
                raise ValueError(
                    f'{field} is a {type(model).__name__} with several heads '
                    f'({", ".join(paths)}), of which nothing says which to '
                    'distil; choose a model with one')
        heads = [model.get_submodule(paths[0]) for model, paths, _ in sides]
        if all(_num_classes(head) for head in heads):
            check_classes(*heads, self.class_map)

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, C)`` logits an output of the head."""
        head_s = student.get_submodule(call.path)
        head_t = teacher.model.get_submodule(self.teacher_heads[0])
        outputs_s = _listed(call.arguments['cls_score'])
        outputs_t = _listed(self._output(teacher))
        if len(outputs_t) != len(outputs_s):
            outputs_t = [sum(outputs_t)] * len(outputs_s)
        return [
            LogitPair(
                logits_s,
                self._columns(logits_t, logits_s),
                student_activation=_activation_of(head_s),
                teacher_activation=_activation_of(head_t),
                name=f'output {i}',
                num_classes=logits_s.shape[1],
                labels=partial(
                    _one_label if logits_s.shape[1] == 1 else _labels,
                    call.arguments['data_samples']),
                thresholds=_thresholds(head_s, head_t))
            for i, (logits_s,
                    logits_t) in enumerate(zip(outputs_s, outputs_t))
        ]

    def _columns(self, logits_t: Tensor, logits_s: Tensor) -> Tensor:
        """The teacher's logits of the student's classes."""
        number_s, number_t = logits_s.shape[1], logits_t.shape[1]
        check_numbers(number_s, number_t, self.class_map)
        if self.class_map is not None:
            logits_t = logits_t[:, self.class_map]
        return logits_t

    def _output(self, teacher: TeacherBatch) -> Any:
        """What the teacher's head returns for the batch."""
        return teacher.forward_of(self.teacher_heads[0])

    def is_classification_loss(self, name: str) -> bool:
        """All losses of a classifier are."""
        return 'loss' in name

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``images x 100 (softmax), head <- head``."""
        head = student.get_submodule(self.heads[0])
        number = _num_classes(head) or 'classes'
        own, theirs = (
            paths[0] or 'the model'
            for paths in (self.heads, self.teacher_heads))
        return f'images x {number} ({_activation_of(head)}), {own} <- {theirs}'


def _listed(outputs: Any) -> List[Tensor]:
    """One output, or several."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _num_classes(head: nn.Module) -> int:
    """0 where the backbone has the last layer and the head does not say."""
    return getattr(head, 'num_classes', None) or 0


def _activation_of(head: nn.Module) -> str:
    """By which the head predicts, whatever it was trained with: 'sigmoid' for
    several labels an image."""
    from mmpretrain.models.heads import MultiLabelClsHead
    return 'sigmoid' if isinstance(head, MultiLabelClsHead) else 'softmax'


def _thresholds(head_s: nn.Module,
                head_t: nn.Module) -> Optional[Tuple[float, float]]:
    """The probabilities from which heads of several labels give one."""
    thresholds = tuple(getattr(head, 'thr', None) for head in (head_s, head_t))
    return None if None in thresholds else thresholds


def _one_label(samples: Sequence[Any]) -> Tensor:
    """Labels of one class: 0 where an image has it, NONE, or IGNORED."""
    labels = []
    for sample in samples:
        if 'gt_score' in sample:
            score = float(sample.gt_score)
            labels.append(IGNORED if score < 0 else 0 if score > 0.5 else NONE)
        else:
            labels.append(0 if sample.gt_label.numel() else NONE)
    return torch.tensor(
        labels,
        device=samples[0].get('gt_score', samples[0].get('gt_label')).device)


def _labels(samples: Sequence[Any]) -> Optional[Tensor]:
    """The label of each image; None of mixed images and of several labels."""
    labels = [getattr(sample, 'gt_label', None) for sample in samples]
    if any('gt_score' in sample or label is None or label.numel() != 1
           for sample, label in zip(samples, labels)):
        return None
    return torch.cat(labels)
