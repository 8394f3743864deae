"""The Kullback-Leibler divergence of vanilla KD, computed block by block.

What makes tables of the logits' size is done on blocks of them. The gradient
is the difference of probabilities, whatever the activations.
"""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Table, compute_dtype
from .rule import Rule, differentiated_once


def _finite(logs: Tensor) -> Tensor:
    """Logarithms of which 0 times any is 0: logits of -inf mask classes."""
    lowest = torch.finfo(logs.dtype).min
    if logs.requires_grad:
        return logs.clamp(min=lowest)
    return logs.clamp_(min=lowest)


def _log_distribution(logits: Tensor, activation: str, axis: int) -> Tensor:
    """Logarithms of probabilities that sum to 1 over the classes, finite."""
    if activation == 'softmax':
        return _finite(logits.log_softmax(axis))
    logs = F.logsigmoid(logits)
    return _finite(logs - logs.logsumexp(axis, keepdim=True))


def _log_pair(logits: Tensor, activation: str,
              axis: int) -> Tuple[Tensor, Tensor]:
    """``log p`` and ``log(1 - p)`` of every class, both finite."""
    if activation == 'sigmoid':
        return _finite(F.logsigmoid(logits)), _finite(F.logsigmoid(-logits))
    log_p = logits.log_softmax(axis)
    return _finite(log_p), _finite(torch.log1p(-log_p.exp()))


def _sum(student: Tensor, teacher: Tensor, rule: Rule, axis: int) -> Tensor:
    """The divergences of all rows of a block together."""
    if rule.student == 'softmax':
        log_t = _log_distribution(teacher, rule.teacher, axis)
        difference = log_t - _log_distribution(student, 'softmax', axis)
        return difference.mul_(log_t.exp_()).sum()
    pairs = zip(
        _log_pair(teacher, rule.teacher, axis),
        _log_pair(student, 'sigmoid', axis))
    return sum((log_t.exp() * (log_t - log_s)).sum() for log_t, log_s in pairs)


def _difference(student: Tensor, teacher: Tensor, rule: Rule,
                axis: int) -> Tensor:
    """The student's probabilities less the teacher's, of a block."""
    if rule.student == rule.teacher == 'sigmoid':
        return student.sigmoid() - teacher.sigmoid()
    if rule.student == 'sigmoid':
        return student.sigmoid() - teacher.softmax(axis)
    p_t = _log_distribution(teacher, rule.teacher, axis).exp_()
    return student.softmax(axis) - p_t


def _scaled(logits: Tensor, tau: float) -> Tensor:
    logits = logits.to(compute_dtype(logits))
    return logits / tau if tau != 1 else logits


def plain_divergence(student: Tensor, teacher: Tensor, rule: Rule) -> Tensor:
    """:func:`divergence` as one expression, for the compiler."""
    number = student.numel() // student.shape[1]
    s, t = (_scaled(logits, rule.tau) for logits in (student, teacher))
    return _sum(s, t, rule, 1) / number


class _Divergence(torch.autograd.Function):
    """:func:`divergence`, differentiated by hand."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, rule: Rule) -> Tensor:
        table = Table(student, teacher)
        ctx.rule = rule
        ctx.save_for_backward(student, teacher)
        sums = [
            _sum(*(_scaled(x, rule.tau) for x in blocks), rule, table.axis)
            for blocks in table.parts(table.student, table.teacher)
        ]
        total = torch.stack(sums).sum(dtype=torch.float64) / table.num_rows
        return total.to(compute_dtype(student))

    @staticmethod
    @differentiated_once
    def backward(ctx, grad: Tensor) -> tuple:
        student, teacher = ctx.saved_tensors
        rule, table = ctx.rule, Table(student, teacher)
        scale = grad / (rule.tau * table.num_rows)
        gradient = table.empty()
        for *blocks, out in table.parts(table.student, table.teacher,
                                        table.view(gradient)):
            blocks = (_scaled(x, rule.tau) for x in blocks)
            out.copy_(_difference(*blocks, rule, table.axis).mul_(scale))
        return gradient, None, None


def divergence(student: Tensor, teacher: Tensor, rule: Rule) -> Tensor:
    """The mean over rows of the divergence of the student from the teacher.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``, R > 0.
        teacher (Tensor): The same shape; gets no gradient.
        rule (Rule): How they become probabilities; its eps is not used.

    Returns:
        Tensor: A scalar, float32, or float64 for float64. It can be
        differentiated once.
    """
    if torch.compiler.is_compiling():
        return plain_divergence(student, teacher, rule)
    return _Divergence.apply(student, teacher, rule)
