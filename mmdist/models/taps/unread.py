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
from .watch import replaced


@contextmanager
def left_out(head: nn.Module,
             layers: Dict[str, int],
             value: float = 0.) -> Iterator[None]:
    """Let layers of a head, by path, return maps of so many channels and of
    one value at once."""

    def constant(channels: int) -> Callable:
        return lambda x: x.new_full((len(x), channels, *x.shape[2:]), value)

    with ExitStack() as stack:
        for path, channels in layers.items():
            layer = head.get_submodule(path)
            stack.enter_context(replaced(layer, 'forward', constant(channels)))
        yield


def unread_layers(model: nn.Module, path: str,
                  read: Callable[[Any], List[Tensor]]) -> Dict[str, int]:
    """The layers of a teacher's head that the read logits do not need.

    They have no part in the gradient of the tensors that `read` returns of the
    result for a small random image, and these stay the same bit by bit
    whatever the layers return, in the head's training and eval mode. Heads
    that take more than features are left as they are.

    Returns:
        dict[str, int]: Paths in the head and channels, for :func:`left_out`.
    """
    head = model.get_submodule(path)
    found = []
    try:
        with probed(model, path) as outputs:
            for mode in (True, False):
                head.training = mode
                layers = _without_gradient(head, outputs, read)
                with torch.no_grad():
                    whole = read(outputs())
                    for value in (0., 100., -100.):
                        with left_out(head, layers, value), cannot_say():
                            others = outputs()
                        if not all(map(torch.equal, whole, read(others))):
                            return {}
                found.append(layers)
    except CannotSay as error:
        print_log(
            f"All layers of the teacher's {path} are computed, because it "
            f'does not run on features alone: {error.__cause__!r}',
            logger='current',
            level=logging.DEBUG)
        return {}
    finally:
        head.training = False
    return found[0] if found[0] == found[1] else {}


def _without_gradient(head: nn.Module, outputs: Callable[[], Any],
                      read: Callable[[Any], List[Tensor]]) -> Dict[str, int]:
    """The outermost layers of maps that have no part in a gradient."""
    parameters = list(head.parameters())
    channels: Dict[nn.Module, int] = {}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        """Note the channels of a layer whose maps keep their size."""
        maps = (*inputs, output)
        if len(maps) == 2 and all(
                isinstance(x, Tensor) and x.dim() == 4
                for x in maps) and inputs[0].shape[2:] == output.shape[2:]:
            channels[layer] = output.shape[1]

    with ExitStack() as stack, torch.enable_grad():
        for layer in head.modules():
            stack.callback(layer.register_forward_hook(note).remove)
        for parameter in parameters:
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(True)
        with cannot_say():
            predicted = outputs()
        total = sum(tensor.float().sum() for tensor in read(predicted))
        with cannot_say():  # some operators have no backward on a CPU
            gradients = torch.autograd.grad(
                total, parameters, allow_unused=True)
    needed = {id(p) for p, g in zip(parameters, gradients) if g is not None}
    found: Dict[str, int] = {}
    for path, layer in head.named_modules():
        own = {id(p) for p in layer.parameters()}
        within = any(path.startswith(f'{outer}.') for outer in found)
        if own and layer in channels and not within and not needed & own:
            found[path] = channels[layer]
    return found
