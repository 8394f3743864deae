"""The relations of DIST, computed block by block.

Written as tensor operations, the formula makes ten tables of the logits'
size. Here a block of the logits that fits a processor's cache is read once
forward and once backward; what is kept between the two are seven numbers a
class, and up to eight a row in the memory of the gradient, where that has
room for them; else backward relates the rows again. Rows need nothing but
themselves (see :mod:`.rows`); columns need the moments of all rows, to which
the blocks add up.

Probabilities are centred before they are squared, rows by ``1 / C`` or the
mean of their sigmoids, columns by their mean within the block; they are kept
as they are, because centred ones have few digits where they are small.
"""
from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import direct
from .blocks import Block, Table, compute_dtype
from .rows import Rows, Ways
from .rule import Rule, differentiated_once, rounded_squares

Tensors = Sequence[Tensor]
MEAN_S, MEAN_T, SQUARES_S, SQUARES_T, PRODUCTS = range(5)


def _column_moments(buffers: Tensors, axes: Sequence[int],
                    out: Tensors) -> None:
    """Write means and centred sums of squares and products of the classes.

    Overwrites the probabilities.
    """
    p, q, spare = buffers
    for x, mean in ((p, out[MEAN_S]), (q, out[MEAN_T])):
        x.sub_(torch.mean(x, axes, True, out=mean))
    for x, y, total in ((p, p, out[SQUARES_S]), (q, q, out[SQUARES_T]),
                        (p, q, out[PRODUCTS])):
        torch.sum(torch.mul(x, y, out=spare), axes, True, out=total)


def _merge(total: Tensor, number: int, part: Tensor, more: int) -> None:
    """Add the moments of ``more`` rows to those of ``number``, ``(5, C)``
    both, in place."""
    share = more / (number + more)
    delta = part[:SQUARES_S] - total[:SQUARES_S]
    total[:SQUARES_S].add_(delta, alpha=share)
    d_s, d_t = delta
    for index, x, y in ((SQUARES_S, d_s, d_s), (SQUARES_T, d_t, d_t),
                        (PRODUCTS, d_s, d_t)):
        total[index].add_(part[index]).addcmul_(x, y, value=number * share)


def _forward(table: Table,
             ways: Ways,
             gradient: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """What :func:`relations` returns.

    Args:
        table (Table): The logits.
        ways (Ways): How they become relations.
        gradient (Tensor, optional): Where backward will write; what it needs
            is kept there.
    """
    similarities, moments, number = [], None, 0
    of_block = table.student.new_empty(
        5, table.num_classes, dtype=compute_dtype(table.student))
    for block in table.blocks(gradient):
        rows = (
            ways.new_rows(block.buffers[0])
            if gradient is None else ways.rows_within(block.gradient))
        ways.relate(block, rows)
        if gradient is None:
            similarities.append(ways.correlate(rows).sum((1, 2)))
        _column_moments(block.buffers, table.axes,
                        of_block.view(5, *table.of_classes).unbind())
        if number:
            _merge(moments, number, of_block, rows.rho.numel())
        else:
            moments = of_block.to(torch.float64, copy=True)
        number += rows.rho.numel()
    if gradient is not None:
        rho = ways.correlate(ways.rows_within(table.view(gradient)))
        similarities = [rho.sum((1, 2))]
    return torch.cat(similarities).double().sum(), moments


def _gradient(of_rows: Tensor,
              of_columns: Tensor,
              student: Tensor,
              teacher: Tensor,
              rule: Rule,
              gradient: Optional[Tensor] = None) -> Tensor:
    """The gradient of the student's logits, in their shape and dtype.

    Args:
        of_rows (Tensor): That of a row's correlation.
        of_columns (Tensor): ``(3, C)``, see :func:`_of_columns`, in the dtype
            that is computed in; overwritten.
        student (Tensor): Logits.
        teacher (Tensor): Logits.
        rule (Rule): How they become relations.
        gradient (Tensor, optional): With what :func:`_forward` has kept.
    """
    table = Table(student, teacher)
    ways = Ways.of(rule, table)
    columns = of_columns.div_(rule.tau).view(3, *table.of_classes).unbind()
    of_rows = (of_rows / rule.tau).to(of_columns.dtype)
    again = gradient is not None
    if again:
        ways.weigh(ways.rows_within(table.view(gradient)), of_rows)
    else:
        gradient = table.empty()
    for block in table.blocks(gradient):
        if again:
            rows = ways.rows_within(block.gradient)
            ways.again(block, rows)
            scale_q = ways.teacher.scale(rows.kept_q)
        else:
            rows, scale_q = ways.new_rows(block.buffers[0]), ways.numbers.one
            ways.relate(block, rows)
            ways.correlate(rows)
            ways.weigh(rows, of_rows)
        _gradient_of_p(block.buffers, rows, scale_q, columns)
        _through(rule.student, table.axis, block)
    return gradient


def _gradient_of_p(buffers: Tensors, rows: Rows, scale_q: Tensor,
                   columns: Tensors) -> None:
    """Write the gradient of the student's probabilities in the last buffer.
    Overwrites the teacher's."""
    p, q, out = buffers
    of_s, of_t, added = columns
    # One factor for the relations of the row and of the column.
    torch.addcmul(rows.of_q * scale_q, scale_q, of_t, out=out)
    torch.addcmul(added, q, out, out=out)
    out.addcmul_(p, torch.add(rows.of_p, of_s, out=q))
    out.sub_(rows.centre)


def _through(activation: str, axis: int, block: Block) -> None:
    """Backward through the activation, into the gradient."""
    p, spare, grad = block.buffers
    if activation == 'softmax':
        product = torch.mul(grad, p, out=spare)
        factors = product, p, product.sum(axis, True)
    else:
        grad.mul_(p)
        factors = grad, grad, p
    out = block.gradient
    if out.dtype == grad.dtype and out.stride(2) == 1:
        torch.addcmul(*factors, value=-1, out=out)
    else:
        out.copy_(torch.addcmul(*factors, value=-1, out=grad))


class _Distances(torch.autograd.Function):
    """:func:`distances` of one process, differentiated by hand."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, rule: Rule,
                differentiable: bool) -> Tuple[Tensor, Tensor]:
        table, dtype = Table(student, teacher), compute_dtype(student)
        ways = Ways.of(rule, table)
        # Backward writes what it needs over what forward keeps there, once.
        ctx.gradient = None
        if (differentiable and ctx.needs_input_grad[0]
                and student.dtype == dtype
                and table.has_room(ways.numbers_a_row)):
            ctx.gradient = table.empty()
        similarity, moments = _forward(table, ways, ctx.gradient)
        ctx.rule, ctx.num_rows = rule, table.num_rows
        inverse, rho = _correlations(moments, table.num_rows, rule, dtype)
        ctx.save_for_backward(student, teacher, moments, inverse, rho)
        return ((1 - similarity / table.num_rows).to(dtype),
                (1 - rho.mean()).to(dtype))

    @staticmethod
    @differentiated_once
    def backward(ctx, grad_inter: Tensor, grad_intra: Tensor) -> tuple:
        # Another backward, after or beside this one, computes all.
        gradient, ctx.gradient = ctx.gradient, None
        student, teacher, moments, inverse, rho = ctx.saved_tensors
        columns = _of_columns(
            *_of_correlations(grad_intra, moments, inverse, rho), moments)
        # Here, so that those of float64 are gone when blocks come.
        columns = columns.to(compute_dtype(student))
        gradient = _gradient(grad_inter / -ctx.num_rows, columns, student,
                             teacher, ctx.rule, gradient)
        return gradient, None, None, None


@torch.library.custom_op('mmdist::relations', mutates_args=())
def _operator(student: Tensor, teacher: Tensor, tau: float,
              student_activation: str, teacher_activation: str,
              eps: float) -> Tuple[Tensor, Tensor]:
    """:func:`relations`, which the compiler does not look into."""
    table = Table(student, teacher)
    rule = Rule(tau, student_activation, teacher_activation, eps)
    return _forward(table, Ways.of(rule, table))


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
    columns = columns.to(compute_dtype(student))
    return _gradient(grad_similarity, columns, student, teacher,
                     Rule(tau, student_activation, teacher_activation, eps))


@_backward_operator.register_fake
def _(grad_similarity, grad_moments, student, teacher, *others):
    return Table(student, teacher).empty()


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
    """What :func:`distances` are made of, which takes the same.

    Returns:
        tuple[Tensor, Tensor]: The sum of the rows' correlations, float64; and
        ``(5, C)`` float64: the means of the student's and the teacher's
        columns, their centred sums of squares, and those of products. They
        can be differentiated once.
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
        if student.numel() < direct.SMALL:
            return direct.SmallDistances.apply(student, teacher, rule)
        return _Distances.apply(student, teacher, rule,
                                torch.is_grad_enabled())
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
    sums = torch.cat([means * num_rows, centred + num_rows * _squares(means)])
    sums = all_reduce(
        torch.cat([sums.flatten(),
                   means.new_full((1, ), num_rows)]))
    number, sums = sums[-1].detach(), sums[:-1].view_as(moments)
    means = sums[:2] / number.clamp(min=1)
    centred = sums[2:] - number * _squares(means)
    return torch.cat([means, centred]), number


def _squares(means: Tensor) -> Tensor:
    """Squares and the product of two rows, in the order of moments."""
    mean_s, mean_t = means
    return torch.stack([mean_s * mean_s, mean_t * mean_t, mean_s * mean_t])


def _correlations(moments: Tensor, num_rows: Union[int, Tensor], rule: Rule,
                  dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """1 by the product of the columns' norms and eps, and their
    correlations; both are 0 for constant columns."""
    squares = moments[SQUARES_S:PRODUCTS]
    least = rounded_squares(moments[:SQUARES_S], num_rows, dtype)
    varies = (squares > least).all(0)
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
