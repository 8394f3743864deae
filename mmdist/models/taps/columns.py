"""Columns of logits: the same classes for student and teacher."""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

EPS = 1e-6
"""Probabilities are kept this far from 0 and 1 where logits are needed."""


class Columns(NamedTuple):
    """What the columns of class logits are.

    Attributes:
        num_classes (int): Classes, in the first columns.
        activation (str): 'softmax' or 'sigmoid'.
        background (bool): Whether a last column says 'none of them'.
    """
    num_classes: int
    activation: str
    background: bool

    @property
    def number(self) -> int:
        """Columns in all."""
        return self.num_classes + self.background


def as_columns_of(
        student: Columns,
        teacher: Columns,
        logits: Tensor,
        class_map: Optional[Sequence[int]] = None) -> Tuple[Tensor, str]:
    """The teacher's logits in the columns of the student's.

    Classes that the student does not have belong to the background, where a
    softmax has one; otherwise a softmax over some of the classes is the
    teacher's, renormalised. A background column is what is left of the
    classes: beside a softmax with one, a sigmoid teacher gets one of
    ``1 - max p``, and all are normalised; beside sigmoids, a softmax teacher
    has its probabilities, and its background is left out.

    Args:
        student (Columns): The student's.
        teacher (Columns): The teacher's.
        logits (Tensor): The teacher's, ``(N, C, *)``.
        class_map (Sequence[int], optional): The teacher's class for each of
            the student's.

    Returns:
        tuple[Tensor, str]: ``(N, student.number, *)``, and their activation:
        the teacher's where both have a background column or neither has.
    """
    if class_map is not None:
        logits = _chosen(logits, teacher, class_map)
    if student.background == teacher.background:
        return logits, teacher.activation
    log_p = _log_probabilities(logits, teacher)
    if teacher.background and not student.background:
        log_p = log_p[:, :-1]
    elif student.background and not teacher.background:
        nothing = torch.log1p(-log_p.amax(dim=1, keepdim=True).exp() + EPS)
        log_p = torch.cat([log_p, nothing], dim=1)
    if student.activation == 'sigmoid':
        log_p = logits_of(log_p.exp())
    return log_p, student.activation


def _chosen(logits: Tensor, columns: Columns,
            class_map: Sequence[int]) -> Tensor:
    """The columns of some classes, in another order."""
    chosen = logits[:, list(class_map)]
    if not columns.background:
        return chosen
    others = [i for i in range(columns.number) if i not in set(class_map)]
    rest = logits[:, others]
    if columns.activation == 'softmax':  # what is none of the student's
        rest = rest.float().logsumexp(dim=1, keepdim=True)
    else:
        rest = rest[:, -1:]
    return torch.cat([chosen, rest], dim=1)


def _log_probabilities(logits: Tensor, columns: Columns) -> Tensor:
    logits = logits.float()
    if columns.activation == 'sigmoid':
        return logsigmoid(logits)
    return logits.log_softmax(dim=1)


def logits_of(probabilities: Tensor) -> Tensor:
    """The logits of sigmoid probabilities, finite; float32."""
    return torch.logit(probabilities.float(), eps=EPS)


def class_log_odds(logits: Tensor, columns: Columns) -> Tensor:
    """Logits whose sigmoid is the probability of each class.

    Args:
        logits (Tensor): ``(N, C, *)``.
        columns (Columns): What ``C`` are.

    Returns:
        Tensor: ``(N, num_classes, *)``.
    """
    if columns.activation == 'sigmoid':
        return logits[:, :columns.num_classes]
    return logits_of(class_probabilities(logits, columns))


def class_probabilities(logits: Tensor, columns: Columns) -> Tensor:
    """Probabilities of the classes, without the background.

    Args:
        logits (Tensor): ``(R, C)``.
        columns (Columns): What ``C`` are.

    Returns:
        Tensor: ``(R, num_classes)``, float32.
    """
    return _log_probabilities(logits, columns).exp()[:, :columns.num_classes]
