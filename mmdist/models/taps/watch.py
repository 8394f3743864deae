"""Watches the calls in which heads hand their class logits to their loss."""
import inspect
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
    """The signature of a function or, read once for its class, a method."""
    if inspect.ismethod(function):
        return _signature(function.__func__)
    return inspect.signature(function)


def named_arguments(function: Callable, args: Sequence[Any],
                    kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """The arguments of a call by name; some may be missing."""
    return dict(signature_of(function).bind_partial(*args, **kwargs).arguments)


class LossCall(NamedTuple):
    """A call of a head's loss: the method, the names of its arguments with
    class logits, and of further arguments that must not be None."""
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
        after: Callable[[dict, Any], None] = lambda arguments, result: None,
        before: Callable[[dict],
                         None] = lambda arguments: None) -> Iterator[None]:
    """Watch the calls of a method of one object, then restore the object.

    ``before`` gets the arguments of each call by name before the method runs,
    and ``after`` gets them with its result.
    """
    original = getattr(owner, method)

    @wraps(original)  # keeps the signature for whoever else watches it
    def watched(*args, **kwargs):
        arguments = named_arguments(original, args, kwargs)
        before(dict(arguments))
        result = original(*args, **kwargs)
        after(arguments, result)
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
    one of them (trackers, semi-supervised detectors), so the images of a call
    are those whose features the head was given. ``see`` gets the first images
    before their features are computed. Yields a list that is filled while the
    student computes its loss.
    """
    calls: List[Call] = []
    extracted: List[Tuple[Any, Any]] = []
    # The last call of the modules that take the features, by head.
    given: Dict[str, dict] = {}

    def images_of(arguments: dict) -> Any:
        taken = next(tensors_in(_first(arguments)), None)
        for images, features in reversed(extracted):
            if any(taken is feature for feature in tensors_in(features)):
                return images
        # Transformers stand between the features and the head.
        return extracted[-1][0] if extracted else None

    def read(path: str, call: LossCall, arguments: dict, _: Any) -> None:
        if all(arguments.get(name) is not None for name in call.needs):
            last = given.get(path, {})
            logits = [arguments.get(name) for name in call.class_arguments]
            calls.append(
                Call(student, path, arguments, images_of(last), last,
                     list(tensors_in(logits))))

    with ExitStack() as stack:

        def watch(module: nn.Module, *options: Any) -> None:
            stack.enter_context(watch_method(module, *options))

        for owner in {owner_of(student, path) for path in tap.heads} - {None}:
            watch(
                student.get_submodule(owner), 'extract_feat',
                lambda arguments, features: extracted.append(
                    (_first(arguments), features)),
                lambda arguments: extracted or see(_first(arguments)))
        for path in tap.heads:
            head = takes = student.get_submodule(path)
            parent, _, stage = path.partition('.bbox_head')
            if hasattr(student.get_submodule(parent), 'bbox_roi_extractor'):
                # RoI extractors take the features for box heads.
                takes = student.get_submodule(
                    f'{parent}.bbox_roi_extractor{stage}')
            call = loss_call(head, tap.reads)
            watch(
                takes,
                'forward',
                lambda arguments, _, path=path: given.update({path: arguments})
            )
            watch(head, call.method, partial(read, path, call))
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
