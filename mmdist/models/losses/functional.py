"""Distillation losses as pure functions: tensors in, tensors out.

Notation: ``R`` rows (instances: RoIs, locations, pixels, images) and ``C``
columns (classes). Logits are ``(R, C)``, or ``(N, C, *spatial)`` where every
position of every picture is a row. Everything is computed in float32, or in
float64 where the input is, whatever the autocast dtype.
"""
from typing import Callable, Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from mmengine.dist import get_world_size
from torch import Tensor

from .blocks import compute_dtype
from .divergence import divergence
from .fused import column_distance, distances, over_processes, relations
from .rule import Rule

EPS = 1e-8
"""Added to the product of norms in :func:`pearson_distance`; the value of the
authors' code."""


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(compute_dtype(tensor))


def to_rows(logits: Tensor) -> Tensor:
    """Lay logits out as a table with an instance a row and a class a column.

    Args:
        logits (Tensor): ``(R, C)`` or ``(N, C, *spatial)``.

    Returns:
        Tensor: ``(R, C)``, with ``R = N * prod(spatial)``; float64 stays
        float64, every other dtype becomes float32.
    """
    _check_dimensions(logits)
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return _at_least_float32(rows)


def pearson_distance(x: Tensor,
                     y: Tensor,
                     dim: int = -1,
                     eps: float = EPS) -> Tensor:
    r"""Pearson distance :math:`d_p(x, y) = 1 - \rho(x, y)` along a dimension.

    :math:`\rho = \sum ab / (|a||b| + eps)` on the centred :math:`a, b`
    (Huang et al., NeurIPS 2022, Eq. 5 and 6). Where either vector is constant
    the distance is 1 and the gradient zero.

    Args:
        x (Tensor): Any shape.
        y (Tensor): The shape of ``x``.
        dim (int): The dimension that is correlated.
        eps (float): Keeps the quotient finite.

    Returns:
        Tensor: The shape of ``x`` without ``dim``; values in [0, 2].
    """
    a = x - x.mean(dim, keepdim=True)
    b = y - y.mean(dim, keepdim=True)
    # By the formula alone the gradient of a constant x would be b / eps: 1e8
    # times too large.
    norms = a.norm(dim=dim) * b.norm(dim=dim)
    # A product of 0 is a variance too small for the floating point format.
    constant = _is_constant(x, dim) | _is_constant(y, dim) | (norms == 0)
    norms = (norms + eps).masked_fill(constant, 1)
    return 1 - ((a * b).sum(dim) / norms).masked_fill(constant, 0)


def _is_constant(x: Tensor, dim: int) -> Tensor:
    lowest, highest = x.detach().aminmax(dim=dim)
    return lowest == highest


def _check_shapes(student: Tensor,
                  teacher: Tensor,
                  what: str = 'logits') -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f'student and teacher {what} must have one shape, but got '
            f'{tuple(student.shape)} and {tuple(teacher.shape)}')
    _check_dimensions(student, what)


def _check_dimensions(tensor: Tensor, what: str = 'logits') -> None:
    if tensor.dim() < 2:
        raise ValueError(f'{what} must be (R, C) or (N, C, *spatial), but got '
                         f'the shape {tuple(tensor.shape)}')


def _check_activations(*activations: Optional[str]) -> None:
    for activation in activations:
        if activation not in ('softmax', 'sigmoid', None):
            raise ValueError("an activation must be 'softmax' or 'sigmoid', "
                             f'but got {activation!r}')


def _connected_zero(student: Tensor) -> Tensor:
    """A zero that depends on ``student``, so that backward still works."""
    return _at_least_float32(student).sum() * 0.


def dist_terms(student: Tensor,
               teacher: Tensor,
               tau: float = 1.0,
               student_activation: str = 'softmax',
               teacher_activation: Optional[str] = None,
               eps: float = EPS,
               sync_intra: bool = False) -> Dict[str, Tensor]:
    r"""The two relations of DIST, each multiplied by :math:`\tau^2`.

    Inter: mean of :func:`pearson_distance` over the rows; intra: over the
    columns (Huang et al., *Knowledge Distillation from A Stronger Teacher*,
    NeurIPS 2022, Section 4, Eq. 8 to 10).

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): Logits of the same shape; no gradient is returned.
        tau (float): Temperature that divides both logits.
        student_activation (str): 'softmax' or 'sigmoid'.
        teacher_activation (str, optional): None is the student's.
        eps (float): See :func:`pearson_distance`.
        sync_intra (bool): Take the rows of all processes together. Each must
            make the same calls, with or without rows. The mean over processes
            of the gradients is then that of one process with all rows.

    Returns:
        dict[str, Tensor]: The scalars 'inter' and 'intra'; 0 where there are
        no rows.

    Raises:
        ValueError: If the shapes differ or an activation is unknown.
    """
    _check_shapes(student, teacher)
    _check_activations(student_activation, teacher_activation)
    rule = Rule(
        float(tau), student_activation, teacher_activation
        or student_activation, float(eps))
    relate = _relate(student, sync_intra and get_world_size() > 1)
    inter, intra = relate(student, teacher.detach(), rule)
    if tau != 1:
        inter, intra = tau**2 * inter, tau**2 * intra
    return dict(inter=inter, intra=intra)


def _relate(student: Tensor, synced: bool) -> Callable:
    """How the relations of logits are computed."""
    if synced:
        return _synced_relations
    return distances if student.numel() else _no_relations


def _no_relations(student: Tensor, teacher: Tensor,
                  rule: Rule) -> Tuple[Tensor, Tensor]:
    zero = _connected_zero(student)
    return zero, zero


def _synced_relations(student: Tensor, teacher: Tensor,
                      rule: Rule) -> Tuple[Tensor, Tensor]:
    """The mean distances of the rows of all processes."""
    if student.numel():
        similarity, moments = relations(student, teacher, rule)
    else:
        similarity = _connected_zero(student).double()
        moments = similarity.expand(5, student.shape[1])
    num_rows = student.numel() // max(student.shape[1], 1)
    moments, all_rows = over_processes(moments, num_rows)
    dtype = compute_dtype(student)
    intra = column_distance(moments, all_rows, rule, dtype)
    # The mean over processes of this is the mean over all rows.
    inter = (num_rows - similarity) * get_world_size() / all_rows.clamp(min=1)
    return inter.to(dtype), (intra * (all_rows > 0)).to(dtype)


def kd_terms(student: Tensor,
             teacher: Tensor,
             tau: float = 1.0,
             student_activation: str = 'softmax',
             teacher_activation: Optional[str] = None) -> Dict[str, Tensor]:
    r"""Vanilla knowledge distillation, :math:`\tau^2 KL(p_t \| p_s)`.

    The mean over rows of the KL divergence (Hinton et al., *Distilling the
    Knowledge in a Neural Network*, 2015). The student's activation says which
    distributions are compared: with 'softmax' one categorical distribution a
    row (a sigmoid teacher is normalised to sum to 1); with 'sigmoid' one
    Bernoulli distribution a class, summed over the classes.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): Logits of the same shape; no gradient is returned.
        tau (float): Temperature that divides both logits.
        student_activation (str): 'softmax' or 'sigmoid'.
        teacher_activation (str, optional): None is the student's.

    Returns:
        dict[str, Tensor]: The scalar 'kl'; 0 where there are no rows.

    Raises:
        ValueError: If the shapes differ or an activation is unknown.
    """
    _check_shapes(student, teacher)
    _check_activations(student_activation, teacher_activation)
    if student.numel() == 0:
        return dict(kl=_connected_zero(student))
    rule = Rule(
        float(tau), student_activation, teacher_activation
        or student_activation, 0.)
    kl = divergence(student, teacher.detach(), rule)
    return dict(kl=kl if tau == 1 else tau**2 * kl)


def mimic_terms(student: Sequence[Tensor],
                teacher: Sequence[Tensor]) -> Dict[str, Tensor]:
    """Feature imitation: the mean squared error a level, summed over levels.

    The "mimic" of Huang et al., NeurIPS 2022, Table 5, which distils the
    outputs of the FPN beside the logits.

    Args:
        student (Sequence[Tensor]): One ``(N, C, H, W)`` a level, already
            projected to the teacher's channels.
        teacher (Sequence[Tensor]): The teacher's, of the same shapes.

    Returns:
        dict[str, Tensor]: The scalar 'mimic'.

    Raises:
        ValueError: If the numbers of levels or the shapes differ.
    """
    if len(student) != len(teacher):
        raise ValueError('student and teacher must have one number of feature '
                         f'levels, but got {len(student)} and {len(teacher)}')
    total = 0.
    for feat_s, feat_t in zip(student, teacher):
        _check_shapes(feat_s, feat_t, 'features')
        if not feat_s.numel():
            total = total + _connected_zero(feat_s)
            continue
        with torch.autocast(feat_s.device.type, enabled=False):
            total = total + F.mse_loss(
                _at_least_float32(feat_s), _at_least_float32(feat_t.detach()))
    return dict(mimic=total)
