"""Train the runs that a grid declares, and write down what each reaches.

Every run is a call of ``tools/train.py``, several at a time. Results go to a
CSV file after each; a second call does what is not in it, and resumes what
was interrupted. ``tools/report_experiments.py`` makes tables and figures.
"""
import argparse
from pathlib import Path
from typing import List

from experiments.grid import DISCREPANCIES, RESULTS, Grid, GridRun, Job, Table
from experiments.runs import ROOT, Crew, end_like_ctrl_c, short
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


class Results:
    """The CSV files of a grid: results of runs, and discrepancies."""

    def __init__(self, path: Path) -> None:
        self.runs = Table(path, RESULTS)
        self.discrepancies = Table(
            path.with_name(f'{path.stem}_discrepancy.csv'), DISCREPANCIES)

    def table(self, job: Job) -> Table:
        """The table that holds the rows of a job."""
        return self.runs if isinstance(job, GridRun) else self.discrepancies

    def keep(self, job: Job) -> None:
        """Write the rows of a job that is done."""
        if job not in self.table(job):
            self.table(job).add(*job.rows())


def jobs_left(grid: Grid, results: Results) -> List[Job]:
    """The measurements and runs without a result, after what they need.

    Of runs that train the same the first is taken.
    """
    missing = {}
    for run in grid.all(results.runs):
        if run not in results.runs:
            missing.setdefault((run.key, run.seed), run)
    measures = [m for m in grid.measures() if m not in results.discrepancies]
    jobs = [need for measure in measures for need in measure.needs] + measures
    jobs += [run.teacher for run in missing.values() if run.teacher]
    return list(dict.fromkeys([*jobs, *missing.values()]))


def main() -> None:
    args = parse_args()
    end_like_ctrl_c()
    grid, results = Grid(args.grid, args.work_dir), Results(args.results)
    crew = Crew(Console(), args.jobs)
    if args.dry_run:
        for job in jobs_left(grid, results):
            if not job.done:
                train = 'train ' if isinstance(job, GridRun) else ''
                crew.say(f'{train}{job.label}')
        for name, entry in grid.runs.items():
            if not grid.of(name, results.runs):
                crew.say(f'{name}: once the sweep {entry["best_of"]} is done')
        return
    failures = []
    with crew.locked(grid.work_dir):
        if grid.scenes:
            crew.say(f'Digit scenes in {grid.scenes["out_dir"]}')
            write_digit_scenes(
                **{
                    **grid.scenes, 'out_dir': ROOT / grid.scenes['out_dir']
                })
        for _ in range(2):  # then what takes the best of a sweep
            jobs = jobs_left(grid, results)
            for job in jobs:
                if job.done:
                    results.keep(job)
            failures += crew.carry_out(jobs, results.keep)
    crew.say(f'{len(results.runs.rows)} results in '
             f'{short(results.runs.path)}')
    if failures:
        raise SystemExit('\n'.join(dict.fromkeys(failures)))


if __name__ == '__main__':
    run_tool(main)
