"""Teachers of another family: a row is a box, whoever predicted it."""
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, List, Optional, Sequence, Type

import torch
from torch import Tensor, nn

from .base import Call, LogitPair, LogitTap, check_classes, thresholds_of
from .columns import as_columns_of
from .labels import labels_of_boxes, objects_of
from .teacher_batch import TeacherBatch


class BoxTap(LogitTap):
    """Asks both models for the classes of the student's own boxes.

    They are the RoIs that a two-stage student sampled, the ``num_boxes`` boxes
    of a picture that a dense student scores highest, with the logits of their
    locations, or the boxes of a student's queries. The teacher answers by its
    kind: a RoI head scores the boxes, of a cascade in its first stage; a
    dense head answers with the location whose decoded box overlaps most; of
    queries, each box gets one by the cheapest assignment.

    Args:
        student (nn.Module): The student.
        own (LogitTap): The tap that reads its heads.
        kinds (Sequence[type]): The taps that a teacher's heads may have.
        num_boxes (int): Boxes a picture of a dense student.
    """
    instances = 'boxes'

    def __init__(self,
                 student: nn.Module,
                 own: LogitTap,
                 kinds: Sequence[Type[LogitTap]],
                 num_boxes: int = 256) -> None:
        if type(num_boxes) is not int or num_boxes < 1:
            raise ValueError('model.tap.num_boxes must be a whole number of '
                             f'at least 1, but is {num_boxes!r}')
        self.own, self.kinds, self.num_boxes = own, kinds, num_boxes
        self.method = own.method
        super().__init__(student)
        self.teacher_kind: Optional[Type[LogitTap]] = None

    def find(self, model: nn.Module) -> List[str]:
        """The heads that the student's own tap reads."""
        return self.own.find(model)

    def watch(self, student: nn.Module, *args: Any) -> AbstractContextManager:
        """The calls that the student's own tap collects."""
        return self.own.watch(student, *args)

    def is_classification_loss(self, name: str) -> bool:
        """As the student's own tap."""
        return self.own.is_classification_loss(name)

    def _find_teacher(self, teacher: nn.Module) -> List[str]:
        self.teacher_kind = next(
            (kind for kind in self.kinds if kind.find(teacher)), None)
        return self.teacher_kind.find(teacher) if self.teacher_kind else []

    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Both predict boxes, of the same classes."""
        for model, heads, field, kind in ((student, self.heads,
                                           'model.student', self.own),
                                          (teacher, self.teacher_heads,
                                           'model.teacher.config',
                                           self.teacher_kind)):
            if not kind.predicts_boxes(model.get_submodule(heads[-1])):
                raise ValueError(
                    f"model.tap has align='boxes', but {field} is a "
                    f'{type(model).__name__}, which predicts no boxes')
        for path in self.heads:
            check_classes(
                student.get_submodule(path),
                teacher.get_submodule(self.teacher_heads[0]), self.class_map)

    def distilled_heads(self) -> List[str]:
        """Paths of the heads that the student's own tap distils."""
        return self.own.distilled_heads()

    def decides(self, call: Call) -> bool:
        """Whether the student's own tap distils the call."""
        return self.own.decides(call)

    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(boxes, C)`` logits."""
        head = student.get_submodule(call.path)
        own = self.own.own_boxes(call, head, self.num_boxes, teacher)
        kept, answer, columns = self.teacher_kind.answer_boxes(
            teacher, self.teacher_heads, own, call, self.class_map)
        logits_t, activation_t = as_columns_of(own.columns, columns,
                                               torch.cat(answer),
                                               self.class_map)
        labels_of = partial(_labels, teacher,
                            [b[i] for b, i in zip(own.boxes, kept)])
        return [
            LogitPair(
                student=torch.cat([t[i] for t, i in zip(own.logits, kept)]),
                teacher=logits_t,
                student_activation=own.columns.activation,
                teacher_activation=activation_t,
                weight=self.own.weight_of(call, student),
                name=f'boxes of {call.path}',
                num_classes=head.num_classes,
                labels=labels_of,
                areas=partial(labels_of, areas=True),
                background=own.columns.background,
                thresholds=thresholds_of(student, call.path, teacher.model,
                                         self.teacher_heads[0]))
        ]

    def logits_in(self, call: Call) -> List[Tensor]:
        """As the student's own tap."""
        return self.own.logits_in(call)

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """E.g. ``boxes of bbox_head <- roi_head.bbox_head.0``."""
        return (f'boxes of {", ".join(self.heads)} <- '
                f'{self.teacher_heads[0]}')


def _labels(teacher: TeacherBatch,
            boxes: List[Tensor],
            areas: bool = False) -> Optional[Tensor]:
    objects = objects_of(teacher.samples, areas)
    if objects is None or len(objects) != len(boxes):
        return None
    return labels_of_boxes(objects, boxes)
