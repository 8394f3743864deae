"""Base class of the distillation losses on logits, and checks of numbers."""
import math
import numbers
from typing import Any, Dict, Optional

from torch import Tensor, nn

from mmdist.errors import ConfigError


def check_weight(name: str, value: float, positive: bool = False) -> float:
    """Return a finite ``value`` >= 0, or > 0, as a float; else raise
    ConfigError. NumPy's numbers and tensors without dimensions count, too."""
    number = value.item() if getattr(value, 'ndim', None) == 0 else value
    if (isinstance(number, numbers.Real) and math.isfinite(number)
            and (number > 0 or number == 0 and not positive)):
        return float(number)
    raise ConfigError(
        name,
        f'it must be a finite number {">" if positive else ">="} 0, but is '
        f'{value!r}')


def weighted(weight: float, term: Tensor) -> Tensor:
    """``weight * term``; a term without weight takes no part in backward."""
    # Adding its zeros would be exact, but it changes the memory layout of the
    # gradients and with it the order of later sums: another last bit.
    return weight * (term if weight else term.detach())


class LogitLoss(nn.Module):
    """A loss between the class logits of a student and of a teacher.

    A subclass names its terms in :meth:`terms`, or in :meth:`pair_terms` where
    it wants more than logits; calling the loss gives their sum.
    """

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
            teacher_activation (str, optional): None means the student's.

        Returns:
            dict[str, Tensor]: Scalars in float32 (float64 for float64 input).
            One that cannot change, or has no weight, requires no gradient.

        Raises:
            ValueError: If the shapes differ or an activation is unknown.
        """
        raise NotImplementedError(
            f'{type(self).__name__} must define terms or pair_terms')

    def pair_terms(self, pair: Any) -> Dict[str, Tensor]:
        """The weighted terms of the loss for one pair, by name.

        ``pair`` is a :class:`mmdist.models.taps.base.LogitPair`. Override this
        for a loss that needs labels, areas or names. Do not multiply by
        ``pair.weight``: that is done afterwards.
        """
        return self.terms(pair.student, pair.teacher, pair.student_activation,
                          pair.teacher_activation)

    def forward(self, *args, **kwargs) -> Tensor:
        """The sum of :meth:`terms`, which takes the same arguments."""
        return sum(self.terms(*args, **kwargs).values())
