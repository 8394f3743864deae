"""The relations of DIST of a small table, whole.

Where calls take longer than what they compute, both models go through each
of them together, what backward needs is kept, and nothing is recomputed:
half of the calls of the formula that autograd differentiates.
"""
from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from .blocks import compute_dtype
from .rule import Rule, activate, differentiated_once, rounded_squares

# Logits of a table up to which this is the faster way.
SMALL = 2**17
# Up to which float64 takes no longer than float32.
TINY = 2**13


class Relation(NamedTuple):
    """Rows, or columns, and their correlations; see :func:`_relate`.

    Attributes:
        centred (Tensor): ``(2, R, C)``, the student's and the teacher's.
        squares (Tensor): Sums of their squares.
        inverse (Tensor): 1 by the product of norms and eps; 0 for constant
            ones.
        rho (Tensor): The correlations; 0 for constant ones.
    """
    centred: Tensor
    squares: Tensor
    inverse: Tensor
    rho: Tensor


def _relate(p: Tensor, dim: int, eps: float, dtype: torch.dtype) -> Relation:
    """Correlate the probabilities of student and teacher, ``(2, R, C)``.

    Those that vary no more than ``dtype`` tells apart are constant.
    """
    mean = p.mean(dim, True)
    centred = p - mean
    squares = centred.square().sum(dim, True)
    least = rounded_squares(mean, p.shape[dim], dtype)
    varies = (squares > least).all(0)
    inverse = squares.prod(0).sqrt_().add_(eps).reciprocal_()
    inverse = torch.where(varies, inverse, inverse.new_zeros(()))
    products = torch.mul(*centred).sum(dim - 1, True)
    return Relation(centred, torch.maximum(squares, least), inverse,
                    products.mul_(inverse))


def _of_student(relation: Relation, grad: Tensor) -> Tensor:
    """The gradient of the student's probabilities where that of each
    correlation is ``grad``."""
    a, b = relation.centred
    squares_a, squares_b = relation.squares
    of_b = relation.inverse * grad
    of_a = (squares_b / squares_a).sqrt_().mul_(relation.rho).mul_(of_b)
    return (b * of_b).addcmul_(a, of_a, value=-1)


def _to_rows(logits: Tensor, dtype: torch.dtype) -> Tensor:
    if logits.dim() > 2:
        logits = logits.movedim(1, -1).flatten(0, -2)
    return logits.to(dtype)


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_to_rows`."""
    rows = rows.to(like.dtype)
    if like.dim() == 2:
        return rows
    return rows.view(like.shape[0], *like.shape[2:],
                     like.shape[1]).movedim(-1, 1)


def _activate(student: Tensor, teacher: Tensor, rule: Rule) -> Tensor:
    """Probabilities of both, ``(2, R, C)``."""
    tiny = student.numel() < TINY
    dtype = torch.float64 if tiny else compute_dtype(student)
    rows = torch.stack([_to_rows(x, dtype) for x in (student, teacher)])
    if rule.tau != 1:
        rows /= rule.tau
    if rule.student == rule.teacher:
        return activate(rows, rule.student, 2)
    return torch.stack(
        [activate(rows[0], rule.student),
         activate(rows[1], rule.teacher)])


class SmallDistances(torch.autograd.Function):
    """See :func:`mmdist.models.losses.fused.distances`."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor,
                rule: Rule) -> Tuple[Tensor, Tensor]:
        p = _activate(student, teacher, rule)
        dtype = compute_dtype(student)
        rows, columns = (_relate(p, dim, rule.eps, dtype) for dim in (2, 1))
        ctx.rule = rule
        ctx.save_for_backward(student, p[0], *rows, *columns)
        return ((1 - rows.rho.mean()).to(dtype),
                (1 - columns.rho.mean()).to(dtype))

    @staticmethod
    @differentiated_once
    def backward(ctx, grad_inter: Tensor, grad_intra: Tensor) -> tuple:
        student, p, *relations = ctx.saved_tensors
        of_p = _of_student(
            Relation(*relations[:4]),
            grad_inter / (-p.shape[0] * ctx.rule.tau))
        of_p += _of_student(
            Relation(*relations[4:]),
            grad_intra / (-p.shape[1] * ctx.rule.tau))
        of_p *= p
        if ctx.rule.student == 'softmax':
            of_p -= p * of_p.sum(1, True)
        else:
            of_p.addcmul_(of_p, p, value=-1)
        return _from_rows(of_p, student), None, None
