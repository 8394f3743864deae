"""The relations of DIST, computed block by block.

Written as tensor operations, the formula makes ten tables of the logits'
size. Here a block of the logits that fits a processor's cache is read once
forward and once backward; what is kept between the two are five numbers a
class. Rows need nothing but themselves; columns need the moments of all
rows, to which the blocks add up.

Probabilities are centred before they are squared: a row of a softmax has the
mean ``1 / C``, and a column its mean within the block.
"""
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import direct
from .blocks import Table, compute_dtype
from .rule import ROUNDINGS, Rule, differentiated_once

LOG2_E = 1 / math.log(2)
MEAN_S, MEAN_T, SQUARES_S, SQUARES_T, PRODUCTS = range(5)
Mean = Optional[Tensor]


class Numbers(NamedTuple):
    """Numbers as tensors without dimensions, which calls take faster.

    Attributes:
        peak (Tensor): Factor of the largest logit in a power of 2.
        minus_mean (Tensor): ``-1 / C``.
        rounding (Tensor): Squared deviations of a row of the mean 1 that are
            its rounding.
        least (Tensor): The same of a softmax; no less than what can be
            multiplied.
        eps (Tensor): That of the rule.
        zero (Tensor): 0.
    """
    peak: Tensor
    minus_mean: Tensor
    rounding: Tensor
    least: Tensor
    eps: Tensor
    zero: Tensor

    @classmethod
    def of(cls, rule: Rule, table: Table) -> 'Numbers':
        """Those of a table."""
        dtype, number = compute_dtype(table.student), table.num_classes
        info = torch.finfo(dtype)
        rounding = number * (ROUNDINGS * info.eps)**2
        least = max(rounding / number**2, info.tiny**.5)
        numbers = [
            -LOG2_E / rule.tau, -1 / number, rounding, least, rule.eps, 0.
        ]
        return cls(
            *torch.tensor(numbers, dtype=dtype, device=table.student.device))


class Rows(NamedTuple):
    """A block's probabilities without the means of their rows.

    Attributes:
        a (Tensor): The student's, three dimensions.
        b (Tensor): The teacher's.
        mean_a (Tensor | None): What was subtracted; None is ``1 / C``.
        mean_b (Tensor | None): The same of the teacher.
        squares_a (Tensor): Sum of the squares of ``a``.
        squares_b (Tensor): Sum of the squares of ``b``.
        inverse (Tensor): 1 by the product of the rows' norms and eps; 0 for
            constant rows.
        rho (Tensor): Their correlation; 0 for constant rows.
        spare (Tensor): A buffer of the block's size.
    """
    a: Tensor
    b: Tensor
    mean_a: Mean
    mean_b: Mean
    squares_a: Tensor
    squares_b: Tensor
    inverse: Tensor
    rho: Tensor
    spare: Tensor


def _centred(logits: Tensor, tau: float, activation: str, axis: int,
             numbers: Numbers, out: Tensor) -> Mean:
    """Write probabilities without the mean of their row, and return that."""
    if logits.dtype != out.dtype or logits.stride(2) != 1:
        logits = out.copy_(logits)
    if activation == 'softmax':
        return _centred_softmax(logits, tau, axis, numbers, out)
    if tau == 1:
        torch.sigmoid(logits, out=out)
    else:
        torch.div(logits, tau, out=out).sigmoid_()
    mean = out.mean(axis, True)
    out -= mean
    return mean


def _centred_softmax(logits: Tensor, tau: float, axis: int, numbers: Numbers,
                     out: Tensor) -> None:
    """:func:`_centred` by powers of 2, which take a third of the time of the
    library's exponentials."""
    peak = logits.amax(axis, True).mul_(numbers.peak)
    # The rounding of the peak is a factor of the row: the sum divides it out.
    torch.add(peak, logits, alpha=LOG2_E / tau, out=out).exp2_()
    inverse = out.sum(axis, True).reciprocal_()
    torch.addcmul(numbers.minus_mean, out, inverse, out=out)


def _rows(student: Tensor, teacher: Tensor, buffers: Sequence[Tensor],
          axis: int, rule: Rule, numbers: Numbers) -> Rows:
    """The rows of a block, in the buffers."""
    a, b, spare = buffers
    mean_a = _centred(student, rule.tau, rule.student, axis, numbers, a)
    mean_b = _centred(teacher, rule.tau, rule.teacher, axis, numbers, b)
    squares_a, squares_b, products = _sums(a, b, spare, axis)
    varies = _varies(squares_a, mean_a, numbers)
    varies &= _varies(squares_b, mean_b, numbers)
    inverse = (squares_a * squares_b).sqrt_().add_(numbers.eps).reciprocal_()
    inverse = torch.where(varies, inverse, numbers.zero)
    return Rows(a, b, mean_a, mean_b, squares_a, squares_b, inverse,
                products.mul_(inverse), spare)


def _sums(a: Tensor, b: Tensor, spare: Tensor,
          axes: Union[int, Sequence[int]]) -> List[Tensor]:
    """Sums of both's squares and of their products, dimensions kept."""
    return [
        torch.mul(x, y, out=spare).sum(axes, True)
        for x, y in ((a, a), (b, b), (a, b))
    ]


def _varies(squares: Tensor, mean: Mean, numbers: Numbers) -> Tensor:
    """Whether deviations are more than the rounding of their mean."""
    if mean is None:
        return squares > numbers.least
    least = mean.square().mul_(numbers.rounding)
    return squares > torch.maximum(least, numbers.least)


def _whole(centred: Tensor, mean: Mean) -> Tensor:
    """Undo the centring where means differ, in place."""
    return centred if mean is None else centred.add_(mean)


def _column_moments(rows: Rows, axes: Sequence[int]) -> List[Tensor]:
    """Means and centred sums of squares and products of the classes.

    The means of a softmax are without ``1 / C``. Overwrites the rows.
    """
    a, b = _whole(rows.a, rows.mean_a), _whole(rows.b, rows.mean_b)
    means = [p.mean(axes, True) for p in (a, b)]
    for p, mean in zip((a, b), means):
        p -= mean
    return means + _sums(a, b, rows.spare, axes)


def _merged(parts: Tensor, counts: Sequence[int]) -> Tensor:
    """The moments of all blocks together, from ``(blocks, 5, C)``."""
    if len(parts) == 1:
        return parts[0]
    weights = torch.tensor(counts, dtype=torch.float64)
    weights = weights.to(parts.device)[:, None]
    means = (weights[..., None] * parts[:, :2]).sum(0) / sum(counts)
    d_s, d_t = (parts[:, :2] - means).unbind(1)
    between = [(weights * x * y).sum(0)
               for x, y in ((d_s, d_s), (d_t, d_t), (d_s, d_t))]
    return torch.cat([means, parts[:, 2:].sum(0) + torch.stack(between)])


def _forward(table: Table, rule: Rule) -> Tuple[Tensor, Tensor]:
    """What :func:`relations` returns."""
    numbers = Numbers.of(rule, table)
    similarities, moments, counts = [], [], []
    for student, teacher, buffers in table.blocks(table.student,
                                                  table.teacher):
        rows = _rows(student, teacher, buffers, table.axis, rule, numbers)
        similarities.append(rows.rho.sum())
        moments += _column_moments(rows, table.axes)
        counts.append(rows.rho.numel())
    moments = torch.cat(moments).double().view(-1, 5, table.num_classes)
    similarity = torch.stack(similarities).double().sum()
    return similarity, _merged(moments, counts)


def _gradient(of_rows: Tensor, of_columns: Tensor, student: Tensor,
              teacher: Tensor, rule: Rule) -> Tensor:
    """The gradient of the student's logits, in their shape and dtype.

    Args:
        of_rows (Tensor): That of a row's correlation.
        of_columns (Tensor): ``(3, C)``, see :func:`_of_columns`.
        student (Tensor): Logits.
        teacher (Tensor): Logits.
        rule (Rule): How they become relations.
    """
    table = Table(student, teacher)
    numbers = Numbers.of(rule, table)
    shape = (3, 1, 1, -1) if table.axis == 2 else (3, 1, -1, 1)
    columns = (of_columns / rule.tau).to(numbers.eps).view(shape).unbind()
    of_rows = (of_rows / rule.tau).to(numbers.eps)
    gradient = table.empty(student)
    for *logits, out, buffers in table.blocks(table.student, table.teacher,
                                              table.view(gradient)):
        rows = _rows(*logits, buffers, table.axis, rule, numbers)
        of_p = _gradient_of_p(rows, of_rows, columns, numbers)
        _through(of_p, rows, table.axis, numbers, out)
    return gradient


def _gradient_of_p(rows: Rows, of_rows: Tensor, columns: Sequence[Tensor],
                   numbers: Numbers) -> Tensor:
    """The gradient of the student's probabilities, up to a number a row
    where these sum to 1."""
    of_s, of_t, added = columns
    of_b = rows.inverse * of_rows
    ratio = rows.squares_b / torch.maximum(rows.squares_a, numbers.least)
    of_a = ratio.sqrt_().mul_(rows.rho).mul_(of_b)
    total = torch.addcmul(added, rows.b, of_b, out=rows.spare)
    total.addcmul_(rows.a, of_a, value=-1)
    total.addcmul_(_whole(rows.b, rows.mean_b), of_t)
    return total.addcmul_(_whole(rows.a, rows.mean_a), of_s)


def _through(of_p: Tensor, rows: Rows, axis: int, numbers: Numbers,
             out: Tensor) -> None:
    """Backward through the activation."""
    p = rows.a
    if rows.mean_a is None:
        p -= numbers.minus_mean
        of_p -= torch.mul(of_p, p, out=rows.b).sum(axis, True)
        torch.mul(of_p, p, out=out)
    else:
        of_p *= p
        torch.addcmul(of_p, of_p, p, value=-1, out=out)


class _Distances(torch.autograd.Function):
    """:func:`distances` of one process, differentiated by hand."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor,
                rule: Rule) -> Tuple[Tensor, Tensor]:
        table = Table(student, teacher)
        similarity, moments = _forward(table, rule)
        dtype = compute_dtype(student)
        ctx.rule, ctx.num_rows = rule, table.num_rows
        inverse, rho = _correlations(moments, table.num_rows, rule, dtype)
        ctx.save_for_backward(student, teacher, moments, inverse, rho)
        return ((1 - similarity / table.num_rows).to(dtype),
                (1 - rho.mean()).to(dtype))

    @staticmethod
    @differentiated_once
    def backward(ctx, grad_inter: Tensor, grad_intra: Tensor) -> tuple:
        student, teacher, moments, inverse, rho = ctx.saved_tensors
        of_moments = _of_correlations(grad_intra, moments, inverse, rho)
        gradient = _gradient(grad_inter / -ctx.num_rows,
                             _of_columns(*of_moments, moments), student,
                             teacher, ctx.rule)
        return gradient, None, None


@torch.library.custom_op('mmdist::relations', mutates_args=())
def _operator(student: Tensor, teacher: Tensor, tau: float,
              student_activation: str, teacher_activation: str,
              eps: float) -> Tuple[Tensor, Tensor]:
    """:func:`relations`, which the compiler does not look into."""
    rule = Rule(tau, student_activation, teacher_activation, eps)
    return _forward(Table(student, teacher), rule)


@_operator.register_fake
def _(student, teacher, tau, student_activation, teacher_activation, eps):
    return (student.new_empty((), dtype=torch.float64),
            student.new_empty((5, student.shape[1]), dtype=torch.float64))


@torch.library.custom_op('mmdist::relations_backward', mutates_args=())
def _backward_operator(grad_similarity: Tensor, grad_moments: Tensor,
                       student: Tensor, teacher: Tensor, moments: Tensor,
                       tau: float, student_activation: str,
                       teacher_activation: str, eps: float) -> Tensor:
    columns = _of_columns(grad_moments[SQUARES_S], grad_moments[PRODUCTS],
                          moments)
    columns[2] += grad_moments[MEAN_S] * student.shape[1] / student.numel()
    return _gradient(grad_similarity, columns, student, teacher,
                     Rule(tau, student_activation, teacher_activation, eps))


@_backward_operator.register_fake
def _(grad_similarity, grad_moments, student, teacher, *others):
    return Table(student, teacher).empty(student)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, *ctx.rule = inputs
    ctx.save_for_backward(student, teacher, output[1])


def _backward(ctx, grad_similarity: Tensor, grad_moments: Tensor) -> tuple:
    gradient = _backward_operator(grad_similarity, grad_moments,
                                  *ctx.saved_tensors, *ctx.rule)
    return gradient, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def relations(student: Tensor, teacher: Tensor,
              rule: Rule) -> Tuple[Tensor, Tensor]:
    """What the distances of rows and columns are made of.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``, R > 0.
        teacher (Tensor): The same shape; gets no gradient.
        rule (Rule): How they become relations.

    Returns:
        tuple[Tensor, Tensor]: The sum of the rows' correlations, float64; and
        ``(5, C)`` float64: the means of the student's and the teacher's
        columns, less ``1 / C`` where the activation is a softmax, their
        centred sums of squares, and those of products. They can be
        differentiated once.
    """
    return _operator(student, teacher, *rule)


def distances(student: Tensor, teacher: Tensor,
              rule: Rule) -> Tuple[Tensor, Tensor]:
    """The mean Pearson distances of rows and of columns.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``, R > 0.
        teacher (Tensor): The same shape; gets no gradient.
        rule (Rule): How they become relations.

    Returns:
        tuple[Tensor, Tensor]: Two scalars, float32, or float64 for float64.
        They can be differentiated once.
    """
    if not torch.compiler.is_compiling():
        small = student.numel() < direct.SMALL
        function = direct.SmallDistances if small else _Distances
        return function.apply(student, teacher, rule)
    similarity, moments = relations(student, teacher, rule)
    num_rows = student.numel() // student.shape[1]
    dtype = compute_dtype(student)
    intra = column_distance(moments, num_rows, rule, dtype)
    return (1 - similarity / num_rows).to(dtype), intra.to(dtype)


def over_processes(moments: Tensor, num_rows: int) -> Tuple[Tensor, Tensor]:
    """The moments of the rows of all processes, differentiable.

    One small ``all_reduce`` of sums about 0, in float64.

    Args:
        moments (Tensor): Of this process, ``(5, C)``; see :func:`relations`.
        num_rows (int): Rows of this process; may be 0.

    Returns:
        tuple[Tensor, Tensor]: ``(5, C)``, and the number of all rows.
    """
    from torch.distributed.nn.functional import all_reduce
    means, centred = moments[:2], moments[2:]
    number = torch.full_like(means[:1], num_rows)
    sums = all_reduce(
        torch.cat([means * number, centred + number * _squares(means),
                   number]))
    number = sums[-1:].detach()
    means = sums[:2] / number.clamp(min=1)
    centred = sums[2:5] - number * _squares(means)
    return torch.cat([means, centred]), number[0, 0]


def _squares(means: Tensor) -> Tensor:
    """Squares and the product of two rows, in the order of moments."""
    return means[[0, 1, 0]] * means[[0, 1, 1]]


def _correlations(moments: Tensor, num_rows: Union[int, Tensor], rule: Rule,
                  dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """1 by the product of the columns' norms and eps, and their
    correlations; both are 0 for constant columns."""
    shift = [[1 / moments.shape[1] if activation == 'softmax' else 0.]
             for activation in (rule.student, rule.teacher)]
    means = moments[:SQUARES_S] + moments.new_tensor(shift)
    rounding = ROUNDINGS * torch.finfo(dtype).eps * num_rows**0.5
    squares = moments[SQUARES_S:PRODUCTS]
    varies = (squares > means.mul_(rounding).square_()).all(0)
    inverse = squares.prod(0).sqrt_().add_(rule.eps).reciprocal_()
    inverse = torch.where(varies, inverse, moments.new_zeros(()))
    return inverse, moments[PRODUCTS] * inverse


def _of_correlations(grad: Tensor, moments: Tensor, inverse: Tensor,
                     rho: Tensor) -> Tuple[Tensor, Tensor]:
    """The gradients of the student's squares and of the products where that
    of the mean of ``1 - rho`` is ``grad``."""
    of_products = inverse * (grad / -len(rho))
    ratio = moments[SQUARES_T] / moments[SQUARES_S]
    of_squares = (ratio.sqrt_() * rho).mul_(of_products).mul_(-0.5)
    return of_squares.where(inverse > 0, 0.), of_products


def _of_columns(of_squares: Tensor, of_products: Tensor,
                moments: Tensor) -> Tensor:
    """Weights of the student's and of the teacher's probabilities in the
    gradient of a column, and what is added, ``(3, C)``."""
    of_s = 2 * of_squares
    added = of_s * moments[MEAN_S] + of_products * moments[MEAN_T]
    return torch.stack([of_s, of_products, -added])


class _ColumnDistance(torch.autograd.Function):
    """:func:`column_distance`, differentiated by hand as in
    :class:`_Distances`."""

    @staticmethod
    def forward(ctx, moments: Tensor, num_rows: Union[int, Tensor], rule: Rule,
                dtype: torch.dtype) -> Tensor:
        inverse, rho = _correlations(moments, num_rows, rule, dtype)
        ctx.save_for_backward(moments, inverse, rho)
        return 1 - rho.mean()

    @staticmethod
    @differentiated_once
    def backward(ctx, grad: Tensor) -> tuple:
        of_squares, of_products = _of_correlations(grad, *ctx.saved_tensors)
        zero = torch.zeros_like(of_squares)
        gradient = torch.stack([zero, zero, of_squares, zero, of_products])
        return gradient, None, None, None


def column_distance(moments: Tensor, num_rows: Union[int, Tensor], rule: Rule,
                    dtype: torch.dtype) -> Tensor:
    """The mean Pearson distance of the columns, differentiable by the
    student's moments, once.

    Args:
        moments (Tensor): ``(5, C)``, see :func:`relations`.
        num_rows (int | Tensor): Rows that they are of.
        rule (Rule): The same as the moments'.
        dtype (torch.dtype): Of the probabilities, whose rounding decides
            whether a column is constant.
    """
    return _ColumnDistance.apply(moments, num_rows, rule, dtype)
