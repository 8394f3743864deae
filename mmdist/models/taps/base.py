"""The one contract of all taps: where class logits are read off a head.

Every head of the two zoos hands its class predictions to one method before
it computes its loss, and the name of that method's first argument says what
they are. A tap watches this call on the student while the student computes
its own loss, and asks the teacher's head for its logits of the same
instances. It knows no detector and no segmentor.
"""
import inspect
from abc import ABCMeta, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from torch import Tensor, nn


@dataclass
class LogitPair:
    """The logits of student and teacher for the same instances.

    Attributes:
        student (Tensor): ``(R, C)``, or ``(N, C, *spatial)`` where every
            position is a row.
        teacher (Tensor): The same shape, without gradient.
        student_activation (str): 'softmax' or 'sigmoid'.
        teacher_activation (str): 'softmax' or 'sigmoid'.
        weight (float): The weight that the student's head gives its own loss.
        name (str): The stage, level or head, e.g. 'level 0'.
    """
    student: Tensor
    teacher: Tensor
    student_activation: str = 'softmax'
    teacher_activation: str = 'softmax'
    weight: float = 1.0
    name: str = ''


@dataclass
class Call:
    """One watched call: the head's path and the arguments by name."""
    path: str
    arguments: Dict[str, Any]


@contextmanager
def watch_method(owner: Any, method: str, record: List[Any],
                 read: Callable[[dict, Any], Any]) -> Iterator[None]:
    """Record each call of a method of one object, then restore the object.

    Args:
        owner (Any): The object; only this instance is watched.
        method (str): The method's name.
        record (list): Gets ``read(arguments, result)`` appended a call, with
            the arguments by name.
        read (Callable): See ``record``.
    """
    original = getattr(owner, method)
    signature = inspect.signature(original)

    def watched(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        result = original(*args, **kwargs)
        record.append(read(dict(bound.arguments), result))
        return result

    # Heads are modules: their __setattr__ would do, but an entry that was in
    # the instance's __dict__ before must come back as it was.
    before = owner.__dict__.get(method)
    owner.__dict__[method] = watched
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[method]
        else:
            owner.__dict__[method] = before


class LogitTap(metaclass=ABCMeta):
    """Reads class logits off the heads of one kind.

    A tap keeps paths of heads, not heads, so that it can be copied with the
    model and works on any copy.

    Args:
        student (nn.Module): The student.

    Attributes:
        heads (list[str]): Paths of the student's heads that are watched.
        teacher_heads (list[str]): Paths of the teacher's, after
            :meth:`connect`.
    """
    # The loss call: its name, the names of its first argument that say 'class
    # logits', and further arguments that it must have.
    method: str
    first_arguments: Sequence[str]
    needs: Sequence[str] = ()
    # What a row is, for messages.
    instances: str

    def __init__(self, student: nn.Module) -> None:
        self.heads = self.find(student)
        self.teacher_heads = []

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Paths of the heads of a model that this tap can read.

        Args:
            model (nn.Module): A detector or segmentor.

        Returns:
            list[str]: Paths for ``model.get_submodule``, in the order of the
            model.
        """
        return [
            path for path, module in model.named_modules()
            if cls._reads(getattr(module, cls.method, None))
        ]

    @classmethod
    def _reads(cls, call: Optional[Callable]) -> bool:
        """Whether the arguments of a head's loss call say 'class logits'."""
        names = list(inspect.signature(call).parameters) if call else []
        return bool(names) and names[0] in cls.first_arguments and set(
            cls.needs) <= set(names)

    @contextmanager
    def watch(self, student: nn.Module) -> Iterator[List[Call]]:
        """Collect the loss calls of the student's heads.

        Args:
            student (nn.Module): The student, or a copy of it.

        Yields:
            list[Call]: Filled while the student computes its loss.
        """
        calls = []
        with ExitStack() as stack:
            for path in self.heads:
                stack.enter_context(
                    watch_method(
                        student.get_submodule(path),
                        self.method,
                        calls,
                        read=lambda arguments, _, path=path: Call(
                            path, arguments)))
            yield calls

    def connect(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the teacher's heads and make sure that they can be paired.

        Args:
            student (nn.Module): The student.
            teacher (nn.Module): The teacher.

        Raises:
            ValueError: If no pair is possible; names the field to change.
        """
        self.teacher_heads = self.find(teacher)
        if not self.teacher_heads:
            raise ValueError(
                f'model.teacher.config is a {type(teacher).__name__}, which '
                f'has no class logits for {self.instances}, but the student '
                f'is a {type(student).__name__} and learns from those; '
                'choose a teacher of the same kind')
        self.check_pairable(student, teacher)

    @abstractmethod
    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ValueError unless the heads of both can be paired."""

    @abstractmethod
    def pairs(self, calls: List[Call], student: nn.Module, teacher: nn.Module,
              features: Sequence[Tensor]) -> List[LogitPair]:
        """Pair the student's logits with the teacher's for the same instances.

        Args:
            calls (list[Call]): What :meth:`watch` collected.
            student (nn.Module): The student that was watched.
            teacher (nn.Module): The teacher; runs without gradient.
            features (Sequence[Tensor]): The teacher's features of the batch.

        Returns:
            list[LogitPair]: One a stage, a level or a head.
        """

    def is_classification_loss(self, name: str) -> bool:
        """Whether a loss of the student belongs to the tapped class logits.

        Args:
            name (str): The key in the student's losses, e.g. 's0.loss_cls'.
        """
        return name.rpartition('.')[2].startswith('loss_cls')

    @abstractmethod
    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """Rows, columns and their activation, for the start-up line."""


def activation_of(head: nn.Module) -> str:
    """The activation that turns a head's class logits into probabilities.

    Args:
        head (nn.Module): A head of MMDetection.

    Returns:
        str: 'softmax' or 'sigmoid'.
    """
    loss = getattr(head, 'loss_cls', None)
    sigmoid = getattr(head, 'use_sigmoid_cls',
                      getattr(loss, 'use_sigmoid', False))
    return 'sigmoid' if sigmoid else 'softmax'


def check_class_counts(student_head: nn.Module,
                       teacher_head: nn.Module) -> None:
    """Raise ValueError unless both heads predict as many classes."""
    if student_head.num_classes != teacher_head.num_classes:
        raise ValueError(
            f'model.teacher predicts {teacher_head.num_classes} classes but '
            f'model.student predicts {student_head.num_classes}; choose a '
            "teacher of the student's classes, or set num_classes of the "
            "student's head")
