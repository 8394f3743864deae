"""Features and outputs of heads for a random image."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Sequence

import torch
from torch import nn

from mmdist.errors import ConfigError
from .watch import owner_of

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
    convolution = next((layer for layer in model.modules()
                        if getattr(layer, 'weight', None) is not None
                        and layer.weight.dim() >= 4), None)
    if convolution is None:
        return RGB
    return convolution.weight.shape[1] * getattr(convolution, 'groups', 1)


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
        number_s, number_t = (
            probe(model).channels for model in (student, teacher))
    except CannotSay:
        return  # the first iteration says it
    if number_s != number_t:
        raise ConfigError(
            'model.teacher.config', f'it takes images of {number_t} channels '
            f'but model.student of {number_s}', 'choose a teacher of the same '
            'images, or set in_channels of both backbones alike')
