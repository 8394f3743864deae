"""The two passes of :mod:`.pearson` as fused kernels in Triton, for CUDA.

A program takes some positions of an image through tiles of its classes, first
for what rows need, then for sums; a single tile is read once. Moments of the
columns are joined by :func:`.pearson.merge`, without atomics.
"""
import os
import warnings
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import formula, pearson

MAX_CLASSES = 4096
# Classes, and numbers, of a tile.
TILE_CLASSES, TILE = 1024, 8192
ACTIVATIONS = dict(none=0, softmax=1, sigmoid=2)


@triton.jit
def _tile(pointer, base, stride, classes, C, valid, tau, ACT: tl.constexpr):
    """Logits of a tile, divided by the temperature, and which there are."""
    mask = (classes < C)[:, None] & valid[None, :]
    other = -float('inf') if ACT == 1 else 0.
    offsets = base[None, :] + classes[:, None].to(tl.int64) * stride
    return tl.load(pointer + offsets, mask, other).to(tl.float32) / tau, mask


@triton.jit
def _row_state(pointer, base, stride, C, valid, tau, ACT: tl.constexpr,
               TILES: tl.constexpr, BLOCK_C: tl.constexpr,
               BLOCK_L: tl.constexpr):
    """Row statistics for :func:`_activated`, and the row means."""
    highest = tl.full([BLOCK_L], -float('inf'), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    for tile in range(TILES):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        x, mask = _tile(pointer, base, stride, classes, C, valid, tau, ACT)
        if ACT == 1:
            higher = tl.maximum(highest, tl.max(x, 0))
            finite = tl.where(higher == -float('inf'), 0., higher)
            total = total * tl.exp(highest - finite) + tl.sum(
                tl.exp(x - finite[None, :]), 0)
            highest = higher
        elif ACT == 2:
            total += tl.sum(tl.where(mask, tl.sigmoid(x), 0.), 0)
        else:
            total += tl.sum(x, 0)
    mean = total / C
    if ACT == 1:
        highest = tl.where(valid, highest, 0.)
        total = tl.where(valid, total, 1.)
        mean = tl.zeros([BLOCK_L], tl.float32) + 1. / C
    return (pointer, base, stride, highest, total), mean


@triton.jit
def _activated(row, classes, C, valid, tau, ACT: tl.constexpr):
    """Activated logits of a tile; 0 where there is none."""
    pointer, base, stride, highest, total = row
    x, mask = _tile(pointer, base, stride, classes, C, valid, tau, ACT)
    if ACT == 1:
        x = tl.exp(x - highest[None, :]) / total[None, :]
    if ACT == 2:
        x = tl.where(mask, tl.sigmoid(x), 0.)
    return x, mask


@triton.jit
def _statistics_kernel(s, t, similarity, rows, parts, C, L, s_n, s_c, s_l, t_n,
                       t_c, t_l, tau, eps, relative, tiny, ACT_S: tl.constexpr,
                       ACT_T: tl.constexpr, TILES: tl.constexpr,
                       BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    program = image * tl.num_programs(0) + tl.program_id(0)
    at = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = at < L
    s_base, t_base = image * s_n + at * s_l, image * t_n + at * t_l
    s_row, s_mean = _row_state(s, s_base, s_c, C, valid, tau, ACT_S, TILES,
                               BLOCK_C, BLOCK_L)
    t_row, t_mean = _row_state(t, t_base, t_c, C, valid, tau, ACT_T, TILES,
                               BLOCK_C, BLOCK_L)
    aa, bb = tl.zeros([BLOCK_L], tl.float32), tl.zeros([BLOCK_L], tl.float32)
    ab = tl.zeros([BLOCK_L], tl.float32)
    count = tl.sum(valid.to(tl.float32), 0)
    for tile in range(TILES):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        p, mask = _activated(s_row, classes, C, valid, tau, ACT_S)
        q, mask = _activated(t_row, classes, C, valid, tau, ACT_T)
        a = tl.where(mask, p - s_mean[None, :], 0.)
        b = tl.where(mask, q - t_mean[None, :], 0.)
        aa += tl.sum(a * a, 0)
        bb += tl.sum(b * b, 0)
        ab += tl.sum(a * b, 0)
        # the same of the columns; their rows are those of this program
        p_mean, q_mean = tl.sum(p, 1) / count, tl.sum(q, 1) / count
        a = tl.where(mask, p - p_mean[:, None], 0.)
        b = tl.where(mask, q - q_mean[:, None], 0.)
        out, there = parts + program * 6 * C + classes, classes < C
        tl.store(out, count + tl.zeros([BLOCK_C], tl.float32), there)
        tl.store(out + C, p_mean, there)
        tl.store(out + 2 * C, q_mean, there)
        tl.store(out + 3 * C, tl.sum(a * a, 1), there)
        tl.store(out + 4 * C, tl.sum(b * b, 1), there)
        tl.store(out + 5 * C, tl.sum(a * b, 1), there)
    # see pearson.coefficients
    constant = (aa <= tl.maximum(relative * s_mean * s_mean, tiny)) | (
        bb <= tl.maximum(relative * t_mean * t_mean, tiny))
    constant = constant | (aa == float('inf')) | (bb == float('inf'))
    norms = tl.sqrt(tl.where(constant, 1., aa)) * tl.sqrt(
        tl.where(constant, 1., bb))
    weight = tl.where(constant, 0., 1. / (norms + eps))
    rho = tl.where(constant, 0., ab) * weight
    factor = rho * (1. - eps * weight) / tl.where(constant, 1., aa)
    out, number = rows + image * L + at, tl.num_programs(1) * L
    tl.store(out, factor, valid)
    tl.store(out + number, weight, valid)
    tl.store(out + 2 * number, factor * s_mean - weight * t_mean, valid)
    tl.store(similarity + program, tl.sum(tl.where(valid, rho, 0.), 0))


@triton.jit
def _gradient_of_p(p, q, columns, classes, C, a_row, b_row, d_row):
    there = classes < C
    a = tl.load(columns + classes, there, 0.)[:, None] + a_row[None, :]
    b = tl.load(columns + C + classes, there, 0.)[:, None] + b_row[None, :]
    d = tl.load(columns + 2 * C + classes, there, 0.)[:, None] + d_row[None, :]
    return b * q - a * p + d


@triton.jit
def _gradient_kernel(s, t, result, rows, columns, row_weight, C, L, s_n, s_c,
                     s_l, t_n, t_c, t_l, r_n, r_c, r_l, tau,
                     ACT_S: tl.constexpr, ACT_T: tl.constexpr,
                     TILES: tl.constexpr, BLOCK_C: tl.constexpr,
                     BLOCK_L: tl.constexpr):
    image = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = at < L
    s_base, t_base = image * s_n + at * s_l, image * t_n + at * t_l
    r_base = image * r_n + at * r_l
    s_row, mean = _row_state(s, s_base, s_c, C, valid, tau, ACT_S, TILES,
                             BLOCK_C, BLOCK_L)
    t_row, mean = _row_state(t, t_base, t_c, C, valid, tau, ACT_T, TILES,
                             BLOCK_C, BLOCK_L)
    of_rows, number = rows + image * L + at, tl.num_programs(1) * L
    weight = tl.load(row_weight)
    a_row = tl.load(of_rows, valid, 0.) * weight
    b_row = tl.load(of_rows + number, valid, 0.) * weight
    d_row = tl.zeros([BLOCK_L], tl.float32)  # a softmax takes no notice of it
    if ACT_S != 1:
        d_row += tl.load(of_rows + 2 * number, valid, 0.) * weight
    inner = tl.zeros([BLOCK_L], tl.float32)
    if ACT_S == 1:
        for tile in range(TILES):
            classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
            p, mask = _activated(s_row, classes, C, valid, tau, ACT_S)
            q, mask = _activated(t_row, classes, C, valid, tau, ACT_T)
            grad = _gradient_of_p(p, q, columns, classes, C, a_row, b_row,
                                  d_row)
            inner += tl.sum(grad * p, 0)
    for tile in range(TILES):
        classes = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        p, mask = _activated(s_row, classes, C, valid, tau, ACT_S)
        q, mask = _activated(t_row, classes, C, valid, tau, ACT_T)
        grad = _gradient_of_p(p, q, columns, classes, C, a_row, b_row, d_row)
        if ACT_S == 1:
            grad = (grad - inner[None, :]) * p
        if ACT_S == 2:
            grad = grad * p * (1. - p)
        offsets = r_base[None, :] + classes[:, None].to(tl.int64) * r_c
        tl.store(result + offsets, grad, mask)


def _blocks(s: Tensor, options: pearson.Options) -> tuple:
    """The grid of programs, and what is fixed when a kernel is compiled."""
    block_c = min(triton.next_power_of_2(s.shape[1]), TILE_CLASSES)
    block_l = max(min(TILE // block_c, 128), 8)
    return (triton.cdiv(s.shape[2], block_l), s.shape[0]), dict(
        ACT_S=ACTIVATIONS[options.student_activation],
        ACT_T=ACTIVATIONS[options.teacher_activation],
        TILES=triton.cdiv(s.shape[1], block_c),
        BLOCK_C=block_c,
        BLOCK_L=block_l)


def statistics(student: Tensor, teacher: Tensor,
               options: pearson.Options) -> tuple:
    """See :func:`.pearson.statistics`; what is kept is ``(3, N, L)``."""
    s, t = map(pearson.three_axes, (student, teacher))
    (N, C, L), (grid, fixed) = s.shape, _blocks(s, options)
    info, float32 = torch.finfo(torch.float32), dict(dtype=torch.float32)
    similarity = s.new_empty(grid[0] * N, **float32)
    rows = s.new_empty((3, N, L), **float32)
    parts = s.new_empty((grid[0] * N, 6, C), **float32)
    relative = C * (formula.ROUNDINGS * info.eps)**2
    _statistics_kernel[grid](s, t, similarity, rows, parts, C, L, *s.stride(),
                             *t.stride(), options.tau, options.eps, relative,
                             info.tiny**0.5, **fixed)
    return (similarity.sum(dtype=torch.float64), pearson.merge(parts.double()),
            rows)


def gradient(student: Tensor, teacher: Tensor, options: pearson.Options,
             row_weight: Tensor, columns: Tensor, kept: Tensor) -> Tensor:
    """See :func:`.pearson.gradient`."""
    result = pearson.new_gradient(student)
    s, t, out = map(pearson.three_axes, (student, teacher, result))
    grid, fixed = _blocks(s, options)
    _gradient_kernel[grid](s, t, out, kept, columns.float(),
                           row_weight.float(), *s.shape[1:], *s.stride(),
                           *t.stride(), *out.stride(), options.tau, **fixed)
    return result


@lru_cache(None)
def _agrees(device: torch.device, activation: str) -> bool:
    """Whether the kernels compute the formula on this device."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 37, 29, generator=rng).to(device)
    options = pearson.Options(1., activation, activation, 1e-8)
    found = []
    try:
        for kernels in ((), (statistics, gradient)):
            with torch.enable_grad(), torch.inference_mode(False):
                s = student.clone().requires_grad_()
                terms = pearson.distances(s, teacher.clone(), options,
                                          *kernels)
                found.append(torch.autograd.grad(sum(terms), s)[0])
        error = float((found[0] - found[1]).norm() / found[0].norm())
        if error < 1e-5:
            return True
    except Exception as exception:  # of the compiler or of the device
        error = exception
    warnings.warn('the Triton kernels of DIST do not work on this device, '
                  f'PyTorch computes it instead ({error})')
    return False


def passes(student: Tensor, options: pearson.Options) -> tuple:
    """The two passes, or nothing where they cannot be used."""
    here = student.is_cuda or os.environ.get('TRITON_INTERPRET') == '1'
    known = student.shape[1] <= MAX_CLASSES and student.dtype != torch.float64
    usable = here and known and all(
        _agrees(student.device, activation) for activation in options[1:3])
    return (statistics, gradient) if usable else ()
