"""Checks of one config of the zoos: can it be distilled?"""
from collections import defaultdict
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch
from mmengine.config import Config
from mmengine.runner import set_random_seed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import (SIZES, ZooConfig, batch_for, build, build_wrapper,
                        last_line, load)

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
def calibrate(model: nn.Module, batch: Dict[str, Any]) -> None:
    """Give batch norms the statistics of a batch.

    With random weights and statistics of 0 and 1, activations grow from layer
    to layer until a softmax is certain and has no gradient. (A pretrained
    backbone has statistics that fit its weights.)
    """
    modes = {module: module.training for module in model.modules()}
    # Norms with an epsilon of 0 can only be frozen (NAS-FCOS).
    norms = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.eps > 0
    ]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.training = norm in norms
    for norm in norms:
        norm.momentum = 1.
    losses_of(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode


class Check:
    """The six checks of one config.

    Args:
        config (ZooConfig): The config.
        folder (Path): For the teacher's checkpoint.
    """

    def __init__(self, config: ZooConfig, folder: Path) -> None:
        self.package, self.folder = config.package, folder
        try:
            self.cfg = load(config)
            self.plain = build(self.cfg.model, self.package, seed=0)
        except Exception as error:
            raise PlainModelFails(last_line(error)) from error
        self.batch, self.size = find_batch(self.plain, self.cfg, self.package)
        calibrate(self.plain, self.batch)
        self.weights = self.plain.state_dict()
        # A model that has computed no loss yet: some count losses.
        self.plain = build(self.cfg.model, self.package, seed=0)
        self.plain.load_state_dict(self.weights, strict=False)
        self.plain.train()
        self.plain_losses = spread(losses_of(self.plain, self.batch))
        teacher = build(self.cfg.model, self.package, seed=1)
        calibrate(teacher, self.batch)
        self.teacher = teacher.state_dict()

    def wrapper(self,
                teacher: Dict[str, Tensor],
                loss: Optional[str],
                features: Optional[dict] = None) -> nn.Module:
        """A wrapper whose student has the plain model's weights."""
        wrapper = build_wrapper(
            self.cfg.model,
            self.cfg.model,
            teacher,
            self.package,
            self.folder,
            loss,
            features=features)
        # DDQ's weights have more names once it has computed a loss.
        wrapper.load_state_dict(self.weights, strict=False)
        return wrapper

    def run(self) -> Dict[str, Any]:
        """Run all checks but f; return which pass, and what was measured."""
        passed, measured = self.differing_teacher()
        passed['c'] = self.identical_kl()
        return dict(passed=passed, size=self.size, **measured)

    def features(self) -> Tuple[Optional[bool], str]:
        """Whether f passes, and which maps are compared; None, and why, where
        a feature loss is refused."""
        try:
            wrapper = self.wrapper(self.teacher, None,
                                   dict(type='mmdist.DISTLoss')).train()
            passed, kd = self.step(wrapper)
        except ConfigError as error:
            return None, last_line(error)
        sum(kd.values()).backward()
        reached = any(p.grad is not None and p.grad.abs().max() > 0
                      for path, p in wrapper.named_parameters()
                      if 'backbone' in path)
        part = wrapper.distillation.features
        return (reached and all(passed.values()),
                f'{part.where}, {len(part.pairs)} maps')

    def step(self, wrapper: nn.Module) -> Tuple[Dict[str, bool], dict]:
        """Whether a wrapper passes a, d and e, and its distillation terms."""
        losses = losses_of(wrapper, self.batch)
        kd = {k: v for k, v in losses.items() if k.startswith('loss_kd')}
        own = spread({k: v for k, v in losses.items() if k not in kd})
        return dict(
            a=all(0 < float(v) < float('inf') for v in kd.values()),
            d=equal(own, self.plain_losses),
            e=self.loads(wrapper)), kd

    def differing_teacher(self) -> Tuple[Dict[str, bool], Dict[str, Any]]:
        """Run the checks a, b, d and e. Their wrapper is freed afterwards."""
        build_tap(self.plain)  # says so if it has no class predictions
        wrapper = self.wrapper(self.teacher, 'DISTLoss').train()
        passed, kd = self.step(wrapper)
        passed['b'] = self.gradient_is_right(wrapper, kd)
        return passed, dict(
            losses={
                k: float(v)
                for k, v in kd.items()
            },
            tap=type(wrapper.distillation.tap).__name__,
            pairs=wrapper.distillation.tap.describe(
                wrapper, wrapper.distillation.teacher.model))

    def gradient_is_right(self, wrapper: nn.Module, kd: Dict[str,
                                                             Tensor]) -> bool:
        """Whether a tapped head has a gradient, and the teacher none."""
        sum(kd.values()).backward()
        heads = [
            wrapper.get_submodule(p) for p in wrapper.distillation.tap.heads
        ]
        reached = any(p.grad is not None and p.grad.abs().max() > 0
                      for head in heads for p in head.parameters())
        teacher = wrapper.distillation.teacher.model
        state = teacher.state_dict()
        return (reached and all(p.grad is None for p in teacher.parameters())
                and all(
                    torch.equal(state[name], self.teacher[name])
                    for name in state.keys() & self.teacher.keys()))

    def identical_kl(self) -> bool:
        """Whether an identical student has a KL divergence of 0."""
        same = self.wrapper(self.weights, 'KDLoss').eval()
        # With gradients, other kernels run, which round differently.
        same.kd_student.requires_grad_(False)
        # Some models compute a loss only in training mode (DINO's denoising
        # queries). Then the outermost module gets that mode, or all modules
        # without random layers.
        student = same.kd_student
        blocks = [
            m for m in student.modules()
            if any(m.children()) and not isinstance(m, nn.MultiheadAttention)
        ]
        for training in ([], [student], blocks):
            for module in training:
                module.training = True
            try:
                return _kl(same, self.batch) < KL_TOLERANCE
            except Exception as error:
                problem = error
        raise problem

    def loads(self, wrapper: nn.Module) -> bool:
        """Load the wrapper's weights, strictly, in the plain model."""
        self.plain.load_state_dict(wrapper.state_dict(), strict=True)
        return True


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
