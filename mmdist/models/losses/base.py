"""Base class and checks of all distillation losses on logits."""
import math
import numbers
from abc import ABCMeta, abstractmethod
from typing import Any, Dict, Optional

from torch import Tensor, nn


def _number(value: Any) -> float:
    """A finite number, also of NumPy or without dimensions; else NaN."""
    if getattr(value, 'ndim', None) == 0:
        value = value.item()
    if isinstance(value, numbers.Real) and math.isfinite(value):
        return float(value)
    return math.nan


def check_weight(name: str,
                 value: float,
                 owner: str = 'distill_loss') -> float:
    """Return ``value`` if it can be a loss weight, else raise ValueError."""
    if _number(value) >= 0:
        return _number(value)
    raise ValueError(f'{owner}.{name} must be a finite number >= 0, but got '
                     f'{value!r}')


def check_temperature(tau: float) -> float:
    """Return ``tau`` if it can be a temperature, else raise ValueError."""
    if _number(tau) > 0:
        return _number(tau)
    raise ValueError('distill_loss.tau must be a finite number > 0, but got '
                     f'{tau!r}')


def weighted(weight: float, term: Tensor) -> Tensor:
    """``weight * term``; a term without weight takes no part in backward."""
    # Adding its zeros would be exact, but it changes the memory layout of the
    # gradients and with it the order of later sums: another last bit.
    return weight * (term if weight else term.detach())


class LogitLoss(nn.Module, metaclass=ABCMeta):
    """A loss between the class logits of a student and of a teacher.

    A subclass names its terms in :meth:`terms`, or in :meth:`pair_terms` where
    it wants more than logits; calling the loss gives their sum.
    """

    @abstractmethod
    def terms(self,
              student_logits: Tensor,
              teacher_logits: Tensor,
              student_activation: str = 'softmax',
              teacher_activation: Optional[str] = None) -> Dict[str, Tensor]:
        """The weighted terms of the loss by name.

        Args:
            student_logits (Tensor): ``(R, C)``, or ``(N, C, *spatial)`` where
                every position is a row. Any floating dtype.
            teacher_logits (Tensor): The same shape; gets no gradient.
            student_activation (str): 'softmax' or 'sigmoid'; DIST also takes
                'none', for features.
            teacher_activation (str, optional): None is the student's.

        Returns:
            dict[str, Tensor]: Scalars in float32 (float64 for float64 input).
            One that cannot change, or has no weight, requires no gradient.

        Raises:
            ValueError: If the shapes differ or an activation is unknown.
        """

    def pair_terms(self, pair: Any) -> Dict[str, Tensor]:
        """The terms of one pair of logits in a training.

        A loss that wants labels, areas, names or weights overrides it.

        Args:
            pair (LogitPair): See :class:`mmdist.models.taps.base.LogitPair`.
                Its weight is applied afterwards.

        Returns:
            dict[str, Tensor]: As :meth:`terms`.
        """
        return self.terms(pair.student, pair.teacher, pair.student_activation,
                          pair.teacher_activation)

    def forward(self, *args, **kwargs) -> Tensor:
        """The sum of :meth:`terms`, which takes the same arguments."""
        return sum(self.terms(*args, **kwargs).values())
