"""The contract of all taps: where class logits are read off a head.

Every head of the zoos hands its class predictions to one method before it
computes its loss, and the names of that method's arguments say what they
are. A tap says which call this is, which heads of both models belong
together, and what the teacher says about the same instances.
"""
from abc import ABCMeta, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import torch
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from ..class_mapping import FIELD, check_numbers
from .batch import TeacherBatch
from .columns import (ClassLogits, as_columns_of, check_alike, classes_of,
                      common_tokens, reads_text)
from .labels import NONE, threshold_of
from .watch import Call, LossCall, loss_call, owner_of, signature_of


@dataclass
class LogitPair:
    """The logits of student and teacher for the same instances.

    Attributes:
        student (Tensor): ``(R, C)``, or ``(N, C, *spatial)`` where every
            position is a row.
        teacher (Tensor): The same shape, without gradient.
        student_activation, teacher_activation (str): 'softmax' or 'sigmoid'.
        weight (float): The weight that the student's head gives its own loss.
        name (str): The stage, level or head, e.g. 'level 0'.
        num_classes (int): Number of classes. A background column may follow,
            and the columns of several anchors repeat the classes. 0 if the
            columns are not classes.
        labels (Callable): Returns the class of every row, int64, in the shape
            of ``student`` without its columns, or None without ground truth.
            -1 is a row without a class. Only with a single class, -1 says that
            the class is absent and -2 that nothing is known; :meth:`truth`
            turns both into one scheme.
        areas (Callable): Returns the area of the box of every labelled row,
            in pixels of the input, in the shape of the labels; None if rows
            have no boxes.
        background (bool): Whether the last column is the background's.
        thresholds (tuple[float, float], optional): For one class without a
            background, the probabilities above which student and teacher say
            that it is there; None if their heads have no such threshold.
    """
    student: Tensor
    teacher: Tensor
    student_activation: str = 'softmax'
    teacher_activation: str = 'softmax'
    weight: float = 1.0
    name: str = ''
    num_classes: int = 0
    labels: Callable[[], Optional[Tensor]] = lambda: None
    areas: Callable[[], Optional[Tensor]] = lambda: None
    background: bool = False
    thresholds: Optional[Tuple[float, float]] = None

    @property
    def num_answers(self) -> int:
        """Number of answers of a row: the classes; for one class 2, that it
        is there or not; 0 if the columns do not tell, or are no classes."""
        if self.num_classes != 1:
            return self.num_classes
        return 2 if self.background or self.thresholds else 0

    def truth(self) -> Optional[Tensor]:
        """The right answer of each row, -1 where it is unknown: the label;
        for one class, 0 where it is and 1 where it is not. None without ground
        truth, or if the columns do not tell the answers."""
        labels = self.labels() if self.num_answers else None
        if labels is None or self.num_classes != 1:
            return labels
        return torch.where(labels == NONE, 1, labels).clamp(min=-1)

    def answers(self) -> List[Tensor]:
        """The answers of student and teacher for each row, in the shape and
        the numbers of :meth:`truth`; none if the columns do not tell."""
        number = self.num_classes or self.student.shape[1]
        if number == 1 and not self.num_answers:
            return []
        thresholds = self.thresholds or (None, None)
        return [
            classes_of(logits, number, self.background, threshold)
            for logits, threshold in zip((self.student,
                                          self.teacher), thresholds)
        ]


class LogitTap(metaclass=ABCMeta):
    """Reads class logits off the heads of one kind.

    To write a tap, inherit this class, say what it ``reads``, define
    :meth:`pairs` and register it by ``@TAPS.register_module()`` in a module
    that ``custom_imports`` names. A tap keeps paths of heads, not heads, so
    that it can be copied with the model and works on any copy.

    Args:
        model (nn.Module): The student.

    Attributes:
        priority (int): Taps are tried in ascending order, as hooks are, and
            the first that finds a head reads the model. Those of mmdist have
            50 to 90.
        reads (Sequence[LossCall]): The loss calls that hold class logits;
            a head is read in the first that it has.
        rows (str): A word for the instances, in messages.
        heads (dict[str, str | None]): The paths of the student's heads, each
            with the teacher's head that it learns from; None before
            :meth:`connect`, and for a head that learns from the labels alone.
        class_map (list[int], optional): The teacher's class for each of the
            student's, where they differ.
    """
    priority = 40
    reads: Sequence[LossCall]
    rows = 'instances'

    def __init__(self, model: nn.Module) -> None:
        self.heads: Dict[str, Optional[str]] = dict.fromkeys(self.find(model))
        self.class_map: Optional[List[int]] = None

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Paths of the heads of a model that this tap reads, in its order."""
        return [
            path for path, module in model.named_modules()
            if loss_call(module, cls.reads)
        ]

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """Find the teacher's head for each of the student's.

        Raises:
            ConfigError: If no pair is possible.
        """
        check_alike(
            'scores {}', *[
                'the tokens of a text' if reads_text(model) else 'classes'
                for model in (student, teacher)
            ])
        if reads_text(student) and class_map is not None:
            raise ConfigError(
                FIELD, 'it is of no use here: the text that both models are '
                'given names the classes', 'leave it out')
        self.class_map = class_map
        # A teacher that holds several models answers with one of them.
        owners = {path: owner_of(teacher, path) for path in self.find(teacher)}
        chosen = owner_of(student, next(iter(self.heads)))
        if chosen not in owners.values():
            chosen = next(iter(owners.values()), None)
        found = [path for path, owner in owners.items() if owner == chosen]
        if not found:
            raise ConfigError(
                'model.teacher.config', f'it is a {type(teacher).__name__}, '
                f'which has no class logits for {self.rows}'
                f'{unknown_arguments(teacher, self.reads)}, but the student '
                f'is a {type(student).__name__} and learns from those',
                'choose a teacher of the same kind or, if both models predict '
                "boxes, set model.tap=dict(align='boxes')")
        twins = self._match(student, teacher, found)
        self.heads = {path: twins.get(path) for path in self.heads}
        for path, twin in twins.items():
            heads = student.get_submodule(path), teacher.get_submodule(twin)
            numbers = [getattr(head, 'num_classes', None) for head in heads]
            if all(numbers):  # some heads do not say
                check_numbers(*numbers, class_map)
            self._check_heads(*heads)

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        """Map the student's heads to those ``found``; in order by default."""
        check_alike(f'has {{}} heads for {self.rows}', len(self.heads),
                    len(found))
        return dict(zip(self.heads, found))

    def _check_heads(self, student_head: nn.Module,
                     teacher_head: nn.Module) -> None:
        """Raise ConfigError if a head cannot learn from its match."""

    @abstractmethod
    def pairs(self, call: Call, batch: TeacherBatch) -> Sequence[LogitPair]:
        """Pair the student's logits with the teacher's for the same instances.

        Args:
            call (Call): A loss call of a head that has a match in ``heads``.
            batch (TeacherBatch): The batch, to ask the teacher about.

        Returns:
            Sequence[LogitPair]: One for each stage, level or output.
        """

    def _check_images(self, calls: List[Call], batch: TeacherBatch) -> None:
        """Raise ConfigError if a head's loss is of other images than the batch
        (semi-supervised models): the teacher's heads answer for it alone."""
        if any(call.images is not None and call.images is not batch.images
               for call in calls):
            raise ConfigError(
                'model.student', 'it computes losses of several batches in a '
                f'step, which cannot be distilled on {self.rows}',
                'choose a two-stage student, or the detector within')

    def is_classification_loss(self, name: str) -> bool:
        """Whether a loss of the student, e.g. 's0.loss_cls', is on the tapped
        class logits."""
        return 'loss_cls' in name and 'rpn' not in name

    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """Rows, columns and heads, e.g. ``images x 10 (softmax), head <-
        head``, for the start-up line."""
        learning = {s: t for s, t in self.heads.items() if t is not None}
        rows = self._describe_rows(student, next(iter(learning)))
        return ', '.join([rows] + [
            f'{path or "the model"} <- {twin or "the model"}'
            for path, twin in learning.items()
        ])

    def _describe_rows(self, student: nn.Module, path: str) -> str:
        """Rows and columns of the student's head at ``path``, in words."""
        return self.rows


def pair_logits(tap: LogitTap, calls: List[Call],
                batch: TeacherBatch) -> List[LogitPair]:
    """Pair the logits of all heads that learn from the teacher.

    Raises:
        ConfigError: If a head computed no loss, or one of other images.
    """
    learning = [path for path, twin in tap.heads.items() if twin is not None]
    read = [call for call in calls if call.path in learning]
    for path in learning:
        if path not in [call.path for call in read]:
            method = ' or '.join(f'`{call.method}`' for call in tap.reads)
            raise ConfigError(
                f'model.student.{path}', 'it computes its loss without a call '
                f'of its {method}, where its class logits are read',
                f'let its `loss` call {method}, or choose another head')
    tap._check_images(read, batch)
    return [pair for call in read for pair in tap.pairs(call, batch)]


def pair_of(tap: LogitTap, call: Call, batch: TeacherBatch, own: ClassLogits,
            theirs: ClassLogits, **fields: Any) -> LogitPair:
    """Pair a head's logits with those of its match, in the student's columns.

    Args:
        tap (LogitTap): The connected tap.
        call (Call): The loss call of the student's head.
        batch (TeacherBatch): The batch.
        own (tuple[Tensor, Columns]): The student's class logits ``(N, C, *)``
            and the meaning of ``C``.
        theirs (tuple[Tensor, Columns]): The teacher's, of the same instances.
        **fields: Further fields of the pair.
    """
    (student_logits, columns), (teacher_logits, their_columns) = own, theirs
    teacher_logits, activation = as_columns_of(columns, their_columns,
                                               teacher_logits, tap.class_map)
    fields.setdefault('num_classes', columns.num_classes)
    fields.setdefault('background', columns.background)
    if reads_text(call.student):
        student_logits, teacher_logits = common_tokens(student_logits,
                                                       teacher_logits)
        fields['num_classes'] = 0
    elif columns.num_classes == 1:
        thresholds = (threshold_of(call.student, call.path),
                      threshold_of(batch.model, tap.heads[call.path]))
        fields.setdefault('thresholds',
                          None if None in thresholds else thresholds)
    return LogitPair(student_logits, teacher_logits, columns.activation,
                     activation, **fields)


def find_tap(model: nn.Module) -> Optional[Type[LogitTap]]:
    """The first tap by priority that reads a model."""
    taps = sorted(TAPS.module_dict.values(), key=lambda tap: tap.priority)
    return next((tap for tap in taps if tap.find(model)), None)


def unknown_arguments(model: nn.Module, reads: Sequence[LossCall]) -> str:
    """A remark on the first head whose ``loss_by_feat`` no tap reads, or
    ''."""
    known = dict.fromkeys(name for call in reads
                          if call.method == 'loss_by_feat'
                          for name in call.class_arguments)
    for path, head in model.named_modules():
        method = getattr(head, 'loss_by_feat', None)
        names = signature_of(method).parameters if method else ()
        if known and names and not any(
                loss_call(head, tap.reads)
                for tap in TAPS.module_dict.values()):
            return (f' ({path}.loss_by_feat takes {", ".join(names)}; its '
                    'class logits are found if their argument is called '
                    f'{" or ".join(known)})')
    return ''
