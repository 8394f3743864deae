"""Watches the calls in which heads hand their class logits to their loss."""
import inspect
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, wraps
from types import MethodType
from typing import (TYPE_CHECKING, Any, Callable, Dict, Iterator, List,
                    NamedTuple, Optional, Sequence, Tuple)

from torch import Tensor, nn

if TYPE_CHECKING:
    from .base import LogitTap


@lru_cache(maxsize=256)
def _signature(function: Callable) -> inspect.Signature:
    # Bound to anything, which drops `self`.
    return inspect.signature(MethodType(function, function))


def signature_of(function: Callable) -> inspect.Signature:
    """The signature of a function or a method.

    That of a method is read once for its class, so that steps do not pay for
    it; models are not referred to.
    """
    if inspect.ismethod(function):
        return _signature(function.__func__)
    return inspect.signature(function)


def named_arguments(function: Callable, args: Sequence[Any],
                    kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of a call by name; some may be missing."""
    return dict(signature_of(function).bind_partial(*args, **kwargs).arguments)


class LossCall(NamedTuple):
    """A call of a head's loss, in which its class logits are read.

    Attributes:
        method (str): The method that computes the loss.
        class_arguments (Sequence[str]): Names of arguments with class logits.
        needs (Sequence[str]): Further arguments that the method must have and
            that must not be None in a call.
    """
    method: str
    class_arguments: Sequence[str]
    needs: Sequence[str] = ()


def loss_call(head: nn.Module,
              reads: Sequence[LossCall]) -> Optional[LossCall]:
    """The first of some calls that a head has, with its class arguments."""
    for call in reads:
        method = getattr(head, call.method, None)
        names = signature_of(method).parameters if method else ()
        found = [name for name in names if name in call.class_arguments]
        if found and set(call.needs) <= set(names):
            return call._replace(class_arguments=found)
    return None


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
    """
    student: nn.Module
    path: str
    arguments: Dict[str, Any]
    images: Optional[Tensor] = None
    given: Dict[str, Any] = field(default_factory=dict)
    logits: List[Tensor] = field(default_factory=list)

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

    ``record`` gets ``read(arguments, result)`` of each call, with the
    arguments by name, which ``before`` gets before the method runs.
    """
    original = getattr(owner, method)

    @wraps(original)  # keeps the signature for whoever else watches it
    def watched(*args, **kwargs):
        arguments = named_arguments(original, args, kwargs)
        if before:
            before(dict(arguments))
        result = original(*args, **kwargs)
        record.append(read(arguments, result))
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
        tap (LogitTap): The student's tap.
        student (nn.Module): The student, or a copy of it.
        see (Callable): Gets the images before their features are computed.

    Yields:
        list[Call]: Filled while the student computes its loss.
    """
    calls: List[Call] = []
    extracted: List[Tuple[Any, Any]] = []
    # The calls of the modules that take the features, by head.
    given: Dict[str, List[dict]] = defaultdict(list)

    def images_of(arguments: dict) -> Any:
        taken = next(tensors_in(_first(arguments)), None)
        for images, features in reversed(extracted):
            if any(taken is feature for feature in tensors_in(features)):
                return images
        # Transformers stand between the features and the head.
        return extracted[-1][0] if extracted else None

    def read(path: str, arguments: dict, _: Any) -> Call:
        last = given[path][-1] if given[path] else {}
        names = tap._calls[path].class_arguments
        return Call(student, path, arguments, images_of(last), last,
                    list(tensors_in([arguments.get(n) for n in names])))

    def see_first(arguments: dict) -> None:
        if not extracted:
            see(_first(arguments))

    with ExitStack() as stack:
        for owner in {owner_of(student, path) for path in tap.heads} - {None}:
            stack.enter_context(
                watch_method(
                    student.get_submodule(owner), 'extract_feat', extracted,
                    lambda arguments, features: (_first(arguments), features),
                    see_first))
        for path in tap.heads:
            head = takes = student.get_submodule(path)
            parent, _, stage = path.partition('.bbox_head')
            if hasattr(student.get_submodule(parent), 'bbox_roi_extractor'):
                # RoI extractors take the features for box heads.
                takes = student.get_submodule(
                    f'{parent}.bbox_roi_extractor{stage}')
            stack.enter_context(
                watch_method(takes, 'forward', given[path],
                             lambda arguments, _: arguments))
            stack.enter_context(
                watch_method(head, tap._calls[path].method, calls,
                             partial(read, path)))
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
    outer = path.rpartition('.')[0]
    if hasattr(model.get_submodule(outer), 'extract_feat'):
        return outer
    return owner_of(model, outer) if outer else None
