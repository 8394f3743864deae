"""The relations of DIST, computed block by block.

Written as tensor operations, the formula makes ten tables of the logits'
size. Here a block of the logits that fits a processor's cache is read once
forward and once backward; what is kept between the two are seven numbers a
class, and up to six a row in the memory of the gradient. Rows need nothing but
themselves; columns need the moments of all rows, to which the blocks add up.

Probabilities are centred before they are squared, rows by ``1 / C`` or the
mean of their sigmoids, columns by their mean within the block; they are kept
as they are, because centred ones have few digits where they are small.
"""
import math
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from . import direct
from .blocks import Block, Table, compute_dtype
from .rule import ROUNDINGS, Rule, differentiated_once, rounded_squares

Tensors = Sequence[Tensor]
LOG2_E = 1 / math.log(2)
MEAN_S, MEAN_T, SQUARES_S, SQUARES_T, PRODUCTS = range(5)
# Numbers a row that forward keeps for backward, at most.
MOST_KEPT = 6
# Blocks whose moments are merged at a time.
GROUP = 4


class Numbers(NamedTuple):
    """Numbers as tensors without dimensions, which calls take faster.

    Attributes:
        mean (Tensor): ``1 / C``.
        rounding (Tensor): Squared deviations of a row of the mean 1 that are
            its rounding.
        tiny (Tensor): What can be squared and multiplied.
        eps (Tensor): That of the rule.
        zero (Tensor): 0.
    """
    mean: Tensor
    rounding: Tensor
    tiny: Tensor
    eps: Tensor
    zero: Tensor

    @classmethod
    def of(cls, rule: Rule, table: Table) -> 'Numbers':
        """Those of a table."""
        dtype, number = compute_dtype(table.student), table.num_classes
        info = torch.finfo(dtype)
        numbers = [
            1 / number, number * (ROUNDINGS * info.eps)**2, info.tiny**.5,
            rule.eps, 0.
        ]
        # filled there: a copy to a GPU would wait for it
        return cls(
            *(torch.full((), x, dtype=dtype, device=table.student.device)
              for x in numbers))


class Rows(NamedTuple):
    """A block's probabilities, and the gradient of its rows' correlations:
    ``of_q`` times the teacher's centred probabilities, less ``of_p`` times
    the student's.

    Attributes:
        p (Tensor): The student's probabilities, three dimensions.
        q (Tensor): The teacher's.
        mean_p (Tensor): Of the rows, or ``1 / C``.
        mean_q (Tensor): The same of the teacher.
        of_p (Tensor): 0 for constant rows.
        of_q (Tensor): 0 for constant rows.
    """
    p: Tensor
    q: Tensor
    mean_p: Tensor
    mean_q: Tensor
    of_p: Tensor
    of_q: Tensor


class Way(NamedTuple):
    """How the logits of a block become probabilities.

    Attributes:
        tau (float): Temperature.
        activation (str): 'softmax' or 'sigmoid'.
        axis (int): That of the classes.
        numbers (Numbers): Of the table.
    """
    tau: float
    activation: str
    axis: int
    numbers: Numbers

    def probabilities(self, logits: Tensor, out: Tensor,
                      kept: Tensors = ()) -> List[Tensor]:
        """Write probabilities.

        Args:
            logits (Tensor): Of a block.
            out (Tensor): Where they are written.
            kept (Tensors): What this has returned for the block.

        Returns:
            list[Tensor]: What the rows were normalised by.
        """
        if self.in_one:
            torch.softmax(logits, 2, dtype=out.dtype, out=out)
            return []
        if logits.dtype != out.dtype or logits.stride(2) != 1:
            logits = out.copy_(logits)
        if self.activation == 'softmax':
            return self._softmax(logits, out, *kept)
        if self.tau == 1:
            torch.sigmoid(logits, out=out)
        else:
            torch.div(logits, self.tau, out=out).sigmoid_()
        return [*kept] or [out.mean(self.axis, True)]

    def _softmax(self,
                 logits: Tensor,
                 out: Tensor,
                 highest: Optional[Tensor] = None,
                 scale: Optional[Tensor] = None) -> List[Tensor]:
        """By powers of 2, which take a third of the time of the library's
        exponentials."""
        if highest is None:
            highest = logits.amax(self.axis, True)
        # First the difference: of large logits products differ by their
        # rounding, which overflows as an exponent.
        torch.sub(logits, highest, out=out)
        out.mul_(LOG2_E / self.tau).exp2_()
        if scale is None:
            scale = out.sum(self.axis, True).reciprocal_()
        out.mul_(scale)
        return [highest, scale]

    def mean(self, kept: Tensors) -> Tensor:
        """Of rows, from what :meth:`probabilities` returns."""
        return self.numbers.mean if self.activation == 'softmax' else kept[0]

    @property
    def in_one(self) -> bool:
        """Whether the library has one fast call for it: where classes lie
        side by side."""
        return (self.activation, self.axis, self.tau) == ('softmax', 2, 1)

    @property
    def num_kept(self) -> int:
        """How many numbers a row :meth:`probabilities` returns."""
        return 0 if self.in_one else dict(
            softmax=2, sigmoid=1)[self.activation]


class Ways(NamedTuple):
    """:class:`Way` of the student and of the teacher."""
    student: Way
    teacher: Way

    @classmethod
    def of(cls, rule: Rule, table: Table) -> 'Ways':
        """Those of a table."""
        numbers = Numbers.of(rule, table)
        return cls(*(Way(rule.tau, activation, table.axis, numbers)
                     for activation in (rule.student, rule.teacher)))

    def relate(self, block: Block) -> Tuple[Rows, Tensor, List[Tensor]]:
        """Compute the rows of a block, in the first two of its buffers.

        Returns:
            tuple[Rows, Tensor, list[Tensor]]: The rows, their correlations,
            and what :meth:`again` finds in the gradient.
        """
        p, q, spare = block.buffers
        numbers, axis = self.student.numbers, self.student.axis
        kept_p = self.student.probabilities(block.student, p)
        kept_q = self.teacher.probabilities(block.teacher, q)
        mean_p, mean_q = self.student.mean(kept_p), self.teacher.mean(kept_q)
        squares_q = torch.sub(q, mean_q, out=spare).square_().sum(axis, True)
        squares_p = torch.sub(p, mean_p, out=spare).square_().sum(axis, True)
        centred = torch.sub(p, mean_p, out=spare)
        rounded = centred.sum(axis, True).mul_(mean_q)  # 0, but for rounding
        products = centred.mul_(q).sum(axis, True).sub_(rounded)
        varies = _varies(squares_p, mean_p, numbers)
        varies &= _varies(squares_q, mean_q, numbers)
        of_q = (squares_p * squares_q).sqrt_().add_(numbers.eps).reciprocal_()
        of_q = torch.where(varies, of_q, numbers.zero)
        rho = products.mul_(of_q)
        ratio = squares_q.div_(torch.maximum(squares_p, numbers.tiny))
        of_p = ratio.sqrt_().mul_(rho).mul_(of_q)
        rows = Rows(p, q, mean_p, mean_q, of_p, of_q)
        return rows, rho, [of_p, of_q, *kept_p, *kept_q]

    def again(self, block: Block) -> Rows:
        """The same of a block that was related before."""
        p, q, _ = block.buffers
        axis, number = self.student.axis, 2 + self.student.num_kept
        # a copy, because the gradient is written over it
        kept = block.kept(axis, number + self.teacher.num_kept).clone()
        kept = kept.split(1, axis)
        self.student.probabilities(block.student, p, kept[2:number])
        self.teacher.probabilities(block.teacher, q, kept[number:])
        return Rows(p, q, self.student.mean(kept[2:]),
                    self.teacher.mean(kept[number:]), *kept[:2])


def _varies(squares: Tensor, mean: Tensor, numbers: Numbers) -> Tensor:
    """As :func:`rounded_squares`, with numbers that calls take faster."""
    least = mean.square().mul_(numbers.rounding)
    return squares > torch.maximum(least, numbers.tiny)


def _column_moments(p: Tensor, q: Tensor, spare: Tensor,
                    axes: Sequence[int]) -> List[Tensor]:
    """Means and centred sums of squares and products of the classes.

    Overwrites the probabilities.
    """
    means = [x.mean(axes, True) for x in (p, q)]
    for x, mean in zip((p, q), means):
        x -= mean
    return means + [
        torch.mul(x, y, out=spare).sum(axes, True)
        for x, y in ((p, p), (q, q), (p, q))
    ]


def _merged(parts: Tensors, counts: Sequence[int]) -> Tensor:
    """The moments of blocks together, from ``(5, C)`` and the rows of each."""
    if len(parts) == 1:
        return parts[0]
    table = torch.stack(parts)
    weights = torch.stack([table.new_full((1, ), n) for n in counts])
    means = (weights[..., None] * table[:, :2]).sum(0) / sum(counts)
    d_s, d_t = (table[:, :2] - means).unbind(1)
    between = [(weights * x * y).sum(0)
               for x, y in ((d_s, d_s), (d_t, d_t), (d_s, d_t))]
    return torch.cat([means, table[:, 2:].sum(0) + torch.stack(between)])


def _forward(table: Table,
             rule: Rule,
             gradient: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
    """What :func:`relations` returns.

    Args:
        table (Table): The logits.
        rule (Rule): How they become relations.
        gradient (Tensor, optional): A table where backward will write; what
            it needs is kept there.
    """
    ways = Ways.of(rule, table)
    similarities, moments, counts = [], [], []
    for block in table.blocks(gradient):
        _, rho, kept = ways.relate(block)
        similarities.append(rho.sum())
        of_block = torch.cat(_column_moments(*block.buffers, table.axes))
        moments.append(of_block.view(5, table.num_classes).double())
        counts.append(rho.numel())
        if block.keeps:
            torch.cat(kept, table.axis, out=block.kept(table.axis, len(kept)))
        if len(moments) == GROUP:
            moments, counts = [_merged(moments, counts)], [sum(counts)]
    return torch.stack(similarities).double().sum(), _merged(moments, counts)


def _gradient(of_rows: Tensor,
              of_columns: Tensor,
              student: Tensor,
              teacher: Tensor,
              rule: Rule,
              gradient: Optional[Tensor] = None) -> Tensor:
    """The gradient of the student's logits, in their shape and dtype.

    Args:
        of_rows (Tensor): That of a row's correlation.
        of_columns (Tensor): ``(3, C)``, see :func:`_of_columns`.
        student (Tensor): Logits.
        teacher (Tensor): Logits.
        rule (Rule): How they become relations.
        gradient (Tensor, optional): With what :func:`_forward` has kept.
    """
    table = Table(student, teacher)
    ways = Ways.of(rule, table)
    numbers = ways.student.numbers
    shape = (3, 1, 1, -1) if table.axis == 2 else (3, 1, -1, 1)
    columns = (of_columns / rule.tau).to(numbers.eps).view(shape).unbind()
    of_rows = (of_rows / rule.tau).to(numbers.eps)
    again = gradient is not None
    if not again:
        gradient = table.empty()
    for block in table.blocks(gradient):
        if again and block.keeps:
            rows = ways.again(block)
        else:
            rows, _, _ = ways.relate(block)
        out = block.buffers[2]
        _gradient_of_p(rows, of_rows, columns, out)
        _through(rule.student, rows, table.axis, out)
        if out is not block.gradient:
            block.gradient.copy_(out)
    return gradient


def _gradient_of_p(rows: Rows, of_rows: Tensor, columns: Sequence[Tensor],
                   out: Tensor) -> None:
    """Write the gradient of the student's probabilities, up to a number a
    row where these sum to 1. Overwrites the teacher's."""
    of_s, of_t, added = columns
    torch.sub(rows.q, rows.mean_q, out=out)
    torch.addcmul(added, out, rows.of_q * of_rows, out=out)
    out.addcmul_(rows.q, of_t)
    centred = torch.sub(rows.p, rows.mean_p, out=rows.q)
    out.addcmul_(centred, rows.of_p * of_rows, value=-1)
    out.addcmul_(rows.p, of_s)


def _through(activation: str, rows: Rows, axis: int, out: Tensor) -> None:
    """Backward through the activation, in place."""
    if activation == 'softmax':
        product = torch.mul(out, rows.p, out=rows.q)
        total = product.sum(axis, True)
        torch.addcmul(product, rows.p, total, value=-1, out=out)
    else:
        out *= rows.p
        out.addcmul_(out, rows.p, value=-1)


class _Distances(torch.autograd.Function):
    """:func:`distances` of one process, differentiated by hand."""

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, rule: Rule,
                differentiable: bool) -> Tuple[Tensor, Tensor]:
        table = Table(student, teacher)
        # Backward writes what it needs over what forward keeps there, once.
        ctx.gradient = None
        if (differentiable and ctx.needs_input_grad[0]
                and table.num_classes >= MOST_KEPT):
            gradient = table.empty()
            ctx.gradient = gradient if table.holds(gradient) else None
        similarity, moments = _forward(table, rule, ctx.gradient)
        dtype = compute_dtype(student)
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
        of_moments = _of_correlations(grad_intra, moments, inverse, rho)
        gradient = _gradient(grad_inter / -ctx.num_rows,
                             _of_columns(*of_moments, moments), student,
                             teacher, ctx.rule, gradient)
        return gradient, None, None, None


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
