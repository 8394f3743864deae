"""Distillation losses as pure functions: tensors in, tensors out.

``R`` rows (instances: RoIs, locations, pixels, images) have ``C`` columns
(classes, or channels of features). Logits are ``(R, C)``, or ``(N, C,
*spatial)`` where every position of every image is a row. Everything is
computed in float32, or in float64 where the input is, whatever the autocast
dtype. No gradient goes to the teacher. PyTorch is all that is imported.
"""
import os
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .kl import divergence
from .pearson import Options, activate, compute_dtype, distances

EPS = 1e-8
"""Added to the product of norms in :func:`pearson_distance`; the value of the
authors' code."""


def to_rows(logits: Tensor) -> Tensor:
    """Lay logits out as a table with an instance per row.

    Args:
        logits (Tensor): ``(R, C)`` or ``(N, C, *spatial)``.

    Returns:
        Tensor: ``(R, C)``, with ``R = N * prod(spatial)``; float64 stays
        float64, every other dtype becomes float32.
    """
    _check_dimensions(logits)
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows.to(compute_dtype(rows))


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
    (low_x, high_x), (low_y, high_y) = (
        z.detach().aminmax(dim=dim) for z in (x, y))
    constant = (low_x == high_x) | (low_y == high_y) | (norms == 0)
    norms = (norms + eps).masked_fill(constant, 1)
    return 1 - ((a * b).sum(dim) / norms).masked_fill(constant, 0)


def dist_terms(student: Tensor,
               teacher: Tensor,
               tau: float = 1.0,
               student_activation: str = 'softmax',
               teacher_activation: Optional[str] = None,
               eps: float = EPS,
               sync_intra: bool = False,
               chunk_numel: Optional[int] = None) -> Dict[str, Tensor]:
    r"""The two relations of DIST, each multiplied by :math:`\tau^2`.

    Inter: mean of :func:`pearson_distance` over the rows; intra: over the
    columns (Huang et al., *Knowledge Distillation from A Stronger Teacher*,
    NeurIPS 2022, Section 4, Eq. 8 to 10). Of feature maps, with the activation
    'none', intra is the loss of PKD (Cao et al., NeurIPS 2022).

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): Logits of the same shape.
        tau (float): Temperature that divides both logits.
        student_activation (str): 'softmax', 'sigmoid' or 'none'.
        teacher_activation (str, optional): None is the student's.
        eps (float): See :func:`pearson_distance`.
        sync_intra (bool): Take the rows of all processes together. Each must
            make the same calls, with or without rows. The mean over processes
            of the gradients is then that of one process with all rows.
        chunk_numel (int, optional): About how many logits are worked on at a
            time. None: what fits the caches of a CPU; elsewhere all, or of
            very many a fifth.

    Returns:
        dict[str, Tensor]: The scalars 'inter' and 'intra'; 0 where there are
        no rows. What is constant by design requires no gradient: inter of one
        column or of two softmax classes, intra of one row.

    Raises:
        ValueError: If the shapes differ or an activation is unknown.
    """
    _check(student, teacher, student_activation, teacher_activation,
           ('softmax', 'sigmoid', 'none'))
    synced = (
        sync_intra and dist.is_available() and dist.is_initialized()
        and dist.get_world_size() > 1)
    options = Options(
        float(tau), student_activation, teacher_activation
        or student_activation, float(eps), chunk_numel, synced)
    num_columns = student.shape[1]
    if not (student.numel() or synced and num_columns):
        zero = _connected_zero(student)
        return dict(inter=zero, intra=zero)
    if torch.compiler.is_compiling() and not synced:
        inter, intra = _plain_distances(student, teacher.detach(), options)
    else:
        inter, intra = distances(student, _frozen(teacher), options,
                                 *_passes(student, options))
    # A term that is constant by design carries no gradient, like one without
    # weight: one number has no variance, so that its correlation counts as 0;
    # two numbers that sum to 1 are d and -d once they are centred, so that
    # their correlation is 1 or -1 whatever d is.
    binary = options.student == options.teacher == 'softmax'
    if num_columns <= (2 if binary else 1):
        inter = inter.detach()
    if student.numel() == num_columns and not synced:
        intra = intra.detach()
    if tau != 1:
        inter, intra = options.tau**2 * inter, options.tau**2 * intra
    return dict(inter=inter, intra=intra)


def _passes(student: Tensor, options: Options) -> tuple:
    """Triton's passes over the logits where they are asked for."""
    if os.environ.get('MMDIST_TRITON') != '1' or not student.numel():
        return ()
    try:
        from .triton_pearson import passes
    except ImportError:  # no Triton here
        return ()
    return passes(student, options)


def _plain_distances(student: Tensor, teacher: Tensor,
                     options: Options) -> Tuple[Tensor, Tensor]:
    """The formula as the paper writes it, which the compiler makes fast."""
    p, q = (activate(to_rows(logits) / options.tau, activation)
            for logits, activation in ((student, options.student),
                                       (teacher, options.teacher)))
    return tuple(
        pearson_distance(p, q, dim, options.eps).mean() for dim in (1, 0))


def kd_terms(student: Tensor,
             teacher: Tensor,
             tau: float = 1.0,
             student_activation: str = 'softmax',
             teacher_activation: Optional[str] = None) -> Dict[str, Tensor]:
    r"""Vanilla knowledge distillation, :math:`\tau^2 KL(p_t \| p_s)`.

    The mean over rows of the KL divergence (Hinton et al., *Distilling the
    Knowledge in a Neural Network*, 2015). The student's activation says which
    distributions are compared: with 'softmax' one categorical distribution per
    row (a sigmoid teacher is normalised to sum to 1); with 'sigmoid' one
    Bernoulli distribution per class, summed over the classes.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): Logits of the same shape.
        tau (float): Temperature that divides both logits.
        student_activation (str): 'softmax' or 'sigmoid'.
        teacher_activation (str, optional): None is the student's.

    Returns:
        dict[str, Tensor]: The scalar 'kl'; 0 where there are no rows.

    Raises:
        ValueError: If the shapes differ or an activation is unknown.
    """
    _check(student, teacher, student_activation, teacher_activation,
           ('softmax', 'sigmoid'))
    if student.numel() == 0:
        return dict(kl=_connected_zero(student))
    options = Options(
        float(tau), student_activation, teacher_activation
        or student_activation)
    kl = divergence(student, _frozen(teacher), options)
    return dict(kl=kl if tau == 1 else options.tau**2 * kl)


def mimic_terms(student: Sequence[Tensor],
                teacher: Sequence[Tensor]) -> Dict[str, Tensor]:
    """Feature imitation: mean squared errors, summed over the levels.

    The "mimic" of Huang et al., NeurIPS 2022, Table 5, which distils the
    outputs of the FPN beside the logits.

    Args:
        student (Sequence[Tensor]): One ``(N, C, H, W)`` per level, already
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
        pair = (x.to(compute_dtype(x)) for x in (feat_s, _frozen(feat_t)))
        with torch.autocast(feat_s.device.type, enabled=False):
            total = total + F.mse_loss(*pair)
    return dict(mimic=total)


def _frozen(teacher: Tensor) -> Tensor:
    """The teacher's tensor without gradient, such that autograd can keep it:
    of one from ``torch.inference_mode()`` it can keep a copy only."""
    if not torch.compiler.is_compiling() and teacher.is_inference():
        return teacher.clone()
    return teacher.detach()


def _connected_zero(student: Tensor) -> Tensor:
    """A zero that depends on ``student``, so that backward still works."""
    return student.to(compute_dtype(student)).sum() * 0.


def _check(student: Tensor, teacher: Tensor, student_activation: str,
           teacher_activation: Optional[str], known: Sequence[str]) -> None:
    _check_shapes(student, teacher)
    for activation in (student_activation, teacher_activation
                       or student_activation):
        if activation not in known:
            names = ', '.join(map(repr, known[:-1]))
            raise ValueError(f'an activation must be {names} or {known[-1]!r},'
                             f' but got {activation!r}')


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
