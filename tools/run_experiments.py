"""Train the runs that a grid declares, and write down what each reaches.

Every run is a call of ``tools/train.py``, several at a time. Results go to a
CSV file after each; a second call does what is not in it, and resumes what
was interrupted. ``tools/report_experiments.py`` makes tables and figures.
"""
import argparse
from pathlib import Path
from typing import List

from experiments.grid import Grid, GridRun, Table
from experiments.runs import (ROOT, carry_out, end_like_ctrl_c, locked, say,
                              short)

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


def runs_left(grid: Grid, results: Table) -> List[GridRun]:
    """The runs without a result, after the teachers that they need.

    Of runs that train the same the first is taken.
    """
    missing = {}
    for run in grid.all():
        if run not in results:
            missing.setdefault(run.id, run)
    teachers = [run.teacher for run in missing.values() if run.teacher]
    return list(dict.fromkeys([*teachers, *missing.values()]))


def main() -> None:
    args = parse_args()
    end_like_ctrl_c()
    results = Table(args.results)
    grid = Grid(args.grid, args.work_dir, results)
    if args.dry_run:
        for run in runs_left(grid, results):
            if not run.done:
                say(f'train {run.label}')
        for name, entry in grid.runs.items():
            if not grid.of(name):
                say(f'{name}: once the sweep {entry["best_of"]} is done')
        return
    failures = []
    with locked(grid.work_dir):
        if grid.scenes:
            folder = grid.scenes['out_dir']
            say(f'Digit scenes in {folder}')
            write_digit_scenes(**dict(grid.scenes, out_dir=ROOT / folder))
        for _ in range(2):  # then what takes the best of a sweep
            runs = runs_left(grid, results)
            for run in runs:
                if run.done:
                    results.keep(run)
            failures += carry_out(runs, args.jobs, results.keep)
    say(f'{len(results.rows)} results in {short(args.results)}')
    if failures:
        raise SystemExit('\n'.join(dict.fromkeys(failures)))


if __name__ == '__main__':
    run_tool(main)
