"""Features and outputs of heads for a random image."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Sequence

import torch
from torch import nn

from .teacher_batch import owner_of

RGB = 3
# The side of 128 is the largest stride; SSD needs more.
PROBE_SIZES = (128, 512)


class Probe(NamedTuple):
    """Features of a model for a random image.

    Attributes:
        channels (int): Channels of the image.
        size (int): Height and width of the image, in pixels.
        features (Any): What ``extract_feat`` returns.
    """
    channels: int
    size: int
    features: Any


class CannotSay(Exception):
    """A model that does not run on an image alone, or not backward."""


@contextmanager
def cannot_say() -> Iterator[None]:
    """Raise :class:`CannotSay` for whatever a model raises here."""
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
    """How many channels the first convolution of a model takes."""
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

    Args:
        model (nn.Module): A model with ``extract_feat``.
        sizes (Sequence[int]): Sides of images to try, in pixels.

    Raises:
        CannotSay: If the model takes none of them.
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
    """Compute the features that a head is given, in eval mode.

    Args:
        model (nn.Module): A detector.
        path (str): Path of one of its heads.

    Yields:
        Callable: Returns what the head's ``forward`` does for the features.

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
        ValueError: If they cannot be found, or the levels do not pair.
    """
    # Necks say the number of their levels in many ways, or not at all.
    models = student, teacher
    try:
        size = max(probe(model).size for model in models)
        shapes = [[level.shape for level in probe(model, [size]).features]
                  for model in models]
    except CannotSay as error:
        reason = str(error.__cause__).splitlines()[0]
        raise ValueError(
            'model.mimic_loss: no random image shows the channels of the '
            f'necks ({reason}); list student_channels and teacher_channels '
            'there, a number for each level') from error
    if any(len(shape) != 4 for levels in shapes for shape in levels):
        raise ValueError('model.mimic_loss compares feature maps, but a neck '
                         'returns one vector an image')
    sizes = [[list(shape[2:]) for shape in levels] for levels in shapes]
    if len(sizes[0]) == len(sizes[1]) and sizes[0] != sizes[1]:
        raise ValueError(
            'model.mimic_loss compares features level by level, but for an '
            f'image of {size} pixels model.student has the sizes {sizes[0]} '
            f'and model.teacher {sizes[1]}; give model.student.neck the '
            'strides of the teacher')
    return [[shape[1] for shape in levels] for levels in shapes]


def check_image_channels(student: nn.Module, teacher: nn.Module) -> None:
    """Raise ValueError if the models take images of other channels."""
    if first_channels(student) == first_channels(teacher):
        return
    try:
        number_s, number_t = (
            probe(model).channels for model in (student, teacher))
    except CannotSay:
        return  # the first iteration says it
    if number_s != number_t:
        raise ValueError(
            f'model.teacher.config takes images of {number_t} channels but '
            f'model.student of {number_s}; choose a teacher of the same '
            'images, or set in_channels of both backbones alike')
