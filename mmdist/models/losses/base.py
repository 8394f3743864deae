"""What every distillation loss on logits has in common."""
import math
from abc import ABCMeta, abstractmethod
from typing import Dict, Optional

from torch import Tensor, nn


def check_weight(name: str,
                 value: float,
                 owner: str = 'distill_loss') -> float:
    """Return ``value`` if it can be a loss weight, else raise ValueError."""
    if not (_is_number(value) and value >= 0):
        raise ValueError(f'{owner}.{name} must be a finite number >= 0, but '
                         f'got {value!r}')
    return float(value)


def _is_number(value: float) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def check_temperature(tau: float) -> float:
    """Return ``tau`` if it can be a temperature, else raise ValueError."""
    if not (_is_number(tau) and tau > 0):
        raise ValueError('distill_loss.tau must be a finite number > 0, but '
                         f'got {tau!r}')
    return float(tau)


def weighted(weight: float, term: Tensor) -> Tensor:
    """``weight * term``; a term without weight takes no part in backward."""
    # Adding its zeros would be exact, but it changes the memory layout of the
    # gradients and with it the order of later sums: another last bit.
    return weight * (term if weight else term.detach())


class LogitLoss(nn.Module, metaclass=ABCMeta):
    """A loss between the class logits of a student and of a teacher.

    A subclass names its terms in :meth:`terms`; calling the loss gives their
    sum.
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
            student_activation (str): 'softmax' or 'sigmoid'.
            teacher_activation (str, optional): None is the student's.

        Returns:
            dict[str, Tensor]: Scalars in float32 (float64 for float64 input).

        Raises:
            ValueError: If the shapes differ or an activation is unknown.
        """

    def forward(self, *args, **kwargs) -> Tensor:
        """The sum of :meth:`terms`, which takes the same arguments."""
        return sum(self.terms(*args, **kwargs).values())
