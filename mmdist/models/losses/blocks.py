"""Logits of student and teacher, block by block.

What is computed of a block stays in the cache of a processor; buffers are
taken once and shared by all blocks, because memory that is new for every
call costs as much as what is computed in it.
"""
import math
from typing import Iterator, List, Sequence, Tuple

import torch
from torch import Tensor

# Elements of a block, at least and at most: small ones stay in the cache,
# large ones are worth the calls. (For GPUs they are chosen, not measured.)
BLOCKS = dict(cpu=(2**16, 3 * 2**17), other=(2**19, 2**22))
# A block is held in three buffers: together less than a tenth of the logits.
PARTS = 34
# The rows of a part of a picture are a multiple: the widest vectors, twice.
LANES = 32
# Classes from which rows that lie in one piece are computed as they lie: calls
# on few elements at a time are slower than a copy.
WIDE = 40


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


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

    def empty(self, logits: Tensor) -> Tensor:
        """For a gradient of the logits, in a layout that has a view."""
        if not self.last or logits.dim() == 2:
            return torch.empty_like(
                logits, memory_format=torch.contiguous_format)
        return torch.empty_like(
            logits.movedim(1, -1),
            memory_format=torch.contiguous_format).movedim(-1, 1)

    def blocks(self, *tables: Tensor) -> Iterator[Sequence]:
        """:meth:`parts` of tables, and a list of three buffers of their
        size."""
        whole = buffers = None
        for blocks in self.parts(*tables):
            whole = whole or _buffers(blocks[0])
            if buffers is None or buffers[0].shape != blocks[0].shape:
                buffers = [_part(buffer, blocks[0]) for buffer in whole]
            yield (*blocks, buffers)

    def parts(self, *tables: Tensor) -> Iterator[Sequence[Tensor]]:
        """The blocks of tables of this shape, the first one the largest."""
        step, pictures = self._steps()
        for group in zip(*(table.split(pictures) for table in tables)):
            yield from zip(*(table.split(step, self.axes[1])
                             for table in group))

    def _steps(self) -> Tuple[int, int]:
        """Rows and pictures of a block; the parts of a picture have about
        one size."""
        on_cpu = self.student.device.type == 'cpu'
        low, high = BLOCKS['cpu' if on_cpu else 'other']
        size = min(max(self.student.numel() // PARTS, low), high)
        length = self.student.shape[self.axes[1]]
        step = max(size // self.num_classes, 1)
        if step >= length:
            return length, step // length
        lanes = LANES if self.axis == 1 else 1
        parts = math.ceil(length / (max(step // lanes, 1) * lanes))
        return math.ceil(length / parts / lanes) * lanes, 1


def _three_axes(logits: Tensor) -> Tensor:
    """``(N, C, L)``."""
    return logits.t()[None] if logits.dim() == 2 else logits.flatten(2)


def _buffers(block: Tensor) -> List[Tensor]:
    return list(
        torch.empty((3, *block.shape),
                    dtype=compute_dtype(block),
                    device=block.device))


def _part(buffer: Tensor, block: Tensor) -> Tensor:
    """The start of a buffer in the shape of a smaller block."""
    return buffer.view(-1)[:block.numel()].view(block.shape)
