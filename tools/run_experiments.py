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
from experiments.steps import ROOT, Display, Step, carry_out, locked, short
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
        '--results', type=Path, help='default: docs/en/results/GRID.csv')
    parser.add_argument(
        '--jobs', type=int, default=2, help='trainings at a time (default: 2)')
    parser.add_argument(
        '--dry-run', action='store_true', help='say what is to be done')
    args = parser.parse_args()
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
        run = step.run
        if isinstance(step, Measure):
            self.discrepancies.add(step)
        elif step is run.steps[-1] and run not in self.results:
            self.results.add(run)
            self.say(f'{run.label}: {run.metric.title} '
                     f'{run.metric.show(run.validated())}')


def measures(grid: Grid, known: Discrepancies) -> List[Step]:
    """What is to be measured, and the trainings that it takes."""
    if not grid.discrepancy:
        return []
    student = grid.first(grid.discrepancy['student'])
    steps = [
        Measure(student, grid.first(name))
        for name in grid.discrepancy['teachers']
    ]
    missing = [step for step in steps if step not in known]
    needs = [need for step in missing for need in step.needs]
    return list(dict.fromkeys(needs + missing))


def steps_of(runs: Iterable[GridRun], results: Results) -> List[Step]:
    """What is to be done for the runs without results, teachers first."""
    # one of several that train the same
    missing = {
        (run.key, run.seed): run
        for run in runs if run not in results
    }.values()
    teachers = {run.teacher: None for run in missing if run.teacher}
    steps = [teacher.train for teacher in teachers]
    steps += [step for run in missing for step in run.steps]
    return list(dict.fromkeys(steps))


def carry_on(grid: Grid, args: argparse.Namespace, display: GridDisplay,
             lock: int) -> None:
    """First what is known, then what takes the best of a sweep."""
    results = display.results
    stages = (lambda: steps_of(grid.plain_runs(), results),
              lambda: measures(grid, display.discrepancies),
              lambda: steps_of(grid.best_runs(results), results))
    for stage in stages:
        steps = stage()
        if args.dry_run:
            for step in steps:
                display.say(step.name)
        else:
            with display.status:
                carry_out(steps, display, lock, args.jobs, keep_going=True)


def main() -> None:
    args = parse_args()
    grid = Grid(args.grid, args.work_dir)
    display = GridDisplay(Console(), args.results)
    if grid.scenes:
        display.say(f'Digit scenes in {grid.scenes["out_dir"]}')
        write_digit_scenes(
            **{
                **grid.scenes, 'out_dir': ROOT / grid.scenes['out_dir']
            })
    with locked(args.work_dir, display) as lock:
        carry_on(grid, args, display, lock)
    display.say(f'{len(display.results.rows)} results in '
                f'{short(args.results)}')


if __name__ == '__main__':
    run_tool(main)
