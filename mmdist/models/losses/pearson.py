r"""DIST's mean Pearson distances of rows and columns, and their gradient.

Logits are worked on as ``(N, C, L)``, or as ``(N, L, C)`` where the classes
lie side by side, in chunks of whole rows and in buffers that all chunks share.

**Forward.** For the centred vectors :math:`a` and :math:`b` of the student and
the teacher, of a row or of a column (Huang et al., NeurIPS 2022, Eq. 6),

.. math:: \rho = \frac{\sum ab}{n + \epsilon}, \qquad n = |a||b|.

The rows of a chunk are complete. Of each column, a chunk has the means and the
centred sums :math:`\sum aa, \sum bb, \sum ab` over its own rows, which
:func:`merge` joins in float64.

**Backward.** Since :math:`\partial n / \partial a = |b| a / |a|`,

.. math::
    \frac{\partial\rho}{\partial a} = \frac{b}{n + \epsilon}
      - \frac{\sum ab}{(n + \epsilon)^2} \frac{|b|}{|a|} a = B b - A a, \qquad
    B = \frac{1}{n + \epsilon}, \quad A = \rho B \frac{|b|}{|a|}.

To go through the centring is to subtract the mean, which is 0 already. With
the activated logits :math:`p = a + \bar p` and :math:`q = b + \bar q` this is
:math:`B q - A p + D`, where A, B and :math:`D = A \bar p - B \bar q` are the
same for a whole row or column. An entry belongs to row i and to column j, so
that the gradient of its :math:`p` is

.. math:: (B_i + B_j) q - (A_i + A_j) p + D_i + D_j,

and then goes through the activation. A softmax takes no notice of what is
added to a whole row, so that :math:`D_i` is left out there.
"""
import math
from collections import namedtuple
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

# Logits of a chunk on a CPU: its buffers stay in the caches, and are a sixth
# of many logits.
CHUNK_NUMEL, CHUNKS = 2**17, 32
# Logits of a chunk elsewhere: all, or of more so many that the buffers take no
# more memory than the logits.
DEVICE_CHUNK_NUMEL = 2**24
# Up to so many logits there is one chunk, and its probabilities are kept.
SMALL_NUMEL = 2**18
# Below this number of logits float64 takes no longer than float32.
TINY_NUMEL = 2**12
# On a CPU, numbers of a row that may be kept for backward, by its classes.
KEPT = 0.11
# A deviation of so many roundings of the mean is none.
ROUNDINGS = 8
BUFFERS = 5


class Options(NamedTuple):
    """How logits become distances."""
    tau: float
    student: str  # the activation: 'softmax', 'sigmoid' or 'none'
    teacher: str
    eps: float = 0.
    chunk_numel: Optional[int] = None  # about; None: by the device
    synced: bool = False  # columns go over the rows of all processes


# Tables of the size of a chunk: the activated logits p and q, and a, b and
# spare for work; pq, ab and work are the stacks of two, two and three of them.
Buffers = namedtuple('Buffers', 'p q a b spare pq ab work')


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def three_axes(logits: Tensor) -> Tensor:
    """View ``(R, C)`` or ``(N, C, *spatial)`` as ``(N, C, L)``."""
    return logits.t()[None] if logits.dim() == 2 else logits.flatten(2)


class Table:
    """The three axes of logits (``(R, C)`` or ``(N, C, *spatial)``, R > 0),
    and their chunks of whole rows."""

    def __init__(self, logits: Tensor, chunk_numel: Optional[int]) -> None:
        self.num_classes, numel = logits.shape[1], logits.numel()
        self.num_rows = numel // self.num_classes
        flat = three_axes(logits)
        # Classes lie side by side in (R, C) and channels_last.
        last = logits.dim() == 2 or 0 < flat.stride(1) < flat.stride(2)
        self.axis = 2 if last else 1  # of the classes
        self.row_axes = [0, 3 - self.axis]
        tiny = numel < TINY_NUMEL
        self.dtype = torch.float64 if tiny else compute_dtype(logits)
        size, length = chunk_numel or numel, flat.shape[2]
        if not (chunk_numel or logits.is_cpu):
            size = max(DEVICE_CHUNK_NUMEL, numel // BUFFERS)
        elif not chunk_numel and numel > SMALL_NUMEL:
            size = max(numel // CHUNKS, CHUNK_NUMEL // 2)
            size = min(size, CHUNK_NUMEL)
        self.whole = numel <= size
        rows = max(size // self.num_classes, 1)
        self.images = max(rows // length, 1)
        # The parts of an image have about one size, in whole vectors.
        self.length = math.ceil(length / math.ceil(length / rows))
        if self.length > 64:
            self.length = math.ceil(self.length / 16) * 16

    def parts(self, *tables: Tensor) -> Iterator[List[Tensor]]:
        """Yield parts of tables, with three axes; the first are the largest.
        """
        tables = [three_axes(table) for table in tables]
        if self.axis == 2:
            tables = [table.mT for table in tables]
        if self.whole:
            yield tables
            return
        for images in zip(*(table.split(self.images) for table in tables)):
            yield from zip(*(table.split(self.length, self.row_axes[1])
                             for table in images))

    def chunks(self, *tables: Tensor) -> Iterator[tuple]:
        """Yield parts of tables, and buffers of their size."""
        memory = buffers = None
        for parts in self.parts(*tables):
            shape, numel = parts[0].shape, BUFFERS * parts[0].numel()
            if memory is None:
                memory = parts[0].new_empty(numel, dtype=self.dtype)
            if buffers is None or buffers.p.shape != shape:
                five = memory[:numel].view(BUFFERS, *shape)
                buffers = Buffers(*five, five[:2], five[2:4], five[2:])
            yield parts, buffers

    def new_gradient(self, logits: Tensor) -> Tensor:
        """A tensor like the logits, in their layout but without gaps."""
        if self.axis == 1 or logits.dim() == 2:
            return logits.new_empty(logits.shape)
        rows = logits.movedim(1, -1)
        return rows.new_empty(rows.shape).movedim(-1, 1)


def activate(logits: Tensor, activation: str, dim: int = 1) -> Tensor:
    """Turn logits, already divided by the temperature, into probabilities;
    with the activation 'none' into themselves."""
    if activation == 'none':
        return logits
    return logits.softmax(dim) if activation == 'softmax' else logits.sigmoid()


def _activate(table: Table, logits: Tensor, activation: str, tau: float,
              out: Tensor) -> None:
    """:func:`activate` in a buffer."""
    if activation == 'softmax' and (table.whole or not logits.is_cpu):
        if tau != 1:
            logits = logits.to(out.dtype) / tau
        torch.softmax(logits, table.axis, dtype=out.dtype, out=out)
        return
    # (A sigmoid is slow on the short pieces of memory of a chunk.)
    if (logits.dtype != out.dtype or activation == 'none'
            or activation == 'sigmoid' and not logits.is_contiguous()):
        logits = out.copy_(logits)
    if tau != 1:
        logits = torch.div(logits, tau, out=out)
    if activation == 'sigmoid':
        torch.sigmoid(logits, out=out)
    elif activation == 'softmax':  # torch.softmax would copy the chunk first
        torch.sub(logits, logits.amax(table.axis, True), out=out).exp_()
        out.mul_(out.sum(table.axis, True).reciprocal_())


def _differentiate(activation: str, axis: int, p: Tensor, grad: Tensor,
                   out: Tensor) -> None:
    """Write the gradient of logits from that of ``p``, which it overwrites."""
    same = out.dtype == grad.dtype
    if activation == 'softmax' and same and out.is_contiguous():
        torch._softmax_backward_data(grad, p, axis, p.dtype, grad_input=out)
        return
    if activation != 'none':
        grad.mul_(p)
        inner = grad.sum(axis, True) if activation == 'softmax' else grad
        if same:
            torch.addcmul(grad, p, inner, value=-1, out=out)
            return
        grad.addcmul_(p, inner, value=-1)
    out.copy_(grad)


def _centred_sums(buffers: Buffers, means: Union[float, Tensor],
                  axes: List[int]) -> Tensor:
    """Sums of ``aa``, ``bb`` and ``ab`` over axes of the stacks."""
    torch.sub(buffers.pq, means, out=buffers.ab)
    torch.mul(buffers.a, buffers.b, out=buffers.spare)
    buffers.ab.square_()
    return buffers.work.sum(axes, keepdim=True)


def coefficients(sums: Tensor,
                 means: Union[float, Tensor],
                 number: Union[int, Tensor],
                 options: Options,
                 dtype: torch.dtype,
                 with_d: bool = True) -> tuple:
    """Correlations and (A, B, D or None) of vectors of ``number`` entries.

    ``sums`` are their ``(3, ...)`` of ``aa``, ``bb`` and ``ab``, overwritten,
    and ``means`` the ``(2, ...)`` of student and teacher, or one number. All
    is 0 where ``dtype`` cannot tell the variance from rounding.
    """
    info = torch.finfo(dtype)
    relative, least = (ROUNDINGS * info.eps)**2 * number, info.tiny**0.5
    if isinstance(means, float):
        least = max(relative * means**2, least)
    else:
        least = (means * means).mul_(relative).clamp_(min=least)
    squares, products = sums[:2], sums[2]
    if 'none' in (options.student, options.teacher):
        # Squares of features may overflow, those of probabilities do not.
        products.masked_fill_(squares.isinf().any(0), 0)
    squares.masked_fill_(squares <= least, math.inf)  # makes B 0
    norm_a, norm_b = squares.sqrt().unbind()
    b = (norm_a * norm_b).add_(options.eps).reciprocal_()
    rho = products * b
    # |b| / |a| = n / aa, and B n = 1 - eps B
    a = torch.rsub(b, 1, alpha=options.eps).mul_(rho).div_(squares[0])
    d = (a * means[0]).addcmul_(b, means[1], value=-1) if with_d else None
    return rho, (a, b, d)


def _relate_rows(table: Table, buffers: Buffers, options: Options,
                 dtype: torch.dtype) -> tuple:
    """Correlations and :func:`coefficients` of the rows of a chunk."""
    if table.num_classes == 1:  # no variance
        zero = buffers.p.new_zeros(()).expand_as(buffers.p)
        return zero, (zero, zero, None)
    axis, with_d = table.axis + 1, options.student != 'softmax'
    if with_d or options.teacher != 'softmax':
        means = buffers.pq.mean(axis, keepdim=True)
    else:
        means = 1 / table.num_classes
    sums = _centred_sums(buffers, means, [axis])
    return coefficients(sums, means, table.num_classes, options, dtype, with_d)


def _column_moments(table: Table, buffers: Buffers) -> Tensor:
    """The moments of a chunk, see :func:`statistics`."""
    axes = [axis + 1 for axis in table.row_axes]
    means = buffers.pq.mean(axes, keepdim=True)
    sums = _centred_sums(buffers, means, axes)
    counts = means.new_full((1, table.num_classes),
                            buffers.p.numel() // table.num_classes)
    return torch.cat([counts, means.flatten(1), sums.flatten(1)]).double()


def merge(parts: Tensor) -> Tensor:
    """Join ``(P, 6, C)`` moments of several sets of rows to ``(6, C)``.

    What the means of the sets deviate from the mean of all is added to the
    centred sums (Chan, Golub and LeVeque, *Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances*, 1979).
    """
    counts = parts[:, :1]
    total = counts.sum(0)
    means = (parts[:, 1:3] * counts).sum(0) / total.clamp(min=1)
    delta = parts[:, 1:3] - means
    squares = torch.cat([delta.square(), delta.prod(1, keepdim=True)], 1)
    return torch.cat([total, means, (parts[:, 3:] + squares * counts).sum(0)])


def statistics(student: Tensor, teacher: Tensor, options: Options,
               keep: bool) -> Tuple[Tensor, Tensor, list]:
    """The forward pass over the logits.

    Returns:
        tuple[Tensor, Tensor, list]: The sum of the rows' correlations,
        float64. Moments of the columns, ``(6, C)`` float64: the number of
        rows, the means of student and teacher, and the centred sums of ``aa``,
        ``bb`` and ``ab``. If ``keep``, what was kept of each chunk for
        :func:`gradient`: the coefficients of its rows and, of a small table,
        ``p`` and ``q``.
    """
    table, dtype = Table(student, options.chunk_numel), compute_dtype(student)
    small = table.whole and student.numel() <= SMALL_NUMEL
    numbers = 2 if options.student == 'softmax' else 3
    keep = keep and (small or not student.is_cpu
                     or numbers <= KEPT * table.num_classes)
    correlations, moments, kept = [], [], []
    for (s, t), buffers in table.chunks(student, teacher):
        _activate(table, s, options.student, options.tau, buffers.p)
        _activate(table, t, options.teacher, options.tau, buffers.q)
        rho, rows = _relate_rows(table, buffers, options, dtype)
        correlations.append(rho.sum())
        moments.append(_column_moments(table, buffers))
        if len(moments) == 16:  # so that they take little memory
            moments = [merge(torch.stack(moments))]
        if keep:
            kept.append((rows, buffers.pq if small else None))
    merged = merge(torch.stack(moments)) if len(moments) > 1 else moments[0]
    return torch.stack(correlations).sum(dtype=torch.float64), merged, kept


def gradient(student: Tensor, teacher: Tensor, options: Options,
             row_weight: Tensor, columns: Tensor, kept: list) -> Tensor:
    """The backward pass over the logits.

    ``row_weight`` is the gradient of a row's correlation; ``columns`` are A, B
    and D of the columns, ``(3, C)``, times the gradient of a column's. What is
    not in ``kept`` is computed again.
    """
    table, dtype = Table(student, options.chunk_numel), compute_dtype(student)
    shape = (3, 1, 1, -1) if table.axis == 2 else (3, 1, -1, 1)
    a, b, d = columns.to(table.dtype).view(shape).unbind()
    row_weight = row_weight.to(table.dtype)
    result = table.new_gradient(student)
    kept = iter(kept)
    for (s, t, out), buffers in table.chunks(student, teacher, result):
        rows, pq = next(kept, (None, None))
        p, q = buffers.pq if pq is None else pq
        if pq is None:
            _activate(table, s, options.student, options.tau, p)
            _activate(table, t, options.teacher, options.tau, q)
        if rows is None:
            rows = _relate_rows(table, buffers, options, dtype)[1]
        grad, factor, offset = buffers.a, buffers.b, d
        if rows[2] is not None:
            offset = torch.addcmul(d, rows[2], row_weight, out=buffers.spare)
        torch.addcmul(b, rows[1], row_weight, out=factor)
        torch.addcmul(offset, factor, q, out=grad)
        torch.addcmul(a, rows[0], row_weight, out=factor)
        grad.addcmul_(factor, p, value=-1)
        _differentiate(options.student, table.axis, p, grad, out)
    return result


class _Derived(torch.autograd.Function):
    """A gradient that cannot be differentiated again."""

    @staticmethod
    def forward(ctx, gradient: Tensor, student: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, grad: Tensor) -> None:
        raise RuntimeError('the losses of mmdist cannot be differentiated '
                           'twice')


class Once(torch.autograd.Function):
    """Terms of ``forward(student, teacher, options, keep)``, which returns a
    state beside them, with the gradient of the student's logits that
    ``backward(student, teacher, options, state, *grads)`` returns.

    A second derivative is refused, also where PyTorch's
    ``once_differentiable`` would take it for 0.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, options: Options,
                forward: Callable, backward: Callable, keep: bool):
        ctx.save_for_backward(student, teacher)
        ctx.options, ctx.backward_of = options, backward
        keep = keep and ctx.needs_input_grad[0]
        terms, ctx.state = forward(student, teacher, options, keep)
        return terms

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        student, teacher = ctx.saved_tensors
        with torch.no_grad():
            gradient = ctx.backward_of(student, teacher, ctx.options,
                                       ctx.state, *grads)
        if torch.is_grad_enabled():  # create_graph
            gradient = _Derived.apply(gradient, student)
        return gradient, None, None, None, None, None


def distances(student: Tensor,
              teacher: Tensor,
              options: Options,
              statistics: Callable = statistics,
              gradient: Callable = gradient) -> Tuple[Tensor, Tensor]:
    """The mean Pearson distances of rows and of columns, two scalars.

    The logits may have no rows where ``options.synced``. ``statistics`` and
    ``gradient`` may be those of other kernels.
    """
    num_classes, num_rows = student.shape[1], student[:, 0].numel()
    dtype = compute_dtype(student)

    def forward(student, teacher, options, keep):
        if num_rows:
            sum_of_rows, moments, kept = statistics(student, teacher, options,
                                                    keep)
        else:  # other processes may have rows
            moments = student.new_zeros(6, num_classes, dtype=torch.float64)
            sum_of_rows, kept = moments[0, 0], None
        all_rows, scale = num_rows, 1 / max(num_rows, 1)
        if options.synced:
            parts = [moments.clone() for _ in range(dist.get_world_size())]
            dist.all_gather(parts, moments)
            moments = merge(torch.stack(parts))
            all_rows = moments[0, 0]
            # The mean over processes of inter is the mean over all rows.
            scale = len(parts) / all_rows.clamp(min=1)
        rho, columns = coefficients(moments[3:], moments[1:3], all_rows,
                                    options, dtype)
        inter = (num_rows - sum_of_rows) * scale
        intra = torch.rsub(rho.sum(), 1, alpha=1 / num_classes)
        if options.synced:
            intra = intra * (all_rows > 0)
        state = scale, torch.stack(columns), kept
        return (inter.to(dtype), intra.to(dtype)), state

    def backward(student, teacher, options, state, grad_inter, grad_intra):
        scale, columns, kept = state
        if options.synced:  # every process has this term, of all rows
            grad_intra = grad_intra.clone()
            dist.all_reduce(grad_intra)
        if not num_rows:
            return torch.zeros_like(student)
        of_columns = columns * (grad_intra / (-options.tau * num_classes))
        of_rows = grad_inter * (scale / -options.tau)
        return gradient(student, teacher, options, of_rows, of_columns, kept)

    return Once.apply(student, teacher, options, forward, backward,
                      torch.is_grad_enabled())
