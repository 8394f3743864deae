"""Vanilla knowledge distillation, the baseline that DIST replaces."""
from typing import Dict, Optional

from torch import Tensor

from mmdist.registry import MODELS
from .base import LogitLoss, check_weight, weighted
from .functional import kd_terms


@MODELS.register_module()
class KDLoss(LogitLoss):
    r"""KL divergence between the probabilities of teacher and student.

    :math:`\tau^2 KL(p_t \| p_s)`, mean over the rows; a sigmoid student gets
    the sum over the classes of the Bernoulli divergences (Hinton et al.,
    *Distilling the Knowledge in a Neural Network*, 2015).

    Args:
        tau (float): Temperature.
        loss_weight (float): Weight of the loss.

    Raises:
        ConfigError: If the weight or the temperature is out of its range.
    """

    def __init__(self, tau: float = 1.0, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.tau = check_weight('tau', tau, positive=True)
        self.loss_weight = check_weight('loss_weight', loss_weight)

    def terms(self,
              student_logits: Tensor,
              teacher_logits: Tensor,
              student_activation: str = 'softmax',
              teacher_activation: Optional[str] = None) -> Dict[str, Tensor]:
        """The term 'kl'; see :meth:`LogitLoss.terms`."""
        terms = kd_terms(student_logits, teacher_logits, self.tau,
                         student_activation, teacher_activation)
        return dict(kl=weighted(self.loss_weight, terms['kl']))
