"""Helpers of the benchmarks: time, memory, and where figures go."""
import argparse
import json
import time
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, Iterable, List, Sequence

import torch
from rich.progress import track
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MIB = 2**20
# Arguments that an operation writes to: its results.
WRITTEN = ('out', 'grad_input')


def progress(sequence: Sequence) -> Iterable:
    """A bar that is drawn between measurements only: one that refreshes
    itself would take its time from a thread that is measured."""
    return track(sequence, 'Measuring', auto_refresh=False)


def turns(steps: Dict[str, Callable], repeats: int,
          device: str) -> Dict[str, List[float]]:
    """Milliseconds of steps that are run in turns, turn by turn.

    One thread on a CPU is timed by what it computes itself, so that other jobs
    on the machine count for less. What a step returns is freed when the clock
    has stopped.
    """
    alone = device == 'cpu' and torch.get_num_threads() == 1
    clock = time.thread_time if alone else time.perf_counter
    times: Dict[str, List[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            begun = clock()
            result = step()
            if device != 'cpu':
                torch.cuda.synchronize(device)
            if repeat:  # the first warms up
                times[name].append(1000 * (clock() - begun))
            del result
    return times


def in_turns(steps: Dict[str, Callable], repeats: int,
             device: str) -> Dict[str, float]:
    """Medians in milliseconds of steps that are run in turns."""
    times = turns(steps, repeats, device)
    return {name: median(values) for name, values in times.items()}


def peak_memory(step: Callable, device: str) -> int:
    """The most bytes that a step has allocated at a time."""
    if device != 'cpu':
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
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', type=Path, help='write all figures there')
    parser.add_argument('--plot', type=Path, help='draw the ratios there')


def save(results: List[Dict[str, Any]], args: argparse.Namespace,
         plot: Callable) -> None:
    """Write figures and their plot where they were asked for."""
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    if args.plot:
        plot(results, args.plot)
