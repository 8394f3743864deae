"""Measure the DIST loss against its formula written as tensor operations.

Both compute forward and backward of the same logits in turns, so that what
else the machine does meets both; the ratio of medians is what counts.
Started by torchrun, it measures the intra term of the rows of all processes.
"""
import argparse
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import matplotlib
import numpy as np
import torch
from mmengine.dist import (get_world_size, init_dist, is_distributed,
                           is_main_process)
from rich.console import Console
from rich.table import Table
from timing import (MIB, Count, add_arguments, in_turns, peak_memory, progress,
                    save)
from torch import Tensor

from mmdist.models.losses.formula import activate
from mmdist.models.losses.functional import dist_terms, to_rows
from mmdist.utils import run_tool

# What is usual: PSPNet on Cityscapes and ADE20K, a level of RetinaNet, the
# RoIs of Faster R-CNN, a batch of ImageNet, and next to nothing.
SHAPES = ('4,19,128,256:softmax', '2,150,128,128:softmax',
          '2,720,50,76:sigmoid', '2,720,100,152:sigmoid', '2,256,100,152:none',
          '1024,81:softmax', '256,1000:softmax', '8,4:softmax')


def formula(student: Tensor, teacher: Tensor, activation: str) -> Tensor:
    """DIST as its authors write it: tables of the logits' size."""
    p, q = (activate(to_rows(x), activation) for x in (student, teacher))
    return 2 - _correlation(p, q).mean() - _correlation(p.T, q.T).mean()


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def mmdist(student: Tensor, teacher: Tensor, activation: str) -> Tensor:
    """The same by mmdist; of several processes, of all their rows."""
    # Operations are counted in one chunk.
    chunk_numel = student.numel() if student.is_meta else None
    terms = dist_terms(
        student,
        teacher,
        1.,
        activation,
        sync_intra=is_distributed(),
        chunk_numel=chunk_numel)
    return terms['inter'] + terms['intra']


WAYS = dict(formula=formula, mmdist=mmdist)


def parse_shape(text: str) -> Tuple[List[int], str]:
    """``'4,19,128,256:softmax'`` -> shape and activation."""
    sizes, _, activation = text.partition(':')
    if activation not in ('softmax', 'sigmoid', 'none'):
        raise argparse.ArgumentTypeError(
            f'{text!r} must end with :softmax, :sigmoid or :none')
    return [int(size) for size in sizes.split(',')], activation


def step_of(way: Callable, student: Tensor, teacher: Tensor,
            activation: str) -> Callable:
    """One forward and backward pass."""

    def step() -> Tensor:
        gradient, = torch.autograd.grad(
            way(student, teacher, activation), student)
        return gradient

    return step


def measure(shape: List[int], activation: str, repeats: int, device: str,
            dtype: torch.dtype) -> Dict[str, Any]:
    """Medians in milliseconds, their ratio, peak memory, and the operations
    and numbers per logit in one chunk.

    Args:
        shape (list[int]): Of the logits.
        activation (str): 'softmax', 'sigmoid' or 'none'.
        repeats (int): Of each way, in turns.
        device (str): E.g. 'cpu' or 'cuda'.
        dtype (torch.dtype): Of the logits.
    """
    torch.manual_seed(0)
    student, teacher = torch.randn(2, *shape).to(device, dtype)
    student.requires_grad_()
    steps = {
        name: step_of(way, student, teacher, activation)
        for name, way in WAYS.items()
    }
    medians = in_turns(steps, repeats, device)
    size = student.numel() * student.element_size()
    return dict(
        shape=shape,
        activation=activation,
        milliseconds=medians,
        ratio=medians['formula'] / medians['mmdist'],
        logits_mib=size / MIB,
        # beside the gradient that is returned
        extra_mib={
            name: (peak_memory(step, device) - size) / MIB
            for name, step in steps.items()
        },
        counts={
            name: count(way, shape, activation)
            for name, way in WAYS.items()
        })


def count(way: Callable, shape: List[int],
          activation: str) -> Tuple[int, float]:
    """Operations, and numbers per logit, as on a GPU with one chunk."""
    student, teacher = torch.empty(2, *shape, device='meta').unbind()
    step = step_of(way, student.requires_grad_(), teacher, activation)
    with Count() as counted:
        step()
    return counted.operations, counted.numbers / student.numel()


def show(results: List[Dict[str, Any]], title: str) -> None:
    """Print a table."""
    table = Table(title=title)
    for column in ('logits', 'activation', 'formula', 'mmdist', 'ratio',
                   'memory of the formula', 'of mmdist', 'logits in memory',
                   'operations on numbers, formula', 'mmdist'):
        table.add_column(column, justify='right')
    for r in results:
        table.add_row('×'.join(map(str, r['shape'])), r['activation'],
                      *(f'{t:.2f} ms' for t in r['milliseconds'].values()),
                      f'{r["ratio"]:.2f}',
                      *(f'{m:.1f} MiB' for m in r['extra_mib'].values()),
                      f'{r["logits_mib"]:.1f} MiB',
                      *('%d on %.0f' % c for c in r['counts'].values()))
    Console(width=150).print(table)


def growth(results: List[Dict[str, Any]]) -> List[str]:
    """Sentences: the times grow with which power of the logits?"""
    lines = []
    for activation in ('softmax', 'sigmoid'):
        of_one = [r for r in results if r['activation'] == activation]
        sizes = np.log([math.prod(r['shape']) for r in of_one])
        if len(set(sizes)) >= 5:
            slopes = {
                name:
                np.polyfit(sizes,
                           np.log([r['milliseconds'][name]
                                   for r in of_one]), 1)[0]
                for name in WAYS
            }
            lines.append(f'{activation}: ' +
                         ', '.join(f'{name} grows as logits^{slope:.2f}'
                                   for name, slope in slopes.items()))
    return lines


def plot(results: List[Dict[str, Any]], path: Path) -> None:
    """Draw how many times faster mmdist is."""
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    labels = [
        f'{"×".join(map(str, r["shape"]))}\n{r["activation"]}' for r in results
    ]
    figure, axes = plt.subplots(figsize=(8, 4), layout='constrained')
    bars = axes.bar(labels, [r['ratio'] for r in results])
    axes.bar_label(bars, fmt='%.1f')
    axes.axhline(1, color='black', linewidth=0.8)
    axes.set_ylabel("formula's time / mmdist's")
    axes.tick_params(axis='x', labelsize=7)
    figure.savefig(path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--shapes',
        nargs='+',
        type=parse_shape,
        default=[parse_shape(s) for s in SHAPES],
        help='e.g. 4,19,128,256:softmax (classes second)')
    parser.add_argument(
        '--dtype',
        choices=['float32', 'float16', 'bfloat16', 'float64'],
        default='float32')
    add_arguments(parser, repeats=20)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    if 'WORLD_SIZE' in os.environ:  # started by torchrun
        # MMEngine's own would ask for a GPU.
        if args.device == 'cpu':
            torch.distributed.init_process_group('gloo')
        else:
            init_dist('pytorch')
    results = [
        measure(shape, activation, args.repeats, args.device,
                getattr(torch, args.dtype))
        for shape, activation in progress(args.shapes)
    ]
    if not is_main_process():
        return
    show(
        results, f'Forward and backward, {args.dtype}, {args.device}, '
        f'{get_world_size()} processes, {args.threads} threads, '
        f'torch {torch.__version__}')
    print(*growth(results), sep='\n')
    save(results, args, plot)


if __name__ == '__main__':
    run_tool(main)
