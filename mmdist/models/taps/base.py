"""The one contract of all taps: where class logits are read off a head.

Every head of the two zoos hands its class predictions to one method before
it computes its loss, and the names of that method's arguments say what they
are. A tap watches this call on the student while the student computes its
own loss, and asks the teacher's head for its logits of the same instances.
It knows no detector and no segmentor.
"""
import inspect
from abc import ABCMeta, abstractmethod
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple)

import torch
from torch import Tensor, nn

from ..class_mapping import check_numbers
from .columns import Columns, logits_of
from .labels import NONE
from .teacher_batch import TeacherBatch, owner_of, replaced

# Lower ones (RTMDet's 0.001, or 0) keep every box for the metric, and say
# nothing about objects.
LEAST_THRESHOLD = 0.05
LEAST_LOGIT = -50.
"""Of a text's token that the caption of a picture does not have."""


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
        num_classes (int): The columns' classes; beside them there may be a
            background, and of several anchors each has its own.
        labels (Callable): Gives the class of every row, int64, in the shape
            of ``student`` without its columns, -1 where none is labelled (of
            one class: where it is not, and -2 where that is unknown); or
            None if the ground truth does not say.
        areas (Callable): Gives the area of the box of every labelled row, in
            pixels of the input, in the shape of the labels; or None if rows
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
        """How many answers a row chooses from.

        The classes; for one class, that it is there or not; 0 if the columns
        do not tell, or are no classes.
        """
        if self.num_classes != 1:
            return self.num_classes
        return 2 if self.background or self.thresholds else 0

    def truth(self) -> Optional[Tensor]:
        """The right answer of each row, -1 where it is unknown.

        The label; for one class, 0 where it is and 1 where it is not.
        """
        labels = self.labels()
        if labels is None or self.num_classes != 1:
            return labels
        return torch.where(labels == NONE, 1, labels).clamp(min=-1)


class BoxLogits(NamedTuple):
    """Boxes and the class logits that belong to them, picture by picture.

    Attributes:
        boxes (list[Tensor]): ``(R, 4)``, corners in pixels of the input.
        logits (list[Tensor]): ``(R, C)``.
        columns (Columns): What ``C`` are.
        one_to_one (bool): Whether each box is an object of its own.
    """
    boxes: List[Tensor]
    logits: List[Tensor]
    columns: Columns
    one_to_one: bool = False


@dataclass
class Call:
    """One watched call of a head's loss.

    Attributes:
        path (str): The head.
        arguments (dict): The call's arguments by name.
        images (Tensor, optional): ``(N, 3, H, W)``, the pictures that the
            head was given features of; None where the model computes its
            features otherwise than by ``extract_feat``.
        given (dict): The arguments by name with which the module that takes
            the features (:meth:`LogitTap.entry`) was called last.
    """
    path: str
    arguments: Dict[str, Any]
    images: Optional[Tensor] = None
    given: Optional[Dict[str, Any]] = None


def _nothing(arguments: Dict[str, Any]) -> None:
    """Do nothing before a call."""


@contextmanager
def watch_method(owner: Any,
                 method: str,
                 record: List[Any],
                 read: Callable[[dict, Any], Any],
                 before: Callable[[dict], None] = _nothing) -> Iterator[None]:
    """Record each call of a method of one object, then restore the object.

    Args:
        owner (Any): The object; only this instance is watched.
        method (str): The method's name.
        record (list): Gets ``read(arguments, result)`` appended a call, with
            the arguments by name.
        read (Callable): See ``record``.
        before (Callable): Is called with the arguments by name before the
            method is.
    """
    original = getattr(owner, method)
    signature = inspect.signature(original)

    @wraps(original)  # whoever watches it, too, reads its arguments
    def watched(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        before(dict(bound.arguments))
        result = original(*args, **kwargs)
        record.append(read(dict(bound.arguments), result))
        return result

    with replaced(owner, method, watched):
        yield


class PictureLog:
    """Remembers which pictures a model's features were computed of.

    A model may compute features of several batches before a head takes one
    of them (trackers, semi-supervised detectors), so the features that the
    head was given are looked up.
    """

    def __init__(self) -> None:
        self._extracted: List[Sequence[Any]] = []
        self._given: Dict[str, Dict[str, Any]] = {}

    @contextmanager
    def watch(self, owner: nn.Module, entries: Dict[str, nn.Module],
              see: Callable[[Any], None]) -> Iterator[None]:
        """Follow a model's ``extract_feat`` and the modules that take it.

        Args:
            owner (nn.Module): The model.
            entries (dict[str, nn.Module]): The modules, by paths of heads.
            see (Callable): Gets the images before the model computes the
                first features.
        """

        def before(arguments: Dict[str, Any]) -> None:
            if not self._extracted:
                see(_first(arguments))

        with ExitStack() as stack:
            stack.enter_context(
                watch_method(
                    owner, 'extract_feat', self._extracted,
                    lambda arguments, features: (_first(arguments), features),
                    before))
            for path, entry in entries.items():
                stack.enter_context(
                    watch_method(
                        entry,
                        'forward', [],
                        lambda arguments, _, path=path: self._given.update(
                            {path: arguments})))
            yield

    def given(self, path: str) -> Dict[str, Any]:
        """The arguments of the last call that took features for a head."""
        return self._given.get(path, {})

    def images_of(self, path: str) -> Optional[Tensor]:
        """The pictures whose features a head was given last."""
        first = next(tensors_in(_first(self.given(path))), None)
        for images, features in reversed(self._extracted):
            if any(first is feature for feature in tensors_in(features)):
                return images
        # Transformers stand between the features and the head.
        return self._extracted[-1][0] if self._extracted else None


def _first(arguments: Dict[str, Any]) -> Any:
    return next(iter(arguments.values()), None)


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple, dict)):
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors_in(item)


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
    # The loss call: its name, names of arguments that hold class logits, and
    # further arguments that it must have.
    method: str
    class_arguments: Sequence[str]
    needs: Sequence[str] = ()
    # What a row is, for messages.
    instances: str

    def __init__(self, student: nn.Module) -> None:
        # A teacher within the student (semi-supervised) does not learn.
        self.heads = [
            path for path in self.find(student)
            if _learns(student.get_submodule(path))
        ]
        self.teacher_heads: List[str] = []
        # The teacher's class for each of the student's, where they differ.
        self.class_map: Optional[List[int]] = None

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Paths of the heads of a model that this tap can read.

        Args:
            model (nn.Module): A detector, segmentor or classifier.

        Returns:
            list[str]: Paths for ``model.get_submodule``, in the order of the
            model.
        """
        return [
            path for path, module in model.named_modules()
            if cls.names_of(module)
        ]

    @classmethod
    def names_of(cls, head: nn.Module) -> List[str]:
        """The arguments of a head's loss call that hold class logits."""
        call = getattr(head, cls.method, None)
        names = list(inspect.signature(call).parameters) if call else []
        if not set(cls.needs) <= set(names):
            return []
        return [name for name in names if name in cls.class_arguments]

    def entry(self, path: str) -> str:
        """The module that takes the features for a head."""
        return path

    @contextmanager
    def watch(self,
              student: nn.Module,
              see: Callable[[Any], None] = _nothing) -> Iterator[List[Call]]:
        """Collect the loss calls of the student's heads.

        Args:
            student (nn.Module): The student, or a copy of it.
            see (Callable): Gets the images before the student computes their
                features.

        Yields:
            list[Call]: Filled while the student computes its loss.
        """
        calls: List[Call] = []
        log = PictureLog()
        with ExitStack() as stack:
            for owner in dict.fromkeys(
                    owner_of(student, path) for path in self.heads):
                if owner is not None:
                    entries = {
                        path: student.get_submodule(self.entry(path))
                        for path in self.heads
                        if owner_of(student, path) == owner
                    }
                    stack.enter_context(
                        log.watch(student.get_submodule(owner), entries, see))
            for path in self.heads:
                stack.enter_context(
                    watch_method(
                        student.get_submodule(path),
                        self.method,
                        calls,
                        read=lambda arguments, _, path=path: Call(
                            path, arguments, log.images_of(path),
                            log.given(path))))
            yield calls

    def connect(self,
                student: nn.Module,
                teacher: nn.Module,
                class_map: Optional[List[int]] = None) -> None:
        """Find the teacher's heads and make sure that they can be paired.

        Args:
            student (nn.Module): The student.
            teacher (nn.Module): The teacher.
            class_map (list[int], optional): The teacher's class for each of
                the student's.

        Raises:
            ValueError: If no pair is possible; names the field to change.
        """
        _check_texts(student, teacher, class_map)
        self.class_map = class_map
        self.teacher_heads = self._of_one_model(student, teacher)
        if not self.teacher_heads:
            raise ValueError(
                f'model.teacher.config is a {type(teacher).__name__}, which '
                f'has no class logits for {self.instances}'
                f'{unknown_arguments(teacher, self.class_arguments)}, but the '
                f'student is a {type(student).__name__} and learns from '
                'those; choose a teacher of the same kind, or let one of '
                "another kind answer for the student's boxes: model.tap="
                "dict(align='boxes')")
        self.check_pairable(student, teacher)

    def teacher_owner(self, teacher: nn.Module) -> str:
        """Path of the model within the teacher that computes its features."""
        return owner_of(teacher, self.teacher_heads[0]) or ''

    def _find_teacher(self, teacher: nn.Module) -> List[str]:
        return self.find(teacher)

    def _of_one_model(self, student: nn.Module,
                      teacher: nn.Module) -> List[str]:
        """The teacher's heads; of a model of several models, those of one."""
        heads = self._find_teacher(teacher)
        owners = [owner_of(teacher, path) for path in heads]
        own = owner_of(student, self.heads[0])
        chosen = own if own in owners else next(iter(owners), None)
        return [p for p, owner in zip(heads, owners) if owner == chosen]

    @abstractmethod
    def check_pairable(self, student: nn.Module, teacher: nn.Module) -> None:
        """Raise ValueError unless the heads of both can be paired."""

    def pairs(self, calls: List[Call], student: nn.Module,
              teacher: TeacherBatch) -> List[LogitPair]:
        """Pair the student's logits with the teacher's for the same instances.

        Args:
            calls (list[Call]): What :meth:`watch` collected.
            student (nn.Module): The student that was watched.
            teacher (TeacherBatch): The same batch, to ask the teacher about.

        Returns:
            list[LogitPair]: One a stage, a level or a head.
        """
        return [
            pair for call in calls if self.decides(call)
            for pair in self.pairs_of(call, student, teacher)
        ]

    @abstractmethod
    def pairs_of(self, call: Call, student: nn.Module,
                 teacher: TeacherBatch) -> Sequence[LogitPair]:
        """As :meth:`pairs`, of one call of a head that is distilled."""

    @classmethod
    def predicts_boxes(cls, head: nn.Module) -> bool:
        """Whether a head's class logits belong to boxes."""
        return False

    def check_batch(self, calls: List[Call], images: Any) -> None:
        """Make sure that a step's losses are of the step's images.

        Args:
            calls (list[Call]): The calls that :meth:`watch` collected.
            images (Any): The images that the teacher is asked about.

        Raises:
            ValueError: If the student chose other images (semi-supervised
                models), which the teacher's heads cannot be asked about.
        """
        if any(c.images is not None and c.images is not images for c in calls):
            raise ValueError(
                'model.student computes losses of several batches in a step, '
                f'which cannot be distilled on {self.instances}; choose a '
                'two-stage student, or the detector within')

    def distilled_heads(self) -> List[str]:
        """Paths of the student's heads that learn from the teacher."""
        return self.heads

    def decides(self, call: Call) -> bool:
        """Whether a call is of a head that is distilled."""
        return call.path in self.distilled_heads()

    def check_answered(self, calls: List[Call], student: nn.Module) -> None:
        """Make sure that all distilled heads computed their loss.

        Args:
            calls (list[Call]): The calls that :meth:`watch` collected.
            student (nn.Module): The student that was watched.

        Raises:
            ValueError: If one did not; names it.
        """
        answered = [call.path for call in calls if self.decides(call)]
        for path in self.distilled_heads():
            if path not in answered:
                head = type(student.get_submodule(path)).__name__
                raise ValueError(
                    f'model.student.{path} is a {head} that computes its loss '
                    f'without a call of its `{self.method}`, where its class '
                    f'logits are read; let its `loss` call `{self.method}`, '
                    'or choose another head')

    def weight_of(self, call: Call, student: nn.Module) -> float:
        """The weight that the student gives the loss of a call."""
        return 1.0

    def own_boxes(self, call: Call, head: nn.Module, num_boxes: int,
                  teacher: TeacherBatch) -> BoxLogits:
        """The student's boxes, without gradient, and their logits.

        Args:
            call (Call): Of the student's head.
            head (nn.Module): The student's head.
            num_boxes (int): Boxes a picture that a dense head may choose.
            teacher (TeacherBatch): The same batch.
        """
        raise ValueError(f"model.tap has align='boxes', but {self.instances} "
                         'of model.student have no boxes')

    @classmethod
    def answer_boxes(
        cls, teacher: TeacherBatch, heads: List[str], own: BoxLogits,
        call: Call, class_map: Optional[List[int]]
    ) -> Tuple[List[Tensor], List[Tensor], Columns]:
        """The teacher's logits for the student's boxes.

        Args:
            teacher (TeacherBatch): The batch.
            heads (list[str]): The teacher's heads.
            own (BoxLogits): The student's boxes.
            call (Call): Of the student's head.
            class_map (list[int], optional): The teacher's class for each of
                the student's.

        Returns:
            tuple[list[Tensor], list[Tensor], Columns]: Picture by picture
            the indices of the boxes that have an answer and the logits of
            these, ``(R, C)``; and what the columns are.
        """
        raise ValueError(f"model.tap has align='boxes', but {cls.instances} "
                         'of model.teacher have no boxes')

    def logits_in(self, call: Call) -> List[Tensor]:
        """The class logits of a call, as the head gave them to its loss."""
        return [
            logits for name in self.class_arguments
            for logits in tensors_in(call.arguments.get(name))
        ]

    def is_classification_loss(self, name: str) -> bool:
        """Whether a loss of the student belongs to the tapped class logits.

        Args:
            name (str): The key in the student's losses, e.g. 's0.loss_cls'.
        """
        return 'loss_cls' in name and 'rpn' not in name

    @abstractmethod
    def describe(self, student: nn.Module, teacher: nn.Module) -> str:
        """Rows, columns and their activation, for the start-up line."""


def unknown_arguments(model: nn.Module, known: Sequence[str]) -> str:
    """A remark on the first head whose loss call has no known argument.

    Args:
        model (nn.Module): A detector or segmentor.
        known (Sequence[str]): The names of arguments that hold class logits.

    Returns:
        str: Empty if there is no such head.
    """
    for path, head in model.named_modules():
        call = getattr(head, 'loss_by_feat', None)
        names = list(inspect.signature(call).parameters) if call else []
        if names and not set(names) & set(known):
            return (f' ({path}.loss_by_feat takes {", ".join(names)}; its '
                    'class logits are found if their argument is called '
                    f'{" or ".join(known)})')
    return ''


def _learns(head: nn.Module) -> bool:
    """Whether a head is trained."""
    parameters = list(head.parameters())
    return not parameters or any(p.requires_grad for p in parameters)


def thresholds_of(student: nn.Module, path_s: str, teacher: nn.Module,
                  path_t: str) -> Optional[Tuple[float, float]]:
    """The probabilities from which two detectors count a box as an object.

    Args:
        student (nn.Module): The student.
        path_s (str): Its head.
        teacher (nn.Module): The teacher.
        path_t (str): Its head.

    Returns:
        tuple[float, float] | None: ``score_thr`` of ``test_cfg``, which the
        head or a module around it has, but at least ``LEAST_THRESHOLD``; None
        if one of both has none.
    """
    thresholds = _threshold(student, path_s), _threshold(teacher, path_t)
    return None if None in thresholds else thresholds


def _threshold(model: nn.Module, path: str) -> Optional[float]:
    while path:
        cfg = getattr(model.get_submodule(path), 'test_cfg', None) or {}
        if 'score_thr' in cfg:
            return max(cfg['score_thr'], LEAST_THRESHOLD)
        path = path.rpartition('.')[0]
    return None


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


def class_logits(scores: Tensor, head: nn.Module) -> Tensor:
    """Logits of what a head hands to its loss, for ``activation_of(head)``.

    Args:
        scores (Tensor): The scores, classes in the last dimension if the
            loss has an activation of its own.
        head (nn.Module): A head of MMDetection.

    Returns:
        Tensor: Logits; probabilities (TOOD) are taken back, and two
        distributions of one loss (Seesaw's) become one.
    """
    loss = getattr(head, 'loss_cls', None)
    if getattr(loss, 'activated', False):
        return logits_of(scores)
    if getattr(head, 'custom_activation', False):
        probabilities = loss.get_activation(scores.float())
        return probabilities.clamp(min=torch.finfo(torch.float32).tiny).log()
    return scores


def reads_text(model: nn.Module) -> bool:
    """Whether a model classifies the tokens of a text, as GLIP does."""
    return hasattr(model, 'language_model')


def _check_texts(student: nn.Module, teacher: nn.Module,
                 class_map: Optional[Sequence[int]]) -> None:
    """Raise ValueError if one model alone classifies the tokens of a text."""
    texts = [reads_text(model) for model in (student, teacher)]
    if texts[0] != texts[1]:
        names = [type(model).__name__ for model in (teacher, student)]
        raise ValueError(
            f'model.teacher.config is a {names[0]} and model.student a '
            f'{names[1]}: one classifies the tokens of a text, the other '
            'classes; choose a teacher of the same kind')
    if texts[0] and class_map is not None:
        raise ValueError('model.teacher.class_map is of no use here: the '
                         'text that both models are given names the classes')


def check_tokens(number_s: int, number_t: int) -> None:
    """Raise ValueError unless both models read as many tokens."""
    if number_s != number_t:
        raise ValueError(
            f'model.teacher.config reads {number_t} tokens of a text but '
            f'model.student {number_s}; give both the same language_model '
            'and max_tokens')


def check_classes(student_head: nn.Module, teacher_head: nn.Module,
                  class_map: Optional[Sequence[int]]) -> None:
    """Raise ValueError unless the teacher predicts the student's classes.

    Args:
        student_head (nn.Module): The student's head.
        teacher_head (nn.Module): Its counterpart.
        class_map (Sequence[int], optional): The teacher's class for each of
            the student's; None if they are the same.
    """
    check_numbers(student_head.num_classes, teacher_head.num_classes,
                  class_map)
