"""Distillation losses as pure functions: tensors in, tensors out.

``R`` rows (instances: RoIs, locations, pixels, images) have ``C`` columns
(classes, or channels of features). Logits are ``(R, C)``, or ``(N, C,
*spatial)`` where every position of every image is a row. Everything is
computed in float32, or in float64 where the input is, whatever the autocast
dtype. No gradient goes to the teacher. The functions import PyTorch alone.
"""
import os
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from . import pearson
from .formula import EPS, Options, compute_dtype, formula, pearson_distance
from .pearson import (Derived, chunks, class_axis, distances, new_gradient,
                      small_distances)

__all__ = [
    'EPS', 'dist_terms', 'kd_terms', 'mimic_terms', 'pearson_distance',
    'to_rows'
]


def to_rows(logits: Tensor) -> Tensor:
    """Lay logits out as a table with an instance per row.

    Args:
        logits (Tensor): ``(R, C)`` or ``(N, C, *spatial)``.

    Returns:
        Tensor: ``(R, C)``, with ``R = N * prod(spatial)``; float64 stays
        float64, every other dtype becomes float32.
    """
    _check_shapes(logits, logits)
    rows = logits.movedim(1, -1).reshape(-1, logits.shape[1])
    return rows.to(compute_dtype(rows))


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
    NeurIPS 2022, Section 4, Eq. 8 to 10). For feature maps, with the
    activation 'none', intra is the loss of PKD (Cao et al., NeurIPS 2022).
    :mod:`.formula` has both terms as the paper writes them.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): Logits of the same shape.
        tau (float): Temperature that divides both logits.
        student_activation (str): 'softmax', 'sigmoid' or 'none'.
        teacher_activation (str, optional): None means the student's.
        eps (float): See :func:`pearson_distance`.
        sync_intra (bool): Take the rows of all processes together. Each must
            make the same calls, with or without rows. The mean over processes
            of the gradients is then that of one process with all rows.
        chunk_numel (int, optional): About how many logits are worked on at a
            time. None: what fits the caches of a CPU; elsewhere all, or a
            fifth of very many.

    Returns:
        dict[str, Tensor]: The scalars 'inter' and 'intra'; 0 where there are
        no rows. What is constant by design requires no gradient: inter of one
        column or of two softmax classes, intra of one row.

    Raises:
        ValueError: If the shapes differ, an activation is unknown, or `tau`
            is not positive.
    """
    synced = (
        sync_intra and dist.is_available() and dist.is_initialized()
        and dist.get_world_size() > 1)
    options = _checked(student, teacher, ('softmax', 'sigmoid', 'none'), tau,
                       student_activation, teacher_activation, float(eps),
                       chunk_numel, synced)
    num_columns, numel = student.shape[1], student.numel()
    if not (numel or synced and num_columns):
        zero = _connected_zero(student)
        return dict(inter=zero, intra=zero)
    teacher, kernels = _frozen(teacher), _kernels(student, options)
    if torch.compiler.is_compiling() and not synced:
        inter, intra = formula(student, teacher, options)
    elif numel > pearson.SMALL_NUMEL or synced or chunk_numel or kernels:
        inter, intra = distances(student, teacher, options, *kernels)
    else:
        inter, intra = small_distances(student, teacher, options)
    # A term that is constant by design carries no gradient, like one without
    # weight: one number has no variance, so that its correlation counts as 0;
    # two numbers that sum to 1 are d and -d once they are centred, so that
    # their correlation is 1 or -1 whatever d is.
    if num_columns <= (2 if options.softmax else 1):
        inter = inter.detach()
    if numel == num_columns and not synced:
        intra = intra.detach()
    if tau != 1:
        inter, intra = options.tau**2 * inter, options.tau**2 * intra
    return dict(inter=inter, intra=intra)


def _kernels(student: Tensor, options: Options) -> tuple:
    """Triton's passes over the logits where they are asked for."""
    if os.environ.get('MMDIST_TRITON') != '1' or not student.numel():
        return ()
    try:
        from .triton_pearson import passes
    except ImportError:  # no Triton here
        return ()
    return passes(student, options)


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

    Args: see :func:`dist_terms`; there is no activation 'none'.

    Returns:
        dict[str, Tensor]: The scalar 'kl'; 0 where there are no rows.

    Raises:
        ValueError: If the shapes differ, an activation is unknown, or `tau`
            is not positive.
    """
    options = _checked(student, teacher, ('softmax', 'sigmoid'), tau,
                       student_activation, teacher_activation)
    if not student.numel():
        return dict(kl=_connected_zero(student))
    teacher = _frozen(teacher)
    if torch.compiler.is_compiling():
        kl = _divergence(student, teacher, options)
    else:
        kl = Derived.apply(student, teacher, options,
                           (_kl_forward, _kl_backward, _divergence))
    return dict(kl=kl if tau == 1 else options.tau**2 * kl)


def _logs(logits: Tensor,
          activation: str,
          options: Options,
          axis: int,
          complement: bool = False) -> Tensor:
    """Logarithms of probabilities that sum to 1 over the classes; for a
    sigmoid student ``log p``, or ``log(1 - p)``, of each class."""
    logits = logits.to(compute_dtype(logits))
    if options.tau != 1:
        logits = logits / options.tau
    if activation == 'sigmoid':
        logs = F.logsigmoid(-logits if complement else logits)
        if options.student_activation == 'softmax':
            logs = logs.log_softmax(axis)
    else:
        logs = logits.log_softmax(axis)
        logs = torch.log1p(-logs.exp()) if complement else logs
    # Finite, so that 0 times any is 0: logits of -inf mask classes.
    clamp = torch.clamp if torch.is_grad_enabled() else torch.clamp_
    return clamp(logs, min=torch.finfo(logs.dtype).min)


def _divergence(student: Tensor,
                teacher: Tensor,
                options: Options,
                axis: int = 1) -> Tensor:
    """The mean over rows of the divergence, for autograd."""
    total, sigmoid = 0., options.student_activation == 'sigmoid'
    for complement in (False, True)[:1 + sigmoid]:
        log_t = _logs(teacher, options.teacher_activation, options, axis,
                      complement)
        log_s = _logs(student, options.student_activation, options, axis,
                      complement)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total * (student.shape[axis] / student.numel())


def _kl_forward(student: Tensor, teacher: Tensor,
                options: Options) -> Tuple[Tensor, None]:
    axis = class_axis(student)
    means = [
        _divergence(s, t, options, axis).double() *
        (s.numel() / student.numel())
        for s, t in chunks(axis, options, student, teacher)
    ]
    return sum(means).to(compute_dtype(student)), None


def _kl_backward(student: Tensor, teacher: Tensor, options: Options,
                 state: None, grad: Tensor) -> Tensor:
    """The gradient is the difference of the probabilities, whatever the
    activations."""
    axis, gradient = class_axis(student), new_gradient(student)
    scale = grad * (student.shape[1] / (options.tau * student.numel()))
    for s, t, out in chunks(axis, options, student, teacher, gradient):
        p = _logs(s, options.student_activation, options, axis).exp_()
        q = _logs(t, options.teacher_activation, options, axis).exp_()
        out.copy_(p.sub_(q).mul_(scale))
    return gradient


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
        pair = (x.to(compute_dtype(x)) for x in (feat_s, _frozen(feat_t)))
        squares = F.mse_loss(*pair, reduction='sum')
        total = total + squares / max(feat_s.numel(), 1)
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


def _checked(student: Tensor, teacher: Tensor, known: Sequence[str],
             tau: float, student_activation: str,
             teacher_activation: Optional[str], *more) -> Options:
    """The options; differing shapes and unknown activations are refused."""
    _check_shapes(student, teacher)
    activations = student_activation, teacher_activation or student_activation
    for activation in activations:
        if activation not in known:
            names = ', '.join(map(repr, known[:-1]))
            raise ValueError(f'an activation must be {names} or {known[-1]!r},'
                             f' but got {activation!r}')
    if not tau > 0:
        raise ValueError(f'tau must be positive, but got {tau}')
    return Options(float(tau), *activations, *more)


def _check_shapes(student: Tensor,
                  teacher: Tensor,
                  what: str = 'logits') -> None:
    """Refuse tensors that are no table, or not the same."""
    if student.shape != teacher.shape:
        raise ValueError(
            f'student and teacher {what} must have one shape, but got '
            f'{tuple(student.shape)} and {tuple(teacher.shape)}; resize or '
            'project one of them')
    if student.dim() < 2:
        raise ValueError(f'{what} must be (R, C) or (N, C, *spatial), but got '
                         f'the shape {tuple(student.shape)}')
