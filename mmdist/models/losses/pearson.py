r"""DIST's mean Pearson distances of rows and columns, and their gradient.

**Forward.** For the centred vectors :math:`a` and :math:`b` of the student and
the teacher, of a row or of a column (Huang et al., NeurIPS 2022, Eq. 6),

.. math:: \rho = \frac{\sum ab}{n + \epsilon}, \qquad n = |a||b|.

Logits are worked on in chunks of whole rows. Of each column, a chunk has the
means and the centred sums :math:`\sum aa, \sum bb, \sum ab` over its own rows,
which :func:`merge` joins in float64.

**Backward.** Since :math:`\partial n / \partial a = |b| a / |a|`,

.. math::
    \frac{\partial\rho}{\partial a} = \frac{b}{n + \epsilon}
      - \frac{\sum ab}{(n + \epsilon)^2} \frac{|b|}{|a|} a = B b - A a, \qquad
    B = \frac{1}{n + \epsilon}, \quad A = \rho B \frac{|b|}{|a|}.

To go through the centring is to subtract the mean, which is 0 already. With
the activated logits :math:`p = a + \bar p` and :math:`q = b + \bar q` this is
:math:`B q - A p + D`, where A, B and :math:`D = A \bar p - B \bar q` are the
same for a whole row or column. An entry belongs to row i and to column j, so
that the gradient of the sum of all correlations with respect to its :math:`p`
is

.. math:: (B_i + B_j) q - (A_i + A_j) p + D_i + D_j.

A term is the mean of :math:`1 - \rho`, and :math:`p` is the activation of the
logit over :math:`\tau`. So the A, B and D of the R rows are multiplied by
:math:`-g_{inter} / (R\tau)` and those of the C columns by
:math:`-g_{intra} / (C\tau)`, where g is the gradient that autograd hands to
the term. With the weighted sum G, the gradient of the logit is :math:`G`
without an activation, :math:`G p (1 - p)` for a sigmoid, and
:math:`p (G - \sum_k G_k p_k)` for a softmax, summed over the row. The last
does not change when a number is added to a whole row of G, so :math:`D_i` is
left out where both activations are softmax.
"""
import math
from collections import namedtuple
from typing import Callable, Iterator, List, Tuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from .formula import Options, activate, compute_dtype, formula, rounding

# Up to this number of logits, rows and columns are computed together, in
# float64, which takes no longer there.
SMALL_NUMEL = 2**14
# Logits of a chunk on a CPU: its buffers stay in the caches and take a sixth
# of the memory of many logits.
CHUNK_NUMEL, CHUNKS = 2**17, 32
# Logits of a chunk elsewhere: all, or as many as keep the buffers within the
# memory of the logits.
DEVICE_CHUNK_NUMEL = 2**24
# Buffers of the size of a chunk.
BUFFERS = 5
# Coefficients of a row that a CPU may keep for backward, per class.
KEPT = 0.11
# p and q are the activated logits of student and teacher, the others are for
# work; pq, ab and work stack two, two and three of the five.
Buffers = namedtuple('Buffers', 'p q a b spare pq ab work')


def class_axis(logits: Tensor) -> int:
    """The axis of the classes in :func:`three_axes`: 2 where they lie side by
    side in memory, in ``(R, C)`` and channels_last; else 1."""
    if logits.dim() == 2:
        return 2
    strides = logits.flatten(2).stride()
    return 2 if 0 < strides[1] < strides[2] else 1


def three_axes(logits: Tensor, axis: int = 1) -> Tensor:
    """View logits as ``(N, C, L)``, or as ``(N, L, C)`` if ``axis`` is 2."""
    if logits.dim() == 2:
        return logits[None] if axis == 2 else logits.t()[None]
    return logits.flatten(2).mT if axis == 2 else logits.flatten(2)


def new_gradient(logits: Tensor) -> Tensor:
    """An empty tensor like the logits, in their layout but without gaps."""
    if class_axis(logits) == 1 or logits.dim() == 2:
        return logits.new_empty(logits.shape)
    rows = logits.movedim(1, -1)
    return rows.new_empty(rows.shape).movedim(-1, 1)


def chunks(axis: int, options: Options, *tables:
           Tensor) -> Iterator[List[Tensor]]:
    """Yield parts of whole rows of tables of one shape, with three axes; the
    first parts are the largest."""
    num_classes, numel = tables[0].shape[1], tables[0].numel()
    if options.chunk_numel:
        size = options.chunk_numel
    elif tables[0].is_cpu:
        size = min(max(numel // CHUNKS, CHUNK_NUMEL // 2), CHUNK_NUMEL)
    else:
        size = max(DEVICE_CHUNK_NUMEL, numel // BUFFERS)
    tables = [three_axes(table, axis) for table in tables]
    if numel <= size:
        yield tables
        return
    length, rows = tables[0].shape[3 - axis], max(size // num_classes, 1)
    images = max(rows // length, 1)
    # The parts of an image have about one size, in whole vectors.
    rows = math.ceil(length / math.ceil(length / rows))
    if rows > 64:
        rows = math.ceil(rows / 16) * 16
    for some in zip(*(table.split(images) for table in tables)):
        yield from zip(*(part.split(rows, 3 - axis) for part in some))


def activated_chunks(axis: int, options: Options, *tables:
                     Tensor) -> Iterator[tuple]:
    """Yield :func:`chunks` of the student, the teacher and others, with
    buffers that hold the activated logits.

    All chunks share their memory: new memory would cost more time than what is
    computed in it.
    """
    memory = buffers = None
    for parts in chunks(axis, options, *tables):
        shape, numel = parts[0].shape, BUFFERS * parts[0].numel()
        if memory is None:
            memory = parts[0].new_empty(numel, dtype=compute_dtype(parts[0]))
        if buffers is None or buffers.p.shape != shape:
            five = memory[:numel].view(BUFFERS, *shape)
            buffers = Buffers(*five, five[:2], five[2:4], five[2:])
        for x, activation, out in zip(parts, options[1:3], buffers):
            contiguous = x.is_contiguous()
            if activation == 'softmax' and contiguous:
                if options.tau != 1:
                    x = x.to(out.dtype) / options.tau
                torch.softmax(x, axis, dtype=out.dtype, out=out)
                continue
            # A sigmoid is slow on the short pieces of memory of a chunk.
            if x.dtype != out.dtype or activation != 'softmax' and not (
                    contiguous and activation == 'sigmoid'):
                x = out.copy_(x)
            if options.tau != 1:
                x = torch.div(x, options.tau, out=out)
            if activation == 'sigmoid':
                torch.sigmoid(x, out=out)
            elif activation == 'softmax':  # torch's would copy the chunk first
                torch.sub(x, x.amax(axis, True), out=out).exp_()
                out.mul_(out.sum(axis, True).reciprocal_())
        yield parts, buffers


def _centred_sums(buffers: Buffers, means: Union[float, Tensor],
                  axes: List[int]) -> Tensor:
    """Sums of ``aa``, ``bb`` and ``ab`` over axes of the stacks."""
    torch.sub(buffers.pq, means, out=buffers.ab)
    torch.mul(buffers.a, buffers.b, out=buffers.spare)
    buffers.ab.square_()
    return buffers.work.sum(axes, keepdim=True)


def coefficients(sums: Tensor, means: Union[float, Tensor],
                 limits: Tuple[float, float], options: Options) -> tuple:
    """Correlations and (A, B, D) of vectors.

    ``sums`` are their :func:`_centred_sums`, overwritten, and ``means`` the
    ``(2, ...)`` of student and teacher; or one known number, where D is None.
    All is 0 where the variance is within the ``limits`` of :func:`rounding`.
    """
    squares, products = sums[:2], sums[2]
    if 'none' in options:
        # Squares of features may overflow, those of probabilities do not.
        products.masked_fill_(squares.isinf().any(0), 0)
    constant = squares <= means * means * limits[0] + limits[1]
    squares.masked_fill_(constant, math.inf)  # makes B 0
    norm_a, norm_b = squares.sqrt().unbind()
    b = (norm_a * norm_b).add_(options.eps).reciprocal_()
    rho = products * b
    # |b| / |a| = n / aa, and B n = 1 - eps B
    a = torch.rsub(b, 1, alpha=options.eps).mul_(rho).div_(squares[0])
    if not isinstance(means, Tensor):
        return rho, (a, b, None)
    return rho, (a, b, (a * means[0]).addcmul_(b, means[1], value=-1))


def _relate_rows(buffers: Buffers, axis: int, options: Options) -> tuple:
    """Correlations and :func:`coefficients` of the rows of a chunk."""
    number, axes = buffers.p.shape[axis], [axis + 1]
    if options.softmax:
        means = 1 / number
    else:
        means = buffers.pq.mean(axes, keepdim=True)
    sums = _centred_sums(buffers, means, axes)
    limits = rounding(buffers.p.dtype, number)
    return coefficients(sums, means, limits, options)


def _differentiate(activation: str, axis: int, p: Tensor, grad: Tensor,
                   out: Tensor) -> None:
    """Write the gradient of logits from that of ``p``, which it overwrites."""
    same = out.dtype == grad.dtype
    if activation == 'none':
        out.copy_(grad)
    elif activation == 'softmax' and same and out.is_contiguous():
        torch._softmax_backward_data(grad, p, axis, p.dtype, grad_input=out)
    else:
        grad.mul_(p)
        inner = grad.sum(axis, True) if activation == 'softmax' else grad
        torch.addcmul(grad, p, inner, value=-1, out=out)


def merge(parts: Tensor) -> Tensor:
    """Join ``(P, 6, C)`` moments of several sets of rows to ``(6, C)``.

    The deviations of the sets' means from the mean of all are added to the
    centred sums (Chan, Golub and LeVeque, *Updating Formulae and a Pairwise
    Algorithm for Computing Sample Variances*, 1979).
    """
    counts = parts[:, :1]
    total = counts.sum(0)
    means = (parts[:, 1:3] * counts).sum(0) / total.clamp(min=1)
    delta = parts[:, 1:3] - means
    squares = torch.cat([delta.square(), delta.prod(1, keepdim=True)], 1)
    return torch.cat([total, means, (parts[:, 3:] + squares * counts).sum(0)])


def statistics(student: Tensor, teacher: Tensor,
               options: Options) -> Tuple[Tensor, Tensor, list]:
    """The forward pass over the logits.

    Returns:
        tuple[Tensor, Tensor, list]: The sum of the rows' correlations,
        float64. Moments of the columns, ``(6, C)`` float64: the number of
        rows, the means of student and teacher, and the centred sums of ``aa``,
        ``bb`` and ``ab``. What is kept for :func:`gradient`: the coefficients
        of the rows of each chunk, or nothing where they are many.
    """
    axis, num_classes = class_axis(student), student.shape[1]
    numbers = 2 if options.softmax else 3
    keep = not student.is_cpu or numbers <= KEPT * num_classes
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    moments, kept = [], []
    for parts, buffers in activated_chunks(axis, options, student, teacher):
        rho, rows = _relate_rows(buffers, axis, options)
        total = total + rho.sum()
        axes = [1, 4 - axis]
        means = buffers.pq.mean(axes, keepdim=True)
        sums = _centred_sums(buffers, means, axes)
        count = torch.full_like(means[:1], parts[0].numel() // num_classes)
        moments.append(torch.cat([count, means, sums]).view(6, -1).double())
        if len(moments) == 16:  # so that they take little memory
            moments = [merge(torch.stack(moments))]
        if keep:
            kept.append(rows)
    merged = merge(torch.stack(moments)) if len(moments) > 1 else moments[0]
    return total, merged, kept


def gradient(student: Tensor, teacher: Tensor, options: Options,
             row_weight: Tensor, columns: Tensor, kept: list) -> Tensor:
    """The backward pass over the logits.

    ``row_weight`` is the gradient of a row's correlation; ``columns`` are A, B
    and D of the columns, ``(3, C)``, times the gradient of a column's. Rows
    that are not in ``kept`` are computed again.
    """
    axis, dtype = class_axis(student), compute_dtype(student)
    shape = (3, 1, 1, -1) if axis == 2 else (3, 1, -1, 1)
    a, b, d = columns.to(dtype).view(shape).unbind()
    row_weight = row_weight.to(dtype)
    result, kept = new_gradient(student), iter(kept)
    for parts, buffers in activated_chunks(axis, options, student, teacher,
                                           result):
        rows = next(kept, None) or _relate_rows(buffers, axis, options)[1]
        p, q, grad, factor, offset = buffers[:BUFFERS]
        if rows[2] is None:
            offset = d
        else:
            torch.addcmul(d, rows[2], row_weight, out=offset)
        torch.addcmul(b, rows[1], row_weight, out=factor)
        torch.addcmul(offset, factor, q, out=grad)
        torch.addcmul(a, rows[0], row_weight, out=factor)
        grad.addcmul_(factor, p, value=-1)
        _differentiate(options.student_activation, axis, p, grad, parts[2])
    return result


def _small_forward(student: Tensor, teacher: Tensor,
                   options: Options) -> Tuple[tuple, tuple]:
    """The distances of a small table, and their state for backward."""
    axis, num_classes = class_axis(student), student.shape[1]
    pq = torch.stack([three_axes(x, axis) for x in (student, teacher)])
    pq = pq.double() if options.tau == 1 else pq.double() / options.tau
    if options.student_activation == options.teacher_activation:
        pq = activate(pq, options.student_activation, axis + 1)
    else:
        pq = torch.stack(
            [activate(x, a, axis) for x, a in zip(pq, options[1:3])])
    work, means, sums = pq.new_empty(3, *pq.shape[1:]), [], []
    buffers = Buffers(*pq, *work, pq, work[:2], work)
    for axes in ([axis + 1], [1, 4 - axis]):
        mean = pq.mean(axes, keepdim=True)
        sums.append(_centred_sums(buffers, mean, axes).flatten(1))
        means.append(mean.flatten(1))
    sizes = [student.numel() // num_classes, num_classes]
    dtype = compute_dtype(student)
    limits = rounding(torch.float64, max(sizes))[0], rounding(dtype, 1)[1]
    rho, joined = coefficients(
        torch.cat(sums, 1), torch.cat(means, 1), limits, options)
    terms = tuple(1 - x.mean(dtype=dtype) for x in rho.split(sizes))
    return terms, (buffers, torch.stack(joined).split(sizes, 1))


def _small_backward(student: Tensor, teacher: Tensor, options: Options,
                    state: tuple, grad_inter: Tensor,
                    grad_intra: Tensor) -> Tensor:
    """The gradient of the student's small table."""
    buffers, (rows, columns) = state
    axis, result = class_axis(student), new_gradient(student)
    rows = rows * (grad_inter / (-options.tau * rows.shape[1]))
    columns = columns * (grad_intra / (-options.tau * columns.shape[1]))
    of_class = [1, -1] if axis == 2 else [-1, 1]
    a, b, d = torch.add(
        rows.view(3, len(buffers.p), *of_class[::-1]),
        columns.view(3, 1, *of_class),
        out=buffers.work)
    grad = d.addcmul_(b, buffers.q).addcmul_(a, buffers.p, value=-1)
    _differentiate(options.student_activation, axis, buffers.p, grad,
                   three_axes(result, axis))
    return result


def small_distances(student: Tensor, teacher: Tensor,
                    options: Options) -> Tuple[Tensor, Tensor]:
    """The same as :func:`distances`, fast for few logits of one process."""
    return Derived.apply(student, teacher, options,
                         (_small_forward, _small_backward, formula))


class Derived(torch.autograd.Function):
    """Terms whose gradient is derived by hand.

    Of the three ``functions``, the first gets student, teacher and options and
    returns the terms and a state; the second gets the state and the gradients
    of the terms as well, and returns the student's gradient. The third returns
    the same terms as the first, by operations that autograd knows, for a
    gradient that is to be differentiated again.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, options: Options,
                functions: Tuple[Callable, Callable, Callable]):
        ctx.save_for_backward(student, teacher)
        ctx.options, ctx.functions = options, functions
        terms, ctx.state = functions[0](student, teacher, options)
        return terms

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple:
        student, teacher = ctx.saved_tensors
        _, backward, plain = ctx.functions
        if torch.is_grad_enabled():  # create_graph
            terms = plain(student, teacher, ctx.options)
            result, = torch.autograd.grad(
                terms, student, grads, create_graph=True)
        else:
            result = backward(student, teacher, ctx.options, ctx.state, *grads)
        return result, None, None, None


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

    def forward(student, teacher, options):
        if num_rows:
            sum_of_rows, moments, kept = statistics(student, teacher, options)
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
        rho, columns = coefficients(moments[3:], moments[1:3],
                                    rounding(dtype, all_rows), options)
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

    return Derived.apply(student, teacher, options,
                         (forward, backward, formula))
