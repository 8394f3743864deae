"""Watches the calls in which heads hand their class logits to their loss."""
import inspect
from collections import deque
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import (TYPE_CHECKING, Any, Callable, Dict, Iterator, List,
                    NamedTuple, Optional, Sequence, Tuple)

from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import LogitTap


class LossCall(NamedTuple):
    """A call of a head's loss, in which its class logits are read.

    Attributes:
        method (str): The method that computes the loss.
        class_arguments (Sequence[str]): Names of arguments that hold class
            logits.
        needs (Sequence[str]): Further arguments that the method must have and
            that must not be None in a call.
    """
    method: str
    class_arguments: Sequence[str]
    needs: Sequence[str] = ()

    def of(self, head: nn.Module) -> Optional['LossCall']:
        """The call with the class arguments of one head; None without any."""
        method = getattr(head, self.method, None)
        names = list(inspect.signature(method).parameters) if method else []
        found = [name for name in names if name in self.class_arguments]
        if not found or not set(self.needs) <= set(names):
            return None
        return self._replace(class_arguments=found)


def loss_call(head: nn.Module,
              reads: Sequence[LossCall]) -> Optional[LossCall]:
    """The first of some calls that a head has, with its class arguments."""
    return next(filter(None, (call.of(head) for call in reads)), None)


@dataclass
class Call:
    """One watched call of a head's loss.

    Attributes:
        student (nn.Module): The student, or a copy of it.
        path (str): The head.
        arguments (dict): The call's arguments by name.
        images (Tensor, optional): ``(N, C, H, W)``, the images whose features
            the head was given; None for a model without ``extract_feat``.
        given (dict): The arguments by name of the last call of the module
            that takes the features: the head, or its RoI extractor.
        logits (list[Tensor]): All class logits among the arguments.
        is_whole (bool): Whether no argument that the tap needs is None.
    """
    student: nn.Module
    path: str
    arguments: Dict[str, Any]
    images: Optional[Tensor] = None
    given: Dict[str, Any] = field(default_factory=dict)
    logits: List[Tensor] = field(default_factory=list)
    is_whole: bool = True

    @property
    def head(self) -> nn.Module:
        """The student's head."""
        return self.student.get_submodule(self.path)


@contextmanager
def replaced(owner: Any, method: str, function: Callable) -> Iterator[None]:
    """Replace a method of one object, then restore the object."""
    # An entry that the instance's __dict__ had before comes back as it was.
    before = owner.__dict__.get(method)
    owner.__dict__[method] = function
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[method]
        else:
            owner.__dict__[method] = before


@contextmanager
def watch_method(
        owner: Any,
        method: str,
        record: List[Any],
        read: Callable[[dict, Any], Any],
        before: Optional[Callable[[dict], None]] = None) -> Iterator[None]:
    """Record each call of a method of one object, then restore the object.

    Args:
        owner (Any): The object; only this instance is watched.
        method (str): The method's name.
        record (list | deque): Gets ``read(arguments, result)`` of each call,
            with the arguments by name.
        read (Callable): See ``record``.
        before (Callable, optional): Gets the arguments by name before the
            method runs.
    """
    original = getattr(owner, method)
    signature = inspect.signature(original)

    @wraps(original)  # keeps the signature for whoever else watches it
    def watched(*args, **kwargs):
        arguments = signature.bind(*args, **kwargs).arguments
        if before:
            before(dict(arguments))
        result = original(*args, **kwargs)
        record.append(read(dict(arguments), result))
        return result

    with replaced(owner, method, watched):
        yield


@contextmanager
def watch_heads(
        tap: 'LogitTap',
        student: nn.Module,
        see: Callable[[Any],
                      None] = lambda images: None) -> Iterator[List[Call]]:
    """Collect the loss calls of a student's heads.

    A model may compute the features of several batches before a head takes
    one of them (trackers, semi-supervised detectors), so the images are those
    whose features the head was given.

    Args:
        tap (LogitTap): The heads and what it reads of them.
        student (nn.Module): The student, or a copy of it.
        see (Callable): Gets the images before the student computes their
            features.

    Yields:
        list[Call]: Filled while the student computes its loss.
    """
    calls: List[Call] = []
    extracted: List[Tuple[Any, Any]] = []
    # The last arguments of the modules that take the features.
    given: Dict[str, Any] = {path: deque(maxlen=1) for path in tap.heads}

    def images_of(arguments: dict) -> Any:
        taken = next(tensors_in(_first(arguments)), None)
        for images, features in reversed(extracted):
            if any(taken is feature for feature in tensors_in(features)):
                return images
        # Transformers stand between the features and the head.
        return extracted[-1][0] if extracted else None

    def read(path: str, call: LossCall, arguments: dict, _: Any) -> Call:
        last = given[path][-1] if given[path] else {}
        logits = [arguments.get(name) for name in call.class_arguments]
        needed = [arguments.get(name) is not None for name in call.needs]
        return Call(student, path, arguments, images_of(last), last,
                    list(tensors_in(logits)), all(needed))

    def see_first(arguments: dict) -> None:
        if not extracted:
            see(_first(arguments))

    with ExitStack() as stack:
        for owner in dict.fromkeys(
                owner_of(student, path) for path in tap.heads):
            if owner is not None:
                stack.enter_context(
                    watch_method(
                        student.get_submodule(owner), 'extract_feat',
                        extracted, lambda arguments, features:
                        (_first(arguments), features), see_first))
        modules = dict(student.named_modules())
        for path in tap.heads:
            head = modules[path]
            call = loss_call(head, tap.reads)
            # RoI extractors take the features for box heads.
            takes = modules.get(
                path.replace('.bbox_head', '.bbox_roi_extractor'), head)
            stack.enter_context(
                watch_method(takes, 'forward', given[path],
                             lambda arguments, _: arguments))
            stack.enter_context(
                watch_method(head, call.method, calls,
                             partial(read, path, call)))
        yield calls


def _first(arguments: Dict[str, Any]) -> Any:
    return next(iter(arguments.values()), None)


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors of nested lists, tuples and dicts."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (list, tuple, dict)):
        for item in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors_in(item)


def owner_of(model: nn.Module, path: str) -> Optional[str]:
    """Path of the innermost model around a head that computes its features: ''
    for the whole model, None without ``extract_feat``."""
    parts = path.split('.')
    for end in range(len(parts) - 1, -1, -1):
        owner = '.'.join(parts[:end])
        if hasattr(model.get_submodule(owner), 'extract_feat'):
            return owner
    return None
