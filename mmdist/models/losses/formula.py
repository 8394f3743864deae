"""DIST's two terms as the paper writes them, by operations of autograd."""
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

EPS = 1e-8
"""Added to the product of norms in :func:`pearson_distance`; the value of the
authors' code."""
# A deviation from the mean by this many roundings counts as none.
ROUNDINGS = 8


class Options(NamedTuple):
    """How logits become distances."""
    tau: float
    student_activation: str  # 'softmax', 'sigmoid' or 'none'
    teacher_activation: str
    eps: float = 0.
    chunk_numel: Optional[int] = None  # about; None: by the device
    synced: bool = False  # columns go over the rows of all processes

    @property
    def softmax(self) -> bool:
        """Whether both activations are softmax."""
        return self.student_activation == self.teacher_activation == 'softmax'


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def activate(logits: Tensor, activation: str, dim: int = 1) -> Tensor:
    """Turn logits, already divided by the temperature, into probabilities;
    the activation 'none' returns them."""
    if activation == 'none':
        return logits
    return logits.softmax(dim) if activation == 'softmax' else logits.sigmoid()


def rounding(dtype: torch.dtype, number: int) -> Tuple[float, float]:
    """The r and s that make ``r * mean**2 + s`` the most that a centred sum of
    ``number`` squares can be by rounding alone."""
    info = torch.finfo(dtype)
    return (ROUNDINGS * info.eps)**2 * number, info.tiny**0.5


def pearson_distance(x: Tensor,
                     y: Tensor,
                     dim: int = -1,
                     eps: float = EPS) -> Tensor:
    r"""Pearson distance :math:`d_p(x, y) = 1 - \rho(x, y)` along a dimension.

    :math:`\rho = \sum ab / (|a||b| + eps)` on the centred :math:`a, b`
    (Huang et al., NeurIPS 2022, Eq. 5 and 6). Where either vector is constant,
    or its squares overflow, the distance is 1 and the gradient zero.

    Args:
        x (Tensor): Any shape.
        y (Tensor): The shape of ``x``.
        dim (int): The dimension that is correlated.
        eps (float): Keeps the quotient finite.

    Returns:
        Tensor: The shape of ``x`` without ``dim``; values in [0, 2].
    """
    means = torch.stack([z.mean(dim, keepdim=True) for z in (x, y)])
    a, b = x - means[0], y - means[1]
    squares = torch.stack([z.square().sum(dim, keepdim=True) for z in (a, b)])
    # By the formula alone the gradient of a constant x would be b / eps: 1e8
    # times too large.
    relative, least = rounding(x.dtype, x.shape[dim])
    varies = (squares > means * means * relative + least) & squares.isfinite()
    constant = ~varies.all(0)
    norm_a, norm_b = squares.masked_fill(constant, 1).sqrt().unbind()
    products = (a * b).sum(dim, keepdim=True).masked_fill(constant, 0)
    return 1 - (products / (norm_a * norm_b + eps)).squeeze(dim)


def formula(student: Tensor, teacher: Tensor,
            options: Options) -> Tuple[Tensor, Tensor]:
    """The two distances as the paper writes them, for autograd."""
    if options.synced:
        raise RuntimeError('with sync_intra, the loss of several processes '
                           'cannot be differentiated twice')
    p, q = (activate(
        x.movedim(1, -1).reshape(-1, x.shape[1]).to(compute_dtype(x)) /
        options.tau, activation)
            for x, activation in ((student, options.student_activation),
                                  (teacher, options.teacher_activation)))
    return tuple(
        pearson_distance(p, q, dim, options.eps).mean() for dim in (1, 0))
