"""The Kullback-Leibler divergence of vanilla KD; the gradient of the student's
logits is the difference of the probabilities, whatever the activations."""
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .pearson import Once, Options, Table, compute_dtype


def _logs(logits: Tensor, activation: str, options: Options, axis: int,
          complement: bool) -> Tensor:
    """Logarithms of probabilities that sum to 1 over the classes; for a
    sigmoid student ``log p``, or ``log(1 - p)``, of each class."""
    logits = logits.to(compute_dtype(logits))
    if options.tau != 1:
        logits = logits / options.tau
    if activation == 'sigmoid':
        logs = F.logsigmoid(-logits if complement else logits)
        if options.student == 'softmax':
            logs = logs.log_softmax(axis)
    else:
        logs = logits.log_softmax(axis)
        logs = torch.log1p(-logs.exp()) if complement else logs
    # Finite, so that 0 times any is 0: logits of -inf mask classes.
    clamp = torch.clamp if torch.is_grad_enabled() else torch.clamp_
    return clamp(logs, min=torch.finfo(logs.dtype).min)


def _sum(student: Tensor, teacher: Tensor, options: Options,
         axis: int) -> Tensor:
    """The sum of the divergences of all rows."""
    total = 0.
    for complement in (False, True)[:1 + (options.student == 'sigmoid')]:
        log_t = _logs(teacher, options.teacher, options, axis, complement)
        log_s = _logs(student, options.student, options, axis, complement)
        total = total + (log_t.exp() * (log_t - log_s)).sum()
    return total


def _forward(student: Tensor, teacher: Tensor, options: Options,
             keep: bool) -> Tuple[Tensor, None]:
    table = Table(student, options.chunk_numel)
    sums = [
        _sum(*parts, options, table.axis)
        for parts in table.parts(student, teacher)
    ]
    total = torch.stack(sums).sum(dtype=torch.float64) / table.num_rows
    return total.to(compute_dtype(student)), None


def _backward(student: Tensor, teacher: Tensor, options: Options, state: None,
              grad: Tensor) -> Tensor:
    table = Table(student, options.chunk_numel)
    scale = grad / (options.tau * table.num_rows)
    gradient = table.new_gradient(student)
    for s, t, out in table.parts(student, teacher, gradient):
        p = _logs(s, options.student, options, table.axis, False).exp_()
        q = _logs(t, options.teacher, options, table.axis, False).exp_()
        out.copy_(p.sub_(q).mul_(scale))
    return gradient


def divergence(student: Tensor, teacher: Tensor, options: Options) -> Tensor:
    """The mean over rows of the divergence of the student from the teacher."""
    if torch.compiler.is_compiling():  # one expression
        number = student.numel() // student.shape[1]
        return _sum(student, teacher, options, 1) / number
    return Once.apply(student, teacher, options, _forward, _backward, False)
