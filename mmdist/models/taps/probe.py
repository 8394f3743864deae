"""Facts about a model that a random image shows."""
import logging
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.errors import ConfigError
from .columns import check_alike
from .watch import owner_of, replaced

RGB = 3
# The side of 128 is the largest stride; SSD needs more.
PROBE_SIZES = (128, 512)


class Probe(NamedTuple):
    """Features of a model for a random image.

    Attributes:
        channels (int): Channels of the image.
        size (int): Height and width of the image, in pixels.
        features (Any): The result of ``extract_feat``.
    """
    channels: int
    size: int
    features: Any


class CannotSay(Exception):
    """A model that does not run on an image alone, or not backward."""


@contextmanager
def cannot_say() -> Iterator[None]:
    """Raise :class:`CannotSay` for any error of a model."""
    try:
        yield
    except Exception as error:
        raise CannotSay from error


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


def first_channels(model: nn.Module) -> int:
    """Number of channels that the first convolution of a model takes."""
    for layer in model.modules():
        weight = getattr(layer, 'weight', None)
        if weight is not None and weight.dim() >= 4:
            return weight.shape[1] * getattr(layer, 'groups', 1)
    return RGB


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode within; random numbers and modes as they were after."""
    like = next(model.parameters())
    devices = [like.device] if like.is_cuda else []
    with torch.random.fork_rng(devices=devices), eval_mode(model):
        yield


def probe(model: nn.Module, sizes: Sequence[int] = PROBE_SIZES) -> Probe:
    """Compute the features of a random image, in eval mode.

    Raises:
        CannotSay: If the model takes none of the sizes, in pixels.
    """
    like = next(model.parameters())
    error = None
    with _undisturbed(model), torch.no_grad():
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
    random image, in eval mode.

    Raises:
        CannotSay: If the model has no features of an image alone.
    """
    owner = model.get_submodule(owner_of(model, path) or '')
    features = probe(owner).features
    with _undisturbed(owner):
        yield lambda: model.get_submodule(path)(features)


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


@torch.no_grad()
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
    try:
        with probed(model, path) as outputs:
            whole = {}
            for mode in (False, True):
                head.training = mode
                with cannot_say():
                    predicted = outputs()
                whole[mode] = read(predicted)

            def same(layers: Dict[str, int], value: float) -> bool:
                with left_out(head, layers, value), cannot_say():
                    others = outputs()
                return all(
                    map(torch.equal, whole[head.training], read(others)))

            found = {
                layer: channels
                for layer, channels in _map_layers(head, outputs).items()
                if same({layer: channels}, 0.)
            }
            for mode in whole:
                head.training = mode
                if not all(same(found, value) for value in (0., 100., -100.)):
                    return {}
            return found
    except CannotSay as error:
        print_log(
            f"All layers of the teacher's {path} are computed, because it "
            f'does not run on features alone: {error.__cause__!r}',
            logger='current',
            level=logging.DEBUG)
        return {}
    finally:
        head.training = False


def _map_layers(head: nn.Module, outputs: Callable[[], Any]) -> Dict[str, int]:
    """The outermost layers with weights that turn a map into one of its size,
    and their channels."""
    channels: Dict[str, int] = {}

    def note(path: str, inputs: tuple, output: Any) -> None:
        maps = (*inputs, output)
        if len(maps) == 2 and all(
                isinstance(x, Tensor) and x.dim() == 4
                for x in maps) and inputs[0].shape[2:] == output.shape[2:]:
            channels[path] = output.shape[1]

    with ExitStack() as stack, cannot_say():
        for path, layer in head.named_modules():
            if next(layer.parameters(), None) is not None:
                stack.callback(
                    layer.register_forward_hook(
                        lambda _, inputs, output, path=path: note(
                            path, inputs, output)).remove)
        outputs()
    return {
        path: channels[path]
        for path in channels
        if not any(path.startswith(f'{outer}.') for outer in channels)
    }


def neck_channels(student: nn.Module, teacher: nn.Module) -> List[List[int]]:
    """The channels of the levels that leave the necks of both models.

    Raises:
        ConfigError: If they cannot be found, or the levels do not pair.
    """
    # Necks say the number of their levels in many ways, or not at all.
    models = student, teacher
    field = 'model.mimic_loss'
    try:
        size = max(probe(model).size for model in models)
        shapes = [[level.shape for level in probe(model, [size]).features]
                  for model in models]
    except CannotSay as error:
        reason = str(error.__cause__).splitlines()[0]
        raise ConfigError(
            field, 'no random image shows the channels of the necks '
            f'({reason})', 'list student_channels and teacher_channels '
            'there, a number for each level') from error
    if any(len(shape) != 4 for levels in shapes for shape in levels):
        raise ConfigError(
            field, 'it compares feature maps, but a neck returns one vector '
            'for an image')
    sizes = [[list(shape[2:]) for shape in levels] for levels in shapes]
    if len(sizes[0]) == len(sizes[1]) and sizes[0] != sizes[1]:
        raise ConfigError(
            field, 'it compares features level by level, but for an image of '
            f'{size} pixels model.student has the sizes {sizes[0]} and '
            f'model.teacher {sizes[1]}',
            'give model.student.neck the strides of the teacher')
    return [[shape[1] for shape in levels] for levels in shapes]


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
