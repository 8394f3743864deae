"""Checks of one config of the zoos: can it be distilled?"""
from collections import defaultdict
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import SIZES, batch_for, build, build_wrapper, last_line, load

from mmdist.errors import ConfigError
from mmdist.models.taps import build_tap
from mmdist.models.taps.watch import replaced

CHECKS = dict(
    a='every loss_kd_* is finite and positive for a differing teacher',
    b='its gradient reaches the tapped heads, and nothing of the teacher',
    c='an identical student in eval mode has a KL divergence of 0',
    d="the student's own losses equal the plain model's bit for bit",
    e="the wrapper's weights load strictly in the plain model",
    f='with DIST on feature maps alone, a, d and e hold and the gradient '
    'reaches the backbone')
DIST = dict(type='mmdist.DISTLoss')
# The rounding of float32 in sums of a million products of probabilities.
KL_TOLERANCE = 1e-6


class PlainModelFails(Exception):
    """The plain model does not compute a loss here."""


def losses_of(model: nn.Module, batch: Dict[str, Any]) -> Dict[str, Any]:
    """The losses of a batch, from a seed, the batch left as it was."""
    set_random_seed(0)
    data = model.data_preprocessor(deepcopy(batch), True)
    return model.loss(data['inputs'], data['data_samples'])


def spread(losses: Dict[str, Any]) -> Dict[str, Tensor]:
    """Losses by name, lists of levels spread into names."""
    return {
        f'{name}.{i}': value.detach()
        for name, values in losses.items()
        for i, value in enumerate(
            values if isinstance(values, (list, tuple)) else [values])
        if isinstance(value, Tensor)
    }


def find_batch(model: nn.Module, cfg: Config,
               package: str) -> Tuple[Dict[str, Any], int]:
    """A batch that the plain model trains on, and the images' size.

    Raises:
        PlainModelFails: With the error of the largest images; small ones
            may have too few locations.
    """
    # BEiT takes only images of the size of its crops.
    for side in (*SIZES, *cfg.get('crop_size', ())[:1]):
        try:
            batch, twin = batch_for(model, cfg, package, side), deepcopy(model)
            twin.train()  # LAD's returns nothing
            losses_of(twin, batch)
            return batch, side
        except Exception as error:
            last = error
    build_tap(model)  # says so if it has no class predictions
    raise PlainModelFails(last_line(last)) from last


@torch.no_grad()
def calibrated(model: nn.Module, batch: Dict[str, Any]) -> Dict[str, Tensor]:
    """The weights of a model, its batch norms with the statistics of a batch.

    With random weights and statistics of 0 and 1, activations grow from layer
    to layer until a softmax is certain and has no gradient. (A pretrained
    backbone has statistics that fit its weights.)
    """
    model.train()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            # Norms with an epsilon of 0 can only be frozen (NAS-FCOS).
            norm.training, norm.momentum = norm.eps > 0, 1.
    losses_of(model, batch)
    return model.state_dict()


class Check:
    """The six checks of one config, by its name; the folder is for the
    teacher's checkpoint."""

    def __init__(self, config: str, folder: Path) -> None:
        self.package, self.folder = config.partition('::')[0], folder
        try:
            self.cfg = load(config)
            plain = build(self.cfg.model, self.package, seed=0)
        except Exception as error:
            raise PlainModelFails(last_line(error)) from error
        self.batch, self.size = find_batch(plain, self.cfg, self.package)
        self.weights = calibrated(plain, self.batch)
        # A model that has computed no loss yet: some count losses.
        self.plain = build(self.cfg.model, self.package, seed=0)
        self.plain.load_state_dict(self.weights, strict=False)
        self.plain.train()
        self.plain_losses = spread(losses_of(self.plain, self.batch))
        teacher = build(self.cfg.model, self.package, seed=1)
        self.teacher = calibrated(teacher, self.batch)

    def wrapper(self, teacher: Dict[str, Tensor], **losses: Any) -> nn.Module:
        """A wrapper whose student has the plain model's weights."""
        model = self.cfg.model
        wrapper = build_wrapper(model, dict(config=model), teacher,
                                self.package, self.folder, **losses)
        # DDQ's weights have more names once it has computed a loss.
        wrapper.load_state_dict(self.weights, strict=False)
        return wrapper

    def step(self, wrapper: nn.Module) -> Tuple[Dict[str, bool], dict]:
        """Whether a wrapper passes a, d and e, and its distillation terms,
        whose gradients are computed."""
        losses = losses_of(wrapper, self.batch)
        kd = {k: v for k, v in losses.items() if k.startswith('loss_kd')}
        own = spread({k: v for k, v in losses.items() if k not in kd})
        self.plain.load_state_dict(wrapper.state_dict(), strict=True)
        sum(kd.values()).backward()
        return dict(
            a=all(0 < float(v) < float('inf') for v in kd.values()),
            d=equal(own, self.plain_losses),
            e=True), {
                k: float(v)
                for k, v in kd.items()
            }

    def features(self) -> Tuple[Optional[bool], str]:
        """Whether f passes, and which maps are compared; None, and why, where
        a feature loss is refused."""
        try:
            wrapper = self.wrapper(
                self.teacher, distill_loss=None, feature_loss=DIST).train()
            passed, _ = self.step(wrapper)
        except ConfigError as error:
            return None, last_line(error)
        backbones = (parameter
                     for path, parameter in wrapper.named_parameters()
                     if 'backbone' in path)
        part = wrapper.distillation.features
        return (reached(backbones) and all(passed.values()),
                f'{part.where}, {len(part.pairs)} maps')

    def classes(self) -> Dict[str, Any]:
        """Which checks but f pass, and what was measured."""
        build_tap(self.plain)  # says so if it has no class predictions
        wrapper = self.wrapper(self.teacher, distill_loss=DIST).train()
        passed, losses = self.step(wrapper)
        tap = wrapper.distillation.tap
        teacher = wrapper.distillation.teacher.model
        state = teacher.state_dict()
        passed['b'] = reached(
            parameter for path in tap.heads
            for parameter in wrapper.get_submodule(path).parameters()) and all(
                p.grad is None for p in teacher.parameters()) and equal(
                    state, {
                        name: self.teacher.get(name, state[name])
                        for name in state
                    })
        pairs = tap.describe(wrapper, teacher)
        del wrapper, teacher, state  # before the next one is built
        passed['c'] = self.identical_kl()
        return dict(
            passed=passed,
            size=self.size,
            losses=losses,
            tap=type(tap).__name__,
            pairs=pairs)

    def identical_kl(self) -> bool:
        """Whether an identical student has a KL divergence of 0."""
        student = self.wrapper(
            self.weights, distill_loss=dict(type='mmdist.KDLoss')).eval()
        # With gradients, other kernels run, which round differently.
        student.requires_grad_(False)
        # Some models compute a loss only in training mode (DINO's denoising
        # queries). Then the outermost module gets that mode, or all modules
        # without random layers.
        blocks = [
            m for m in student.modules()
            if any(m.children()) and not isinstance(m, nn.MultiheadAttention)
        ]
        for training in ([], [student], blocks):
            for module in training:
                module.training = True
            try:
                return _kl(student, self.batch) < KL_TOLERANCE
            except Exception as error:
                problem = error
        raise problem


def reached(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of them has a gradient that is not 0."""
    return any(p.grad is not None and p.grad.abs().max() > 0
               for p in parameters)


def _kl(wrapper: nn.Module, batch: Dict[str, Any]) -> float:
    """The largest KL divergence between teacher and student.

    A head with further outputs in training (DDRNet) learns all of them from
    one output of the teacher. One of them equals it.
    """
    ask = wrapper.distillation.teacher.batch

    # LightHamHead draws random numbers in eval mode.
    def asked_from_seed(*args, **kwargs):
        batch = ask(*args, **kwargs)
        batch.computing = partial(_from_seed, batch.computing)
        return batch

    set_random_seed(0)
    data = wrapper.data_preprocessor(deepcopy(batch), True)
    with replaced(wrapper.distillation.teacher, 'batch', asked_from_seed):
        pairs = wrapper.kd_pairs(data['inputs'], data['data_samples'])
    divergences = defaultdict(list)
    for pair in pairs:
        terms = wrapper.distillation.loss.terms(pair.student, pair.teacher,
                                                pair.student_activation,
                                                pair.teacher_activation)
        divergences[pair.teacher.data_ptr()].append(float(terms['kl']))
    return max(min(values) for values in divergences.values())


@contextmanager
def _from_seed(computing: Callable) -> Iterator[None]:
    with computing():
        set_random_seed(0)
        yield


def equal(ours: Dict[str, Tensor], theirs: Dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num())
        for name in ours)
