"""What a head returns for a picture of noise: how many levels, from which
layers."""
from contextlib import contextmanager
from typing import Any, Callable, Iterator

import torch
from torch import nn

from .teacher_batch import owner_of

PROBE_SIZE = 128


class CannotSay(Exception):
    """A model that does not run on a picture alone, or not backward."""


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


@contextmanager
def probed(model: nn.Module, path: str) -> Iterator[Callable[[], Any]]:
    """Compute the features of a small random picture in eval mode.

    Args:
        model (nn.Module): A detector.
        path (str): Path of one of its heads.

    Yields:
        Callable: Returns what the head's ``forward`` does for the features.

    Raises:
        CannotSay: If the model has no features of a picture alone.
    """
    like = next(model.parameters())
    devices = [like.device] if like.is_cuda else []
    owner = model.get_submodule(owner_of(model, path) or '')
    with torch.random.fork_rng(devices=devices), eval_mode(owner):
        picture = torch.randn(1, 3, PROBE_SIZE, PROBE_SIZE).to(like)
        with torch.no_grad(), cannot_say():
            features = owner.extract_feat(picture)
        yield lambda: model.get_submodule(path)(features)
