"""Train the runs that a grid declares, and write down what each reaches.

Every run is a call of ``tools/train.py``, several at a time. Results go to a
CSV file after each; a second call does what is not in it, and resumes what
was interrupted. ``tools/report_experiments.py`` makes tables and figures.
"""
import argparse
import json
import subprocess
from pathlib import Path
from typing import List

from experiments.grid import (DISCREPANCIES, RESULTS, Grid, GridRun, Measure,
                              Table)
from experiments.steps import (ROOT, Display, Step, carry_out, end_like_ctrl_c,
                               locked, short, versions)
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
    """Tells of steps that end, and writes their results to files."""

    def __init__(self, console: Console, path: Path) -> None:
        super().__init__(console, epochs=False)
        self.results = Table(path, RESULTS)
        self.discrepancies = Table(
            path.with_name(f'{path.stem}_discrepancy.csv'), DISCREPANCIES)

    def end(self, step: Step) -> None:
        """Tell of a step that has ended well, and keep its result."""
        super().end(step)
        self.keep(step)

    def keep(self, step: Step) -> None:
        """Write the result of a measurement, or of a run's last step."""
        if isinstance(step, Measure):
            names = dict(
                student=step.student.name,
                teacher=step.teacher.name,
                key=step.key)
            self.discrepancies.add(
                *(dict(names, group=group, **values)
                  for group, values in step.output().items()))
        elif step is step.run.steps[-1] and step.run not in self.results:
            self.results.add(result_of(step.run))
            self.say(f'{step.run.label}: {step.run.metric.title} '
                     f'{step.run.metric.show(step.run.validated())}')


def result_of(run: GridRun) -> dict:
    """The row of a run that is done."""
    commit = subprocess.run(
        'git describe --always --dirty',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True)
    return dict(
        run=run.name,
        seed=run.seed,
        metric=run.validated(),
        test=run.test.output() if run.test in run.steps else None,
        minutes=round(run.train.seconds / 60, 2),
        options=json.dumps(run.declared),
        key=run.key,
        commit=commit.stdout.strip(),
        versions=' '.join(versions()))


def steps_left(grid: Grid, display: GridDisplay) -> List[Step]:
    """The measurements and runs without a result, after what they need.

    Of runs that train the same the first is taken.
    """
    missing = {}
    for run in grid.all(display.results):
        if run not in display.results:
            missing.setdefault((run.key, run.seed), run)
    measures = [m for m in grid.measures() if m not in display.discrepancies]
    steps = [need for step in measures for need in step.needs] + measures
    steps += [run.teacher.train for run in missing.values() if run.teacher]
    steps += [step for run in missing.values() for step in run.steps]
    return list(dict.fromkeys(steps))


def tell(grid: Grid, display: GridDisplay) -> None:
    """Say what is to be done, and do nothing."""
    for step in steps_left(grid, display):
        if not step.done:
            display.say(step.name)
    for name, entry in grid.runs.items():
        if not grid.of(name, display.results):
            display.say(f'{name}: once the sweep {entry["best_of"]} is done')


def run_grid(grid: Grid, args: argparse.Namespace, console: Console) -> None:
    """Do what is not done yet, and then what takes the best of a sweep.

    Raises:
        SystemExit: If anything failed, once the rest has ended.
    """
    failures = {}
    with locked(args.work_dir, Display(console)) as lock:
        display = GridDisplay(console, args.results)
        if grid.scenes:
            out_dir = grid.scenes['out_dir']
            display.say(f'Digit scenes in {out_dir}')
            write_digit_scenes(**{**grid.scenes, 'out_dir': ROOT / out_dir})
        for _ in range(2):
            steps = steps_left(grid, display)
            for step in steps:
                step.run.folder.parent.mkdir(parents=True, exist_ok=True)
                step.run.cfg.dump(step.run.config)
                if step.done:
                    display.keep(step)
            with display.status:
                failures.update(
                    dict.fromkeys(
                        carry_out(
                            steps, display, lock, args.jobs, keep_going=True)))
    display.say(f'{len(display.results.rows)} results in '
                f'{short(args.results)}')
    if failures:
        raise SystemExit('\n'.join(failures))


def main() -> None:
    args = parse_args()
    end_like_ctrl_c()
    grid = Grid(args.grid, args.work_dir)
    if args.dry_run:
        tell(grid, GridDisplay(Console(), args.results))
    else:
        run_grid(grid, args, Console())


if __name__ == '__main__':
    run_tool(main)
