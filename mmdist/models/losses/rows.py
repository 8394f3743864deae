"""The rows of DIST's relations, in a block of logits.

A row needs nothing but itself. What is computed of its classes goes through a
block of the logits; what is computed of a few numbers a row can be one call
for the rows of all blocks, in whose memory it is done.
"""
import math
from typing import NamedTuple, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .blocks import Block, Table, compute_dtype
from .rule import ROUNDINGS, Rule

LOG2_E = 1 / math.log(2)


class Numbers(NamedTuple):
    """Numbers as tensors without dimensions, which calls take faster.

    Attributes:
        mean (Tensor): ``1 / C``.
        rounding (Tensor): Squared deviations of a row of the mean 1 that are
            its rounding.
        tiny (Tensor): What can be squared and multiplied.
        eps (Tensor): That of the rule.
        one (Tensor): 1.
        zero (Tensor): 0.
    """
    mean: Tensor
    rounding: Tensor
    tiny: Tensor
    eps: Tensor
    one: Tensor
    zero: Tensor

    @classmethod
    def of(cls, rule: Rule, table: Table) -> 'Numbers':
        """Those of a table."""
        dtype, number = compute_dtype(table.student), table.num_classes
        info = torch.finfo(dtype)
        numbers = [
            1 / number, number * (ROUNDINGS * info.eps)**2, info.tiny**.5,
            rule.eps, 1., 0.
        ]
        # filled there: a copy to a GPU would wait for it
        return cls(
            *(torch.full((), x, dtype=dtype, device=table.student.device)
              for x in numbers))


class Rows(NamedTuple):
    """Numbers a row, of a block or of a whole table: three dimensions each,
    1 in that of the classes. Some take the place of others.

    Attributes:
        squares_p (Tensor): Of the student's centred probabilities, summed.
        squares_q (Tensor): Of the teacher's.
        products (Tensor): Of both.
        rho (Tensor): The correlation, where the products were; 0 for constant
            rows.
        of_p (Tensor): The weight of the student's probabilities in the
            gradient, where the squares of the teacher's were.
        of_q (Tensor): That of the teacher's.
        centre (Tensor): What is subtracted from the gradient because they are
            centred, where the correlation was.
        kept_p (Sequence[Tensor]): What makes the student's probabilities
            again, see :class:`Way`.
        kept_q (Sequence[Tensor]): The same of the teacher.
    """
    squares_p: Tensor
    squares_q: Tensor
    products: Tensor
    rho: Tensor
    of_p: Tensor
    of_q: Tensor
    centre: Tensor
    kept_p: Sequence[Tensor]
    kept_q: Sequence[Tensor]


class Way(NamedTuple):
    """How the logits of a block become probabilities.

    A softmax keeps the highest logit of a row, and by what it is multiplied; a
    sigmoid the mean of the row.

    Attributes:
        tau (float): Temperature.
        activation (str): 'softmax' or 'sigmoid'.
        axis (int): That of the classes.
        numbers (Numbers): Of the table.
        in_one (bool): Whether the library has one fast call for it: where
            classes lie side by side.
        num_kept (int): How many numbers a row are kept.
    """
    tau: float
    activation: str
    axis: int
    numbers: Numbers
    in_one: bool
    num_kept: int

    @classmethod
    def of(cls, tau: float, activation: str, axis: int,
           numbers: Numbers) -> 'Way':
        """That of an activation."""
        in_one = (activation, axis, tau) == ('softmax', 2, 1)
        kept = 0 if in_one else dict(softmax=2, sigmoid=1)[activation]
        return cls(tau, activation, axis, numbers, in_one, kept)

    def probabilities(self, logits: Tensor, out: Tensor,
                      kept: Sequence[Tensor]) -> None:
        """Write the probabilities of a block, and what is kept."""
        if self.in_one:
            torch.softmax(logits, 2, dtype=out.dtype, out=out)
        elif self.activation == 'sigmoid':
            self._sigmoid(logits, out)
            torch.mean(out, self.axis, True, out=kept[0])
        else:
            highest, scale = kept
            logits = _plain(logits, out)
            torch.amax(logits, self.axis, True, out=highest)
            self._powers(logits, highest, out)
            torch.sum(out, self.axis, True, out=scale)
            out.mul_(scale.reciprocal_())

    def again(self, logits: Tensor, out: Tensor, kept: Sequence[Tensor],
              scaled: bool) -> None:
        """Write them from what was kept; unless ``scaled``, they remain to be
        multiplied by :meth:`scale`."""
        if self.in_one:
            torch.softmax(logits, 2, dtype=out.dtype, out=out)
        elif self.activation == 'sigmoid':
            self._sigmoid(logits, out)
        else:
            highest, scale = kept
            self._powers(_plain(logits, out), highest, out)
            if scaled:
                out.mul_(scale)

    def mean(self, kept: Sequence[Tensor]) -> Tensor:
        """Of rows."""
        return self.numbers.mean if self.activation == 'softmax' else kept[0]

    def scale(self, kept: Sequence[Tensor]) -> Tensor:
        """What remains to be multiplied by, see :meth:`again`."""
        return kept[1] if self.num_kept == 2 else self.numbers.one

    def _sigmoid(self, logits: Tensor, out: Tensor) -> None:
        logits = _plain(logits, out)
        if self.tau == 1:
            torch.sigmoid(logits, out=out)
        else:
            torch.div(logits, self.tau, out=out).sigmoid_()

    def _powers(self, logits: Tensor, highest: Tensor, out: Tensor) -> None:
        """Powers of 2, which take a third of the time of the library's
        exponentials."""
        # First the difference: of large logits products differ by their
        # rounding, which overflows as an exponent.
        torch.sub(logits, highest, out=out)
        out.mul_(LOG2_E / self.tau).exp2_()


def _plain(logits: Tensor, out: Tensor) -> Tensor:
    """Logits that calls read as fast as ``out``."""
    if logits.dtype != out.dtype or logits.stride(2) != 1:
        return out.copy_(logits)
    return logits


class Ways(NamedTuple):
    """How blocks become rows.

    Attributes:
        student (Way): That of the student's logits.
        teacher (Way): That of the teacher's.
        axis (int): That of the classes.
        numbers (Numbers): Of the table.
    """
    student: Way
    teacher: Way
    axis: int
    numbers: Numbers

    @classmethod
    def of(cls, rule: Rule, table: Table) -> 'Ways':
        """Those of a table."""
        numbers = Numbers.of(rule, table)
        ways = (
            Way.of(rule.tau, activation, table.axis, numbers)
            for activation in (rule.student, rule.teacher))
        return cls(*ways, table.axis, numbers)

    @property
    def numbers_a_row(self) -> int:
        """How many numbers a row :class:`Rows` are."""
        return 4 + self.student.num_kept + self.teacher.num_kept

    def new_rows(self, block: Tensor) -> Rows:
        """Those of a block, in memory of their own."""
        shape = list(block.shape)
        shape[self.axis] = 1
        return self._rows(block.new_empty(self.numbers_a_row, *shape).unbind())

    def rows_within(self, gradient: Tensor) -> Rows:
        """Those of a block or a table, in the memory of its gradient."""
        memory = gradient.narrow(self.axis, 0, self.numbers_a_row)
        return self._rows(memory.chunk(self.numbers_a_row, self.axis))

    def _rows(self, memory: Sequence[Tensor]) -> Rows:
        squares_p, squares_q, products, of_q, *kept = memory
        number = self.student.num_kept
        return Rows(squares_p, squares_q, products, products, squares_q, of_q,
                    products, kept[:number], kept[number:])

    def relate(self, block: Block, rows: Rows) -> None:
        """Write the probabilities of a block in the first two of its buffers,
        and the squares and products of its rows."""
        p, q, spare = block.buffers
        self.student.probabilities(block.student, p, rows.kept_p)
        self.teacher.probabilities(block.teacher, q, rows.kept_q)
        mean_p, mean_q = self._means(rows)
        for x, mean, out in ((p, mean_p, rows.squares_p), (q, mean_q,
                                                           rows.squares_q)):
            torch.sub(x, mean, out=spare)
            torch.sum(spare.mul_(spare), self.axis, True, out=out)
        torch.sub(p, mean_p, out=spare)
        rounded = spare.sum(self.axis, True)  # 0, but for rounding
        torch.sum(spare.mul_(q), self.axis, True, out=rows.products)
        rows.products.addcmul_(rounded, mean_q, value=-1)

    def correlate(self, rows: Rows) -> Tensor:
        """From squares and products to correlations, and to the gradient of
        these: ``of_q`` times the teacher's centred probabilities, less
        ``of_p`` times the student's.

        Returns:
            Tensor: The correlations.
        """
        for mean, squares in zip(
                self._means(rows), (rows.squares_p, rows.squares_q)):
            self._without_rounded(squares, mean, rows.of_q)
        of_q = torch.mul(rows.squares_p, rows.squares_q, out=rows.of_q).sqrt_()
        F.threshold_(of_q, 0, math.inf)  # so that its inverse is 0
        of_q.add_(self.numbers.eps).reciprocal_()
        rho = rows.products.mul_(of_q)
        torch.maximum(rows.squares_p, self.numbers.tiny, out=rows.squares_p)
        ratio = rows.squares_q.div_(rows.squares_p)
        ratio.sqrt_().mul_(rho).mul_(of_q)  # of_p
        return rho

    def _without_rounded(self, squares: Tensor, mean: Tensor,
                         spare: Tensor) -> None:
        """Make squares 0 that are no more than their rounding, see
        :func:`rounded_squares`, without new memory."""
        spare.copy_(mean).mul_(mean).mul_(self.numbers.rounding)
        torch.maximum(spare, self.numbers.tiny, out=spare)
        torch.sub(squares, spare, out=spare)
        squares.mul_(spare.heaviside_(self.numbers.zero))

    def weigh(self, rows: Rows, grad: Tensor) -> None:
        """From the gradient of correlations to that of probabilities, where
        the gradient of each correlation is ``grad``."""
        mean_p, mean_q = self._means(rows)
        of_p, of_q = rows.of_p.mul_(-grad), rows.of_q.mul_(grad)
        torch.mul(of_q, mean_q, out=rows.centre).addcmul_(of_p, mean_p)

    def again(self, block: Block, rows: Rows) -> None:
        """Write the probabilities of a block that was related before, the
        teacher's but for :meth:`Way.scale`."""
        p, q, _ = block.buffers
        self.student.again(block.student, p, rows.kept_p, scaled=True)
        self.teacher.again(block.teacher, q, rows.kept_q, scaled=False)

    def _means(self, rows: Rows) -> Sequence[Tensor]:
        return self.student.mean(rows.kept_p), self.teacher.mean(rows.kept_q)
