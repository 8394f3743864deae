"""Train the runs that a grid declares, and write down what each reaches.

Every run is a call of ``tools/train.py``, several at a time. Results go to a
CSV file after each; a second call does what is not in it, and resumes what
was interrupted. ``tools/report_experiments.py`` makes tables and figures.
"""
import argparse
from pathlib import Path
from typing import Iterable, List

from experiments.discrepancy import Measure
from experiments.grid import Grid, GridRun
from experiments.results import Discrepancies, Results
from experiments.steps import (ROOT, Display, Step, carry_out, end_like_ctrl_c,
                               locked, short)
from rich.console import Console

from mmdist.datasets import write_digit_scenes
from mmdist.utils import run_tool


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        'grid', type=Path, help='e.g. tools/experiments/grids/camvid.py')
    parser.add_argument(
        '--work-dir', type=Path, help='default: work_dirs/experiments/GRID')
    parser.add_argument(
        '--results',
        type=Path,
        help='a CSV file (default: docs/en/results/GRID.csv)')
    parser.add_argument(
        '--jobs', type=int, default=2, help='trainings at a time (default: 2)')
    parser.add_argument(
        '--dry-run', action='store_true', help='say what is to be done')
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error('--jobs must be 1 or more')
    name = args.grid.stem
    work_dir = args.work_dir or ROOT / 'work_dirs' / 'experiments' / name
    args.work_dir = work_dir.resolve()
    args.results = args.results or ROOT / f'docs/en/results/{name}.csv'
    return args


class GridDisplay(Display):
    """Tells of trainings that end, and writes their results down.

    Args:
        console (Console): Where to print.
        path (Path): The file of results.
    """

    def __init__(self, console: Console, path: Path) -> None:
        super().__init__(console, epochs=False)
        self.results = Results(path)
        self.discrepancies = Discrepancies(
            path.with_name(f'{path.stem}_discrepancy.csv'))

    def end(self, step: Step) -> None:
        """A step has ended well; if it was a run's last, keep the result."""
        super().end(step)
        self.keep(step)

    def keep(self, step: Step) -> None:
        """Write down what a step gave that is done, if it is not known."""
        run = step.run
        if isinstance(step, Measure):
            if step not in self.discrepancies:
                self.discrepancies.add(step)
        elif step is run.steps[-1] and run not in self.results:
            self.results.add(run)
            self.say(f'{run.label}: {run.metric.title} '
                     f'{run.metric.show(run.validated())}')


def steps_of(runs: Iterable[GridRun], results: Results) -> List[Step]:
    """The steps of the runs without results, their teachers first."""
    missing = {}
    for run in runs:
        if run not in results:  # the first of those that train the same
            missing.setdefault((run.key, run.seed), run)
    teachers = [run.teacher for run in missing.values() if run.teacher]
    steps = [teacher.train for teacher in teachers]
    steps += [step for run in missing.values() for step in run.steps]
    return list(dict.fromkeys(steps))


def measures(grid: Grid, known: Discrepancies) -> List[Step]:
    """What is to be measured, and the trainings that it takes."""
    steps = [
        Measure(grid.first(grid.discrepancy['student']), grid.first(name))
        for name in grid.teachers
    ]
    missing = [step for step in steps if step not in known]
    needs = [need for step in missing for need in step.needs]
    return list(dict.fromkeys(needs + missing))


def left(steps: Iterable[Step], display: GridDisplay) -> List[Step]:
    """The steps that are not done; what is done already is written down."""
    for step in steps:
        if step.done:
            display.keep(step)
    return [step for step in steps if not step.done]


def carry_on(grid: Grid, args: argparse.Namespace, display: GridDisplay,
             lock: int) -> List[str]:
    """First what is known, then what takes the best of a sweep.

    Measurements are taken as soon as their models are trained.

    Returns:
        list[str]: What failed.
    """
    results, failures = display.results, []
    stages = (lambda: measures(grid, display.discrepancies) + steps_of(
        grid.plain_runs(), results),
              lambda: steps_of(grid.best_runs(results), results))
    for stage in stages:
        with display.status:
            failures += carry_out(
                left(dict.fromkeys(stage()), display),
                display,
                lock,
                args.jobs,
                keep_going=True)
    return failures


def tell(grid: Grid, display: GridDisplay) -> None:
    """Say what is to be done, and do nothing."""
    steps = steps_of(grid.plain_runs(), display.results)
    steps += measures(grid, display.discrepancies)
    steps += steps_of(grid.best_runs(display.results), display.results)
    for step in dict.fromkeys(step for step in steps if not step.done):
        display.say(step.name)
    known = {run.name for run in grid.best_runs(display.results)}
    for name, entry in grid.runs.items():
        if 'best_of' in entry and name not in known:
            display.say(f'{name}: once the sweep {entry["best_of"]} is done')


def run_grid(grid: Grid, args: argparse.Namespace) -> None:
    """Do what is not done yet.

    Raises:
        SystemExit: If anything failed, once the rest has ended.
    """
    display = GridDisplay(Console(), args.results)
    if grid.scenes:
        out_dir = grid.scenes['out_dir']
        display.say(f'Digit scenes in {out_dir}')
        write_digit_scenes(**{**grid.scenes, 'out_dir': ROOT / out_dir})
    with locked(args.work_dir, display) as lock:
        # what another call has added while this one waited
        display = GridDisplay(display.console, args.results)
        failures = carry_on(grid, args, display, lock)
    display.say(f'{len(display.results.rows)} results in '
                f'{short(args.results)}')
    if failures:
        raise SystemExit('\n'.join(dict.fromkeys(failures)))


def main() -> None:
    args = parse_args()
    end_like_ctrl_c()
    grid = Grid(args.grid, args.work_dir)
    if args.dry_run:
        tell(grid, GridDisplay(Console(), args.results))
    else:
        run_grid(grid, args)


if __name__ == '__main__':
    run_tool(main)
