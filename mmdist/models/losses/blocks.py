"""Logits of student and teacher, block by block.

What is computed of a block stays in the cache of a processor; buffers are
taken once and shared by all blocks, because memory that is new for every
call costs as much as what is computed in it.
"""
import math
from typing import Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

# Elements of a block, about at least and at most: small ones stay in the
# cache, large ones are worth the calls. (For GPUs they are chosen, not
# measured.)
BLOCKS = dict(cpu=(2**16, 3 * 2**17), other=(2**19, 2**22))
# Parts of the logits that a block is, if that is neither too little nor too
# much: three buffers of its size are less than a tenth of float32 logits.
SHARE = 32
# A table of fewer blocks of the least size is small: its blocks are about
# twice as large, or have about so many rows, if they may be so large. Rows lie
# side by side where classes do not.
MANY = 16
SIDE_BY_SIDE = 384
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
        buffers (Sequence[Tensor]): Three, of its size.
        gradient (Tensor, optional): Its block.
    """
    student: Tensor
    teacher: Tensor
    buffers: Sequence[Tensor]
    gradient: Optional[Tensor] = None


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
        of_classes (tuple[int, int, int]): The view of numbers a class.
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
        self.of_classes = (1, 1, -1) if self.axis == 2 else (1, -1, 1)
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

    def has_room(self, number: int) -> bool:
        """Whether the gradient can hold so many numbers a row, with those of
        rows side by side where the classes of a row are not."""
        apart = self.last and self.axis == 1
        return number <= self.num_classes and not apart

    def blocks(self, gradient: Optional[Tensor] = None) -> Iterator[Block]:
        """The logits block by block."""
        tables = [self.student, self.teacher]
        if gradient is not None:
            tables.append(self.view(gradient))
        largest = None
        for student, teacher, *out in self.parts(*tables):
            if largest is None:  # the first block
                largest = _buffers(student)
            buffers = largest
            if student.shape != buffers[0].shape:
                buffers = [_start(buffer, student) for buffer in largest]
            yield Block(student, teacher, buffers, *out)

    def parts(self, *tables: Tensor) -> Iterator[Sequence[Tensor]]:
        """Blocks of tables of this shape; the first is the largest."""
        step, pictures = self._steps()
        for group in zip(*(table.split(pictures) for table in tables)):
            yield from zip(*(table.split(step, self.axes[1])
                             for table in group))

    def _steps(self) -> Tuple[int, int]:
        """Rows and pictures of a block; the parts of a picture have about
        one size."""
        table = self.student
        low, high = BLOCKS['cpu' if table.device.type == 'cpu' else 'other']
        if table.numel() <= MANY * low:  # a large part of little memory
            low = max(2 * low, SIDE_BY_SIDE * self.num_classes)
        size = min(max(table.numel() // SHARE, low), high)
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


def _buffers(block: Tensor) -> Sequence[Tensor]:
    """Three of the shape of a block, each in one piece."""
    return block.new_empty((3, *block.shape),
                           dtype=compute_dtype(block)).unbind()


def _start(buffer: Tensor, block: Tensor) -> Tensor:
    """The part of a buffer with the shape of a smaller block."""
    number, height, width = block.shape
    return buffer[:number, :height, :width]
