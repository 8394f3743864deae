"""DIST: relations between classes instead of exact probabilities."""
from typing import Dict, Optional

from torch import Tensor

from mmdist.registry import MODELS
from .base import LogitLoss, check_weight, weighted
from .functional import EPS, dist_terms


@MODELS.register_module()
class DISTLoss(LogitLoss):
    r"""DIST of Huang et al., *Knowledge Distillation from A Stronger Teacher*.

    .. math::
        L = \beta\tau^2 L_{inter} + \gamma\tau^2 L_{intra}

    Both are mean Pearson distances between the probabilities of student and
    teacher: over each row (between the classes of one instance) and over each
    column (between the instances of one class); NeurIPS 2022, Eq. 8 to 10,
    https://github.com/hunto/DIST_KD.

    Args:
        beta (float): Weight of the inter-class relation.
        gamma (float): Weight of the intra-class relation.
        tau (float): Temperature.
        eps (float): Added to the product of norms; the authors' 1e-8. A row
            or a column without variance has the distance 1 and no gradient.
        sync_intra (bool): Compare columns over the rows of all processes, as
            one process with the whole batch would. Needs as many calls of the
            loss in every process; False is what the authors' code does.

    Raises:
        ConfigError: If a weight, eps or the temperature is out of its range.
    """

    def __init__(self,
                 beta: float = 1.0,
                 gamma: float = 1.0,
                 tau: float = 1.0,
                 eps: float = EPS,
                 sync_intra: bool = False) -> None:
        super().__init__()
        self.beta = check_weight('beta', beta)
        self.gamma = check_weight('gamma', gamma)
        self.tau = check_weight('tau', tau, positive=True)
        self.eps = check_weight('eps', eps)
        self.sync_intra = sync_intra

    def terms(self,
              student_logits: Tensor,
              teacher_logits: Tensor,
              student_activation: str = 'softmax',
              teacher_activation: Optional[str] = None) -> Dict[str, Tensor]:
        """The terms 'inter' and 'intra'; see :meth:`LogitLoss.terms`."""
        terms = dist_terms(student_logits, teacher_logits, self.tau,
                           student_activation, teacher_activation, self.eps,
                           self.sync_intra)
        return dict(
            inter=weighted(self.beta, terms['inter']),
            intra=weighted(self.gamma, terms['intra']))
