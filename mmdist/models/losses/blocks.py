"""Logits of student and teacher, block by block.

What is computed of a block stays in the cache of a processor; buffers are
taken once and shared by all blocks, because memory that is new for every
call costs as much as what is computed in it.
"""
import math
from typing import (Iterable, Iterator, List, NamedTuple, Optional, Sequence,
                    Tuple)

import torch
from torch import Tensor

# Elements of a block, at least and at most: small ones stay in the cache,
# large ones are worth the calls. (For GPUs they are chosen, not measured.)
BLOCKS = dict(cpu=(2**16, 3 * 2**17), other=(2**19, 2**22))
# Parts of the logits that a block is: of those with buffers of their own,
# which are less than a tenth of the logits then, ...
SMALL_SHARE = 40
# ... and of others.
LARGE_SHARE = 10
# The rows of a part of a picture are a multiple: the widest vectors, twice.
LANES = 32
# Classes from which rows that lie in one piece are computed as they lie: calls
# on few elements at a time are slower than a copy.
WIDE = 40


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


class Block(NamedTuple):
    """A block of logits.

    Attributes:
        student (Tensor): Logits.
        teacher (Tensor): Logits.
        buffers (list[Tensor]): Three, of its size.
        keeps (bool): Whether the block of the gradient keeps what is written
            there until the block comes again.
        gradient (Tensor, optional): Its block; may be the third buffer.
    """
    student: Tensor
    teacher: Tensor
    buffers: List[Tensor]
    keeps: bool
    gradient: Optional[Tensor] = None

    def kept(self, axis: int, number: int) -> Tensor:
        """Where numbers a row are kept in the block of the gradient.

        Args:
            axis (int): That of the classes.
            number (int): How many.
        """
        return self.gradient.narrow(axis, 0, number)


class Table:
    """Logits of student and teacher with the classes in one of three axes.

    Args:
        student (Tensor): ``(R, C)`` or ``(N, C, *spatial)``.
        teacher (Tensor): The same shape.

    Attributes:
        student (Tensor): Three axes.
        teacher (Tensor): The same.
        axis (int): That of the classes, 1 or 2.
        axes (tuple[int, int]): The others.
        last (bool): Whether a row's classes lie side by side in memory.
        num_classes (int): ``C``.
        num_rows (int): ``R``, or ``N * prod(spatial)``.
    """

    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        table = _three_axes(student)
        self.logits = student
        # As channels_last logits do, and (R, C).
        self.last = student.dim() == 2 or 0 < table.stride(1) < table.stride(2)
        self.axis = 2 if self.last and student.shape[1] >= WIDE else 1
        self.axes = (0, 3 - self.axis)
        self.student, self.teacher = self.view(student), self.view(teacher)
        self.num_classes = student.shape[1]
        self.num_rows = student.numel() // self.num_classes

    def view(self, logits: Tensor) -> Tensor:
        """The logits, or a gradient, with the classes in ``axis``."""
        table = _three_axes(logits)
        return table.transpose(1, 2) if self.axis == 2 else table

    def empty(self) -> Tensor:
        """For a gradient of the logits, in a layout that has a view."""
        logits = self.logits
        if not self.last or logits.dim() == 2:
            return torch.empty_like(
                logits, memory_format=torch.contiguous_format)
        return torch.empty_like(
            logits.movedim(1, -1),
            memory_format=torch.contiguous_format).movedim(-1, 1)

    def blocks(self, gradient: Optional[Tensor] = None) -> Iterator[Block]:
        """The logits block by block.

        Buffers are parts of the gradient where it can hold them: its own for
        a block, and others that come last. These have new ones, of a small
        part of the logits.
        """
        if gradient is None:
            return self._with_buffers([self.student, self.teacher])
        tables = [self.student, self.teacher, self.view(gradient)]
        return (self._within if self.holds(gradient) else self._with_buffers)(
            tables)

    def holds(self, gradient: Tensor) -> bool:
        """Whether the memory of a gradient can be that of buffers."""
        return (gradient.dtype == compute_dtype(gradient)
                and self.view(gradient).stride(2) == 1)

    def _with_buffers(self, tables: Sequence[Tensor]) -> Iterator[Block]:
        blocks = _largest_last(self.parts(*tables))
        buffers = _buffers(blocks, 3)
        for student, teacher, *out in blocks:
            own = [_start(buffer, student) for buffer in buffers]
            yield Block(student, teacher, own, False, *out)

    def _within(self, tables: Sequence[Tensor]) -> Iterator[Block]:
        """Blocks of tables of which the last is the gradient."""
        blocks = _largest_last(self._split(tables, LARGE_SHARE))
        last = blocks[-2:]
        for student, teacher, out in blocks[:-2]:
            buffers = [_start(block[-1], out) for block in last]
            yield Block(student, teacher, [*buffers, out], True, out)
        parts = [p for block in last for p in self._split(block, SMALL_SHARE)]
        buffers = _buffers(parts, 2)
        for student, teacher, out in parts:
            own = [_start(buffer, out) for buffer in buffers]
            yield Block(student, teacher, [*own, out], False, out)

    def parts(self, *tables: Tensor) -> Iterator[Sequence[Tensor]]:
        """The small blocks of tables of this shape."""
        return self._split(tables, SMALL_SHARE)

    def _split(self, tables: Sequence[Tensor],
               share: int) -> Iterator[Sequence[Tensor]]:
        """Blocks of one part of the logits, if that is neither too little nor
        too much; the first is the largest."""
        step, pictures = self._steps(tables[0], share)
        for group in zip(*(table.split(pictures) for table in tables)):
            yield from zip(*(table.split(step, self.axes[1])
                             for table in group))

    def _steps(self, table: Tensor, share: int) -> Tuple[int, int]:
        """Rows and pictures of a block; the parts of a picture have about
        one size."""
        low, high = BLOCKS['cpu' if table.device.type == 'cpu' else 'other']
        size = min(max(self.student.numel() // share, low), high)
        length = table.shape[self.axes[1]]
        step = max(size // self.num_classes, 1)
        if step >= length:
            return length, step // length
        lanes = LANES if self.axis == 1 else 1
        parts = math.ceil(length / (max(step // lanes, 1) * lanes))
        return math.ceil(length / parts / lanes) * lanes, 1


def _three_axes(logits: Tensor) -> Tensor:
    """``(N, C, L)``."""
    return logits.t()[None] if logits.dim() == 2 else logits.flatten(2)


def _buffers(blocks: List[Sequence[Tensor]], number: int) -> List[Tensor]:
    """New ones, of which each can hold every block."""
    first = blocks[0][0]
    shape = map(max, zip(*(block[0].shape for block in blocks)))
    return list(
        torch.empty((number, *shape),
                    dtype=compute_dtype(first),
                    device=first.device))


def _start(buffer: Tensor, block: Tensor) -> Tensor:
    """The part of a buffer with the shape of a smaller block."""
    number, height, width = block.shape
    return buffer[:number, :height, :width]


def _largest_last(parts: Iterable[Sequence[Tensor]]) -> List[Sequence[Tensor]]:
    """Blocks in their order, but for the two largest."""
    parts = list(parts)
    sizes = [part[0].numel() for part in parts]
    largest = sorted(range(len(parts)), key=sizes.__getitem__)[-2:]
    return [parts[i] for i in range(len(parts)) if i not in largest
            ] + [parts[i] for i in largest]
