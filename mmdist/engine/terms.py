"""Watches whether the terms of distillation teach the student."""
import math
from logging import WARNING
from typing import Any, Dict, List, Sequence

import torch
from mmengine.logging import MessageHub, print_log
from torch import Tensor

from mmdist.errors import ConfigError

# Gradients of half precision's logits would be 0 without a factor.
SCALE = 2.**12


class TermMonitor:
    """Looks at the gradients of the terms of distillation.

    It logs the scalar ``kd_grad_ratio``, the norm of the gradient of all terms
    divided by that of the student's own losses, on the tapped logits, and
    warns if a term that has a gradient stays the same, or if no term has one.
    See :class:`mmdist.engine.TeacherMonitor` for the arguments.
    """

    def __init__(self, strict: bool, iters: int, interval: int) -> None:
        self.strict, self.iters, self.interval = strict, iters, interval
        self._last: Dict[str, Tensor] = {}
        self._unchanged: Dict[str, Tensor] = {}
        self._without_gradient = 0

    def watch(self, iteration: int, logits: List[Tensor],
              terms: Dict[str, Tensor], losses: Dict[str, Any]) -> None:
        """Look at one iteration; see :meth:`TeacherMonitor.watch`."""
        for name, term in terms.items():
            # One that cannot have a gradient (of weight 0, or constant by
            # design) teaches nothing on purpose.
            if term.requires_grad:
                same = term.detach() == self._last.get(name, math.nan)
                self._unchanged[name] = same * (
                    self._unchanged.get(name, 0) + 1)
                self._last[name] = term.detach()
        seldom = iteration % self.interval == 0
        # Reading a value makes a GPU wait, so seldom.
        if iteration == self.iters or seldom:
            for name, count in self._unchanged.items():
                if count >= self.iters - 1:
                    warn(
                        self.strict, 'model.distill_loss',
                        f'{name} has been {float(self._last[name]):g} for '
                        f'{int(count) + 1} iterations, so the student learns '
                        'nothing from it', 'check the loss and the teacher')
        logits = [part for part in logits if part.requires_grad]
        if not (logits and torch.is_grad_enabled() and
                (iteration <= self.iters or seldom)):
            return
        kd = gradient_norm(list(terms.values()), logits)
        own = gradient_norm([
            part for name, loss in losses.items() if 'loss' in name
            for part in (loss if isinstance(loss, (list, tuple)) else [loss])
        ], logits)
        if own:  # with alpha=0 it may have none
            MessageHub.get_current_instance().update_scalar(
                'train/kd_grad_ratio', kd / own)
        self._without_gradient = 0 if kd else self._without_gradient + 1
        if self._without_gradient == self.iters:
            warn(
                self.strict, 'model.distill_loss',
                'no term of distillation has had a '
                f'gradient in {self.iters} of the iterations that were looked '
                'at', 'check its weights; constant predictions of the teacher '
                'have no gradient either')


def warn(strict: bool, field: str, problem: str, remedy: str) -> None:
    """Log a warning or, if strict, raise it as a :class:`ConfigError`."""
    if strict:
        problem += ' (a warning without strict_teacher=True)'
        raise ConfigError(field, problem, remedy)
    warning = str(ConfigError(field, problem, remedy))
    print_log(warning, logger='current', level=WARNING)


def gradient_norm(losses: Sequence[Tensor], logits: List[Tensor]) -> float:
    """The norm of the gradient of the sum of losses (or of their means) with
    respect to logits; 0 if no loss depends on these."""
    losses = [loss.float().mean() for loss in losses if loss.requires_grad]
    if not losses:
        return 0.
    gradients = torch.autograd.grad(
        SCALE * sum(losses), logits, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(sum(squares))**0.5 / SCALE
