"""The relations of DIST of a small table, whole.

Where calls take longer than what they compute, or their tables stay in the
cache, both models go through each of them together, what backward needs is
kept, and nothing is recomputed: half of the calls of the formula that autograd
differentiates.
"""
from typing import NamedTuple, Tuple

import torch
from torch import Tensor

from .blocks import compute_dtype
from .rule import Rule, activate, differentiated_once, rounded_squares

# Logits of a table below which this is the faster way.
SMALL = 9 * 2**15
# Below which float64 takes no longer than float32.
TINY = 2**12


class Relations(NamedTuple):
    """Rows and columns of probabilities, and their correlations.

    Attributes:
        rows (Tensor): Centred by row, ``(2, R, C)``, the student's and the
            teacher's.
        columns (Tensor): The same, centred by column.
        squares (Tensor): Sums of their squares, ``(2, R + C)``; of constant
            ones what can be divided by.
        inverse (Tensor): 1 by the product of norms and eps, ``(R + C, )``; 0
            for constant ones.
        rho (Tensor): The correlations; 0 for constant ones.
    """
    rows: Tensor
    columns: Tensor
    squares: Tensor
    inverse: Tensor
    rho: Tensor


def _relate(p: Tensor, eps: float, dtype: torch.dtype) -> Relations:
    """Correlate the probabilities of student and teacher, ``(2, R, C)``.

    Those that vary no more than ``dtype`` tells apart are constant.
    """
    number, num_classes = p.shape[1:]
    # A mean is a sum and a division; the difference can divide, too.
    of_rows, of_columns = p.sum(2, True), p.sum(1, True)
    rows = torch.add(p, of_rows, alpha=-1 / num_classes)
    columns = torch.add(p, of_columns, alpha=-1 / number)
    squares = torch.cat([(rows * rows).sum(2), (columns * columns).sum(1)], 1)
    # As of means: a number times the square of a mean is that of a sum,
    # divided by the number.
    sums = [of_rows * num_classes**-.5, of_columns.mT * number**-.5]
    least = rounded_squares(torch.cat(sums, 1).squeeze(2), 1, dtype)
    constant = (squares <= least).any(0)
    inverse = torch.mul(*squares.unbind()).sqrt_().add_(eps).reciprocal_()
    inverse.masked_fill_(constant, 0)
    products = torch.cat([
        torch.mul(*rows.unbind()).sum(1),
        torch.mul(*columns.unbind()).sum(0)
    ])
    return Relations(rows, columns, torch.maximum(squares, least), inverse,
                     products.mul_(inverse))


def _of_student(relations: Relations, grad: Tensor) -> Tensor:
    """The gradient of the student's probabilities where that of the
    correlations is ``grad``."""
    squares_s, squares_t = relations.squares.unbind()
    of_t = relations.inverse * grad
    of_s = (squares_t / squares_s).sqrt_().mul_(relations.rho).mul_(of_t)
    (rows_s, rows_t), (columns_s, columns_t) = (
        x.unbind() for x in (relations.rows, relations.columns))
    sizes = rows_s.shape
    (rows_of_s, columns_of_s), (rows_of_t, columns_of_t) = (
        x.split_with_sizes(sizes) for x in (of_s, of_t))
    gradient = rows_t * rows_of_t[:, None]
    gradient.addcmul_(rows_s, rows_of_s[:, None], value=-1)
    gradient.addcmul_(columns_t, columns_of_t)
    return gradient.addcmul_(columns_s, columns_of_s, value=-1)


def _to_rows(logits: Tensor) -> Tensor:
    if logits.dim() > 2:
        logits = logits.movedim(1, -1).flatten(0, -2)
    return logits


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
    # promoted, where autocast gives the models two dtypes
    rows = torch.stack([_to_rows(student), _to_rows(teacher)]).to(dtype)
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
        relations = _relate(p, rule.eps, dtype)
        ctx.rule = rule
        ctx.save_for_backward(student, p[0], *relations)
        return tuple(
            torch.rsub(rho.sum(), 1, alpha=1 / len(rho)).to(dtype)
            for rho in relations.rho.split_with_sizes(p.shape[1:]))

    @staticmethod
    @differentiated_once
    def backward(ctx, grad_inter: Tensor, grad_intra: Tensor) -> tuple:
        student, p, *relations = ctx.saved_tensors
        grad = torch.cat([
            (grad / (-number * ctx.rule.tau)).expand(number)
            for grad, number in zip((grad_inter, grad_intra), p.shape)
        ])
        of_p = _of_student(Relations(*relations), grad)
        of_p *= p
        if ctx.rule.student == 'softmax':
            of_p.addcmul_(p, of_p.sum(1, True), value=-1)
        else:
            of_p.addcmul_(of_p, p, value=-1)
        return _from_rows(of_p, student), None, None
