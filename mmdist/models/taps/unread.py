"""Layers of a teacher's head whose results nobody reads.

A dense head predicts boxes beside classes, by half of its layers. Distilling
classes needs none of them, so the teacher need not compute them.
"""
import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .probe import CannotSay, cannot_say, probed
from .teacher_batch import replaced


@contextmanager
def left_out(head: nn.Module,
             layers: Dict[str, int],
             value: float = 0.) -> Iterator[None]:
    """Let layers of a head return one value at once.

    Args:
        head (nn.Module): The head.
        layers (dict[str, int]): Their paths in the head, and the channels
            that they return.
        value (float): What stands for their results.
    """

    def stand_in(channels: int) -> Callable:
        return lambda x: x.new_full((len(x), channels, *x.shape[2:]), value)

    with ExitStack() as stack:
        for path, channels in layers.items():
            stack.enter_context(
                replaced(
                    head.get_submodule(path), 'forward', stand_in(channels)))
        yield


def unread_layers(model: nn.Module, path: str,
                  read: Callable[[Any], List[Tensor]]) -> Dict[str, int]:
    """The layers of a head that what is read of its outputs does not need.

    They have no part in the gradient of what is read from a small random
    picture, and it stays the same bit by bit whatever they return, in the
    head's training and eval mode. Heads that take more than features are left
    as they are.

    Args:
        model (nn.Module): The teacher, in eval mode.
        path (str): Path of the head.
        read (Callable): Takes what the head's ``forward`` returns, and
            returns the tensors that are read.

    Returns:
        dict[str, int]: As :func:`left_out` takes it.
    """
    head = model.get_submodule(path)
    try:
        with probed(model, path) as outputs:
            found = [
                _unread(head, outputs, read, mode) for mode in (True, False)
            ]
    except CannotSay as error:
        print_log(
            f"All layers of the teacher's {path} are computed, because it "
            f'does not run on features alone: {error.__cause__!r}',
            logger='current',
            level=logging.DEBUG)
        return {}
    return found[0] if found[0] == found[1] else {}


def _unread(head: nn.Module, outputs: Callable[[], Any],
            read: Callable[[Any], List[Tensor]], mode: bool) -> Dict[str, int]:
    """:func:`unread_layers` of a head in one mode, its layers in eval."""
    head.training = mode
    try:
        layers = _without_gradient(head, outputs, read)
        with torch.no_grad():
            whole = read(outputs())
            for value in (0., 100., -100.):
                with left_out(head, layers, value), cannot_say():
                    others = outputs()
                if not all(map(torch.equal, whole, read(others))):
                    return {}
        return layers
    finally:
        head.training = False


def _without_gradient(head: nn.Module, outputs: Callable[[], Any],
                      read: Callable[[Any], List[Tensor]]) -> Dict[str, int]:
    """The outermost layers of maps that have no part in a gradient."""
    parameters = list(head.parameters())
    learning = [p.requires_grad for p in parameters]
    channels: Dict[nn.Module, int] = {}
    with ExitStack() as stack, torch.enable_grad():
        for layer in head.modules():
            hook = layer.register_forward_hook(_note_channels(channels))
            stack.callback(hook.remove)
        stack.callback(_set_learning, parameters, learning)
        _set_learning(parameters, [True] * len(parameters))
        with cannot_say():
            predicted = outputs()
        total = sum(tensor.float().sum() for tensor in read(predicted))
        with cannot_say():  # some operators have no backward on a CPU
            gradients = torch.autograd.grad(
                total, parameters, allow_unused=True)
    needed = {id(p) for p, g in zip(parameters, gradients) if g is not None}
    found: Dict[str, int] = {}
    for path, layer in head.named_modules():
        own = [id(p) for p in layer.parameters()]
        within = any(path.startswith(f'{outer}.') for outer in found)
        if own and layer in channels and not within and not needed & set(own):
            found[path] = channels[layer]
    return found


def _note_channels(channels: Dict[nn.Module, int]) -> Callable:
    """A hook that notes what takes a map and returns one of its size."""

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        maps = (*inputs, output)
        if len(maps) == 2 and all(
                isinstance(x, Tensor) and x.dim() == 4
                for x in maps) and inputs[0].shape[2:] == output.shape[2:]:
            channels[layer] = output.shape[1]

    return note


def _set_learning(parameters: List[nn.Parameter],
                  learning: List[bool]) -> None:
    for parameter, learns in zip(parameters, learning):
        parameter.requires_grad_(learns)
