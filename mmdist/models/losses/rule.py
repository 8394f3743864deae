"""What the two ways of computing DIST's relations have in common."""
from functools import wraps
from typing import Callable, NamedTuple, Union

import torch
from torch import Tensor

# A standard deviation of so many roundings of the mean is none.
ROUNDINGS = 8


class Rule(NamedTuple):
    """How logits become relations.

    Attributes:
        tau (float): Temperature.
        student (str): Activation, 'softmax' or 'sigmoid'.
        teacher (str): The same of the teacher.
        eps (float): Added to the product of norms.
    """
    tau: float
    student: str
    teacher: str
    eps: float


def activate(rows: Tensor, activation: str, dim: int = 1) -> Tensor:
    """Turn logits into probabilities.

    Args:
        rows (Tensor): ``(R, C)`` logits, already divided by the temperature.
        activation (str): 'softmax' over the classes, or 'sigmoid'.
        dim (int): The dimension of the classes.

    Returns:
        Tensor: ``(R, C)`` probabilities.
    """
    return rows.softmax(dim) if activation == 'softmax' else rows.sigmoid()


def rounded_squares(mean: Tensor, number: Union[int, Tensor],
                    dtype: torch.dtype) -> Tensor:
    """Squared deviations that are only the rounding of their mean.

    Args:
        mean (Tensor): Of numbers.
        number (int | Tensor): How many they are.
        dtype (torch.dtype): Of the numbers.

    Returns:
        Tensor: The sum of squares of what counts as constant; no less than
        what can be multiplied in the floating point format.
    """
    info = torch.finfo(dtype)
    least = mean * (ROUNDINGS * info.eps * number**0.5)
    return least.mul_(least).clamp_(min=info.tiny**0.5)


class _Derived(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient: Tensor, student: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        raise RuntimeError('the losses of mmdist cannot be differentiated '
                           'twice')


def differentiated_once(backward: Callable) -> Callable:
    """Refuse a second derivative, which autograd would take for 0.

    Args:
        backward (Callable): Of a function whose first input is the student's
            logits, which it saved first.
    """

    @wraps(backward)
    def wrapper(ctx, *grads: Tensor) -> tuple:
        if not torch.is_grad_enabled():  # without create_graph
            return backward(ctx, *grads)
        with torch.no_grad():
            gradient, *others = backward(ctx, *grads)
        return (_Derived.apply(gradient, ctx.saved_tensors[0]), *others)

    return wrapper
