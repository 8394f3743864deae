"""The relations of DIST, computed block by block.

Written as tensor operations, the formula makes ten tables of the logits'
size. Here a block of the logits that fits a processor's cache is read once
forward and once backward; what is kept between the two are five numbers a
class. Rows need nothing but themselves; columns need the moments of all
rows, to which the blocks add up.

Probabilities are centred before they are squared: a row of a softmax has the
mean ``1 / C``, and a column its mean within the block.
"""
from typing import Iterator, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Elements of a block, at least and at most: small ones stay in the cache,
# large ones occupy a GPU.
BLOCKS = dict(cpu=(2**16, 2**18), other=(2**22, 2**25))
# A block is held in three buffers: together less than a tenth of the logits.
PARTS = 40
# A standard deviation of so many roundings of the mean is none.
ROUNDINGS = 8
MEAN_S, MEAN_T, SQUARES_S, SQUARES_T, PRODUCTS = range(5)
Mean = Union[Tensor, float]


class Rule(NamedTuple):
    """How logits become probabilities.

    Attributes:
        tau (float): Temperature.
        student (str): 'softmax' or 'sigmoid'.
        teacher (str): 'softmax' or 'sigmoid'.
        eps (float): Added to the product of norms.
    """
    tau: float
    student: str
    teacher: str
    eps: float


class Rows(NamedTuple):
    """A block's probabilities without the means of their rows.

    Attributes:
        a (Tensor): The student's, three dimensions.
        b (Tensor): The teacher's.
        mean_a (Tensor | float): What was subtracted.
        mean_b (Tensor | float): The same of the teacher.
        norms (Tensor): Product of the rows' norms, and eps; infinite for
            constant rows.
        rho (Tensor): Their correlation; 0 for constant rows.
        ratio (Tensor): The norm of ``b`` by that of ``a``.
        spare (Tensor): A buffer of the block's size.
    """
    a: Tensor
    b: Tensor
    mean_a: Mean
    mean_b: Mean
    norms: Tensor
    rho: Tensor
    ratio: Tensor
    spare: Tensor


class Table:
    """Logits of student and teacher with the classes in one of three axes.

    Args:
        student (Tensor): ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): The same shape.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        table = _three_axes(student)
        # As it lies in memory: rows of channels_last logits are contiguous.
        self.last = student.dim() == 2 or 0 < table.stride(1) < table.stride(2)
        self.axis = 2 if self.last else 1
        self.student, self.teacher = self.view(student), self.view(teacher)
        self.num_classes = student.shape[1]
        self.num_rows = student.numel() // max(self.num_classes, 1)

    def view(self, logits: Tensor) -> Tensor:
        """The logits, or a gradient, with the classes in ``axis``."""
        table = _three_axes(logits)
        return table.transpose(1,
                               2) if self.last and logits.dim() > 2 else table

    def empty(self, logits: Tensor) -> Tensor:
        """For a gradient of the logits, in a layout that has a view."""
        if not self.last or logits.dim() == 2:
            return torch.empty_like(
                logits, memory_format=torch.contiguous_format)
        return torch.empty_like(
            logits.movedim(1, -1),
            memory_format=torch.contiguous_format).movedim(-1, 1)

    def blocks(self) -> Iterator[Sequence[slice]]:
        """Indices of all blocks."""
        number, length = len(self.student), self.student.shape[3 - self.axis]
        on_cpu = self.student.device.type == 'cpu'
        low, high = BLOCKS['cpu' if on_cpu else 'other']
        size = min(max(self.student.numel() // PARTS, low), high)
        step = max(size // self.num_classes, 1)
        pictures = max(step // max(length, 1), 1)
        for first in range(0, number, pictures):
            for start in range(0, length, step):
                part = slice(start, start + step)
                index = [slice(first, first + pictures), slice(None)]
                index.insert(3 - self.axis, part)
                yield tuple(index)


def _three_axes(logits: Tensor) -> Tensor:
    return logits[None] if logits.dim() == 2 else logits.flatten(2)


def _centred(logits: Tensor, tau: float, activation: str,
             axis: int) -> Tuple[Tensor, Mean]:
    """Probabilities without the mean of their row, and that mean."""
    dtype = compute_dtype(logits)
    if tau != 1:
        logits = logits.to(dtype) / tau
    if activation == 'softmax':
        p, mean = logits.softmax(axis, dtype=dtype), 1 / logits.shape[axis]
    else:
        p = logits.to(dtype).sigmoid()
        mean = p.mean(axis, keepdim=True)
    p -= mean
    return p, mean


def _rows(table: Table, index: Sequence[slice], rule: Rule) -> Rows:
    """The rows of a block."""
    axis, number = table.axis, table.num_classes
    a, mean_a = _centred(table.student[index], rule.tau, rule.student, axis)
    b, mean_b = _centred(table.teacher[index], rule.tau, rule.teacher, axis)
    spare = torch.empty_like(a)
    squares_a, squares_b, products = (torch.mul(x, y, out=spare).sum(
        axis, keepdim=True) for x, y in ((a, a), (b, b), (a, b)))
    varies = (
        _varies(squares_a, mean_a, number)
        & _varies(squares_b, mean_b, number))
    norms = squares_a.sqrt().mul_(squares_b.sqrt())
    varies &= norms > 0
    ratio = norms / squares_a.where(varies, 1.)
    norms = (norms + rule.eps).where(varies, torch.inf)
    return Rows(a, b, mean_a, mean_b, norms, products / norms, ratio, spare)


def _varies(squares: Tensor, mean: Mean, number: int) -> Tensor:
    """Whether deviations are more than the rounding of their mean."""
    rounding = ROUNDINGS * torch.finfo(squares.dtype).eps * mean
    return squares > number * rounding * rounding


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _whole(centred: Tensor, mean: Mean) -> Tensor:
    """Undo the centring where means differ, in place."""
    return centred.add_(mean) if isinstance(mean, Tensor) else centred


def _column_moments(rows: Rows, axes: Sequence[int]) -> Tensor:
    """Means and centred sums of squares and products, ``(5, C)``.

    The means of a softmax are without ``1 / C``.
    """
    a, b = _whole(rows.a, rows.mean_a), _whole(rows.b, rows.mean_b)
    means = [p.mean(axes, keepdim=True) for p in (a, b)]
    for p, mean in zip((a, b), means):
        p -= mean
    return torch.stack([
        *(mean.flatten() for mean in means),
        *(torch.mul(x, y, out=rows.spare).sum(axes)
          for x, y in ((a, a), (b, b), (a, b)))
    ])


def _missing(rule: Rule, number: int) -> Sequence[float]:
    """What probabilities in :func:`_whole` lack, of both sides."""
    return [
        1 / number if activation == 'softmax' else 0.
        for activation in (rule.student, rule.teacher)
    ]


def _merged(moments: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """The moments of all blocks together."""
    parts = torch.stack(moments).double()
    weights = torch.tensor(counts, dtype=torch.float64)
    weights = weights.to(parts.device)[:, None]
    means = (weights[..., None] * parts[:, :2]).sum(0) / sum(counts)
    d_s, d_t = (parts[:, :2] - means).unbind(1)
    between = [(weights * x * y).sum(0)
               for x, y in ((d_s, d_s), (d_t, d_t), (d_s, d_t))]
    return torch.cat([means, parts[:, 2:].sum(0) + torch.stack(between)])


def _forward(student: Tensor, teacher: Tensor,
             rule: Rule) -> Tuple[Tensor, Tensor]:
    """What :func:`relations` returns."""
    with torch.autocast(student.device.type, enabled=False):
        table = Table(student, teacher)
        distances, moments, counts = zip(*(_read(table, index, rule)
                                           for index in table.blocks()))
        moments = _merged(moments, counts)
        for mean, missing in zip(moments, _missing(rule, table.num_classes)):
            mean += missing
        return torch.stack(distances).sum(), moments


def _read(table: Table, index: Sequence[slice],
          rule: Rule) -> Tuple[Tensor, Tensor, int]:
    """Sum of the distances, column moments and number of a block's rows."""
    rows = _rows(table, index, rule)
    distance = (1 - rows.rho).sum(dtype=torch.float64)
    moments = _column_moments(rows, (0, 3 - table.axis))
    return distance, moments, rows.rho.numel()


def _gradient(grad_rows: Tensor, grad_moments: Tensor, student: Tensor,
              teacher: Tensor, moments: Tensor, rule: Rule) -> Tensor:
    """The gradient of the student's logits, in their shape and dtype."""
    with torch.autocast(student.device.type, enabled=False):
        table = Table(student, teacher)
        columns = _column_weights(grad_moments / rule.tau, moments, table,
                                  rule)
        grad_rows = (grad_rows / rule.tau).to(compute_dtype(student))
        gradient = table.empty(student)
        out = table.view(gradient)
        for index in table.blocks():
            _write(table, index, rule, grad_rows, columns, out[index])
        return gradient


def _write(table: Table, index: Sequence[slice], rule: Rule, grad_rows: Tensor,
           columns: Sequence[Tensor], out: Tensor) -> None:
    """Put the gradient of a block's logits where it belongs."""
    rows = _rows(table, index, rule)
    of_p = _gradient_of_p(rows, grad_rows, columns)
    _through(of_p, rows, rule.student, table.axis, out)


class _Relations(torch.autograd.Function):
    """:func:`relations` in eager mode, where a custom operator costs more
    than a small table."""

    @staticmethod
    def forward(ctx, student, teacher, *rule):
        ctx.rule = Rule(*rule)
        distances, moments = _forward(student, teacher, ctx.rule)
        ctx.save_for_backward(student, teacher, moments)
        return distances, moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_rows, grad_moments):
        gradient = _gradient(grad_rows, grad_moments, *ctx.saved_tensors,
                             ctx.rule)
        return gradient, None, None, None, None, None


@torch.library.custom_op('mmdist::relations', mutates_args=())
def _operator(student: Tensor, teacher: Tensor, tau: float,
              student_activation: str, teacher_activation: str,
              eps: float) -> Tuple[Tensor, Tensor]:
    """:func:`relations` for the compiler, which does not look inside."""
    return _forward(student, teacher,
                    Rule(tau, student_activation, teacher_activation, eps))


@_operator.register_fake
def _(student, teacher, tau, student_activation, teacher_activation, eps):
    return (student.new_empty((), dtype=torch.float64),
            student.new_empty((5, student.shape[1]), dtype=torch.float64))


@torch.library.custom_op('mmdist::relations_backward', mutates_args=())
def _backward_operator(grad_rows: Tensor, grad_moments: Tensor,
                       student: Tensor, teacher: Tensor, moments: Tensor,
                       tau: float, student_activation: str,
                       teacher_activation: str, eps: float) -> Tensor:
    return _gradient(grad_rows, grad_moments, student, teacher, moments,
                     Rule(tau, student_activation, teacher_activation, eps))


@_backward_operator.register_fake
def _(grad_rows, grad_moments, student, teacher, *others):
    return Table(student, teacher).empty(student)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, *ctx.rule = inputs
    ctx.save_for_backward(student, teacher, output[1])


def _backward(ctx, grad_rows: Tensor, grad_moments: Tensor) -> tuple:
    gradient = _backward_operator(grad_rows, grad_moments, *ctx.saved_tensors,
                                  *ctx.rule)
    return gradient, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


def relations(student: Tensor, teacher: Tensor,
              rule: Rule) -> Tuple[Tensor, Tensor]:
    """The distances of rows, and what those of columns are made of.

    Args:
        student (Tensor): Logits, ``(R, C)`` or ``(N, C, *spatial)``, R > 0.
        teacher (Tensor): The same shape; gets no gradient.
        rule (Rule): How they become probabilities.

    Returns:
        tuple[Tensor, Tensor]: The sum of the rows' Pearson distances, float64;
        and ``(5, C)`` float64: the means of the student's and the teacher's
        columns, their centred sums of squares, and those of products. They
        can be differentiated once.
    """
    compiling = torch.compiler.is_compiling()
    return (_operator if compiling else _Relations.apply)(student, teacher,
                                                          *rule)


def _column_weights(grad_moments: Tensor, moments: Tensor, table: Table,
                    rule: Rule) -> Sequence[Tensor]:
    """Weights of the student's and the teacher's probabilities in the
    gradient of a column, and what is added."""
    number = table.num_classes
    missing = _missing(rule, number)
    of_s, of_t = 2 * grad_moments[SQUARES_S], grad_moments[PRODUCTS]
    added = (
        grad_moments[MEAN_S] / table.num_rows - of_s *
        (moments[MEAN_S] - missing[0]) - of_t * (moments[MEAN_T] - missing[1]))
    shape = (1, 1, number) if table.last else (1, number, 1)
    dtype = compute_dtype(table.student)
    return [x.to(dtype).view(shape) for x in (of_s, of_t, added)]


def _gradient_of_p(rows: Rows, grad_rows: Tensor,
                   columns: Sequence[Tensor]) -> Tensor:
    """The gradient of the student's probabilities, up to a number a row
    where these sum to 1."""
    of_s, of_t, added = columns
    of_b = -grad_rows / rows.norms
    of_a = -of_b * rows.rho * rows.ratio
    a, b = _whole(rows.a, rows.mean_a), _whole(rows.b, rows.mean_b)
    total = torch.mul(b, of_t, out=rows.spare).add_(added)
    total.addcmul_(a, of_s).addcmul_(b, of_b).addcmul_(a, of_a)
    if isinstance(rows.mean_a, Tensor):
        total -= of_a * rows.mean_a
        if isinstance(rows.mean_b, Tensor):
            total -= of_b * rows.mean_b
    return total


def _through(of_p: Tensor, rows: Rows, activation: str, axis: int,
             out: Tensor) -> None:
    """Backward through the activation."""
    if activation == 'softmax':
        p = rows.a.add_(rows.mean_a)
        of_p -= torch.mul(of_p, p, out=rows.b).sum(axis, keepdim=True)
        torch.mul(of_p, p, out=out)
    else:
        p = rows.a  # with its mean again
        of_p *= p
        torch.addcmul(of_p, of_p, p, value=-1, out=out)


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


def column_distance(moments: Tensor, num_rows: Union[int, Tensor], eps: float,
                    dtype: torch.dtype) -> Tensor:
    """The mean Pearson distance of the columns, differentiable.

    Args:
        moments (Tensor): ``(5, C)``, see :func:`relations`.
        num_rows (int | Tensor): Rows that they are of.
        eps (float): Added to the product of norms.
        dtype (torch.dtype): Of the probabilities, whose rounding decides
            whether a column is constant.
    """
    rounding = ROUNDINGS * torch.finfo(dtype).eps
    least = num_rows * (rounding * moments[:2].detach())**2
    squares = moments[SQUARES_S:PRODUCTS]
    varies = (squares > least).all(0)
    norms = squares.where(varies, 1.).sqrt().prod(0) + eps
    return (1 - (moments[PRODUCTS] / norms).where(varies, 0.)).mean()
