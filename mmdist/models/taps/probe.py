"""Facts about a model that a random image shows."""
import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .columns import check_alike
from .watch import owner_of, replaced

RGB = 3
# The side of 128 is the largest stride; SSD needs more, and 320 is a multiple
# of 32, which YOLOX and YOLOv3 need beside it.
PROBE_SIZES = (128, 320, 512)


class Probe(NamedTuple):
    """Features of a model for a random image of some channels and size."""
    channels: int
    size: int
    features: Any


class CannotSay(Exception):
    """A model does not run on an image alone; the cause is its error."""


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part of it back after."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradient; restore modes and random state."""
    like = next(model.parameters())
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices), eval_mode(model), torch.no_grad():
        yield


def first_channels(model: nn.Module) -> int:
    """Number of channels that the first convolution of a model takes."""
    for layer in model.modules():
        weight = getattr(layer, 'weight', None)
        if weight is not None and weight.dim() >= 4:
            return weight.shape[1] * getattr(layer, 'groups', 1)
    return RGB


def probe(model: nn.Module, sizes: Sequence[int] = PROBE_SIZES) -> Probe:
    """Compute the features of a random image, in eval mode.

    Raises:
        CannotSay: If the model takes none of the sizes, in pixels.
    """
    like = next(model.parameters())
    error = None
    with _undisturbed(model):
        for size in sizes:
            # Some first convolutions take an image in slices (YOLOX).
            for channels in dict.fromkeys((RGB, first_channels(model))):
                image = torch.randn(1, channels, size, size).to(like)
                try:
                    return Probe(channels, size, model.extract_feat(image))
                except Exception as caught:
                    error = caught
    raise CannotSay from error


@contextmanager
def probed(model: nn.Module, path: str) -> Iterator[Callable[[], Any]]:
    """Yield a function that returns a head's ``forward`` for the features of a
    random image; both raise CannotSay if the model fails."""
    owner, head = (model.get_submodule(owner_of(model, path)
                                       or ''), model.get_submodule(path))
    features = probe(owner).features

    def outputs() -> Any:
        try:
            return head(features)
        except Exception as error:
            raise CannotSay from error

    with _undisturbed(owner):
        yield outputs


@contextmanager
def left_out(head: nn.Module,
             layers: Dict[str, int],
             value: float = 0.) -> Iterator[None]:
    """Replace layers of a head, by path, with constant maps of so many
    channels."""

    def constant(channels: int, x: Tensor) -> Tensor:
        return x.new_full((len(x), channels, *x.shape[2:]), value)

    with ExitStack() as stack:
        for path, channels in layers.items():
            stack.enter_context(
                replaced(
                    head.get_submodule(path), 'forward',
                    partial(constant, channels)))
        yield


def unread_layers(model: nn.Module, path: str,
                  read: Callable[[Any], List[Tensor]]) -> Dict[str, int]:
    """The layers of a teacher's head that the read logits do not need.

    A dense head predicts boxes beside classes, by half of its layers, which
    the teacher need not compute. The tensors that `read` returns of the result
    for a random image stay the same bit by bit whatever these layers return,
    in the head's training and eval mode. Heads that take more than features
    are left as they are.

    Returns:
        dict[str, int]: Paths in the head and channels, for :func:`left_out`.
    """
    head = model.get_submodule(path)

    def same(layers: Dict[str, int], value: float) -> bool:
        """Whether layers that return a value leave the whole logits alone."""
        with left_out(head, layers, value):
            return all(map(torch.equal, whole, read(outputs())))

    try:
        with probed(model, path) as outputs:
            layers = _map_layers(head, outputs)
            for mode in (False, True):
                head.training = mode
                whole = read(outputs())
                layers = {
                    layer: channels
                    for layer, channels in layers.items()
                    if same({layer: channels}, 0.)
                }
                if not all(same(layers, value) for value in (0., 100., -100.)):
                    return {}
            return layers
    except CannotSay as error:
        print_log(
            f"All layers of the teacher's {path} are computed, because it "
            f'does not run on features alone: {error.__cause__!r}',
            logger='current',
            level=logging.DEBUG)
        return {}


def _map_layers(head: nn.Module, outputs: Callable[[], Any]) -> Dict[str, int]:
    """The channels of the outermost layers with weights that turn a map into
    one of its size, by path."""
    channels: Dict[str, int] = {}

    def note(path: str, _: nn.Module, inputs: tuple, output: Any) -> None:
        maps = (*inputs, output)
        if len(maps) == 2 and all(
                isinstance(x, Tensor) and x.dim() == 4
                for x in maps) and inputs[0].shape[2:] == output.shape[2:]:
            channels[path] = output.shape[1]

    with ExitStack() as stack:
        for path, layer in head.named_modules():
            if next(layer.parameters(), None) is not None:
                stack.enter_context(
                    layer.register_forward_hook(partial(note, path)))
        outputs()
    return {
        path: channels[path]
        for path in channels
        if not any(path.startswith(f'{outer}.') for outer in channels)
    }


def check_image_channels(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ConfigError if the models take images of other channels."""
    if first_channels(student) == first_channels(teacher):
        return
    try:
        channels = [probe(model).channels for model in (student, teacher)]
    except CannotSay:
        return  # the first iteration says it
    check_alike(
        'takes images of {} channels', *channels, 'choose a teacher of the '
        'same images, or set in_channels of both backbones alike')
