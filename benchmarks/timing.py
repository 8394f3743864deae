"""Time, memory, operations and tables of benchmarks; PyTorch is all it needs.
"""
import argparse
import time
from itertools import accumulate
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
# Arguments that an operation writes to: its results.
WRITTEN = ('out', 'grad_input')
WARM_UP = 3


def milliseconds(step: Callable, device: str) -> float:
    """The time of one run of a step; a GPU must be idle before.

    One thread on a CPU is timed by what it computes itself, so that other jobs
    on the machine count for less. What the step returns is freed when the
    clock has stopped.
    """
    if device != 'cpu':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    alone = torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    begun = clock()
    result = step()  # noqa: F841
    return 1000 * (clock() - begun)


def turns(steps: Dict[str, Callable], repeats: int,
          device: str) -> Dict[str, List[float]]:
    """Milliseconds of steps that are run in turns, turn by turn."""
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for repeat in range(-(1 if device == 'cpu' else WARM_UP), repeats):
        for name, step in steps.items():
            spent = milliseconds(step, device)
            if repeat >= 0:
                times[name].append(spent)
    return times


def peak_memory(step: Callable, device: str) -> int:
    """The most bytes that a step has allocated at a time."""
    if device != 'cpu':
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(profile_memory=True) as run:
        step()
    events = run.profiler.kineto_results.events()
    return max(
        accumulate(e.nbytes() for e in events if e.name() == '[memory]'))


class Count(TorchDispatchMode):
    """Counts operations that are no views, and the numbers of the tensors
    that they take and return: on a GPU, launches and memory traffic."""
    FREE = ('detach', 'empty', 'empty_like', 'new_empty', 'empty_strided',
            'new_empty_strided')

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in self.FREE:
            read = [v for k, v in kwargs.items() if k not in WRITTEN]
            self.operations += 1
            self.numbers += sum(x.numel()
                                for x in tree_leaves((args, read, result))
                                if isinstance(x, torch.Tensor))
        return result


def add_arguments(parser: argparse.ArgumentParser, repeats: int) -> None:
    """The options of every benchmark."""
    parser.add_argument('--repeats', type=int, default=repeats)
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--json', type=Path, help='write all figures there')


def table(rows: List[Dict[str, str]]) -> str:
    """Rows of cells by column, as Markdown."""
    lines = [[*rows[0]], ['---'] * len(rows[0]), *(r.values() for r in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
