"""Train the runs that a grid declares, and write down what each reaches.

Every run is a call of ``tools/train.py``, several at a time. Results go to a
CSV file after each; a second call does what is not in it, and resumes what
was interrupted. ``tools/report_experiments.py`` makes tables and figures.
"""
import argparse
import json
import subprocess
from pathlib import Path
from typing import Any, List

from experiments.grid import (DISCREPANCIES, RESULTS, Grid, GridRun, Measure,
                              Table)
from experiments.runs import ROOT, Crew, end_like_ctrl_c, short, versions
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

    def keep(self, job: Any) -> None:
        """Write the result of a run or of a measurement that is done."""
        if isinstance(job, Measure):
            names = dict(
                student=job.student.name,
                teacher=job.teacher.name,
                key=job.key)
            self.discrepancies.add(
                *(dict(names, group=group, **values)
                  for group, values in job.groups().items()))
        elif job not in self.runs:
            self.runs.add(result_of(job))


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
        test=run.tested() if run.tests else None,
        minutes=round(run.seconds / 60, 2),
        options=json.dumps(run.declared),
        key=run.key,
        commit=commit.stdout.strip(),
        versions=' '.join(versions()))


def jobs_left(grid: Grid, results: Results) -> List[Any]:
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


def tell(grid: Grid, results: Results, crew: Crew) -> None:
    """Say what is to be done, and do nothing."""
    for job in jobs_left(grid, results):
        if not job.done:
            crew.say(f'train {job.label}' if isinstance(job, GridRun) else job.
                     label)
    for name, entry in grid.runs.items():
        if not grid.of(name, results.runs):
            crew.say(f'{name}: once the sweep {entry["best_of"]} is done')


def run_grid(grid: Grid, results: Results, crew: Crew) -> None:
    """Do what is not done yet, and then what takes the best of a sweep.

    Raises:
        SystemExit: If anything failed, once the rest has ended.
    """

    def ended(job: Any) -> None:
        results.keep(job)
        if isinstance(job, GridRun):
            crew.say(f'{job.label}: {job.metric.title} '
                     f'{job.metric.show(job.validated())}')

    failures = []
    with crew.locked(grid.work_dir):
        if grid.scenes:
            out_dir = grid.scenes['out_dir']
            crew.say(f'Digit scenes in {out_dir}')
            write_digit_scenes(**{**grid.scenes, 'out_dir': ROOT / out_dir})
        for _ in range(2):
            jobs = jobs_left(grid, results)
            for job in jobs:
                if job.done:
                    results.keep(job)
            failures += crew.carry_out(jobs, keep_going=True, ended=ended)
    crew.say(f'{len(results.runs.rows)} results in '
             f'{short(results.runs.path)}')
    if failures:
        raise SystemExit('\n'.join(dict.fromkeys(failures)))


def main() -> None:
    args = parse_args()
    end_like_ctrl_c()
    grid, results = Grid(args.grid, args.work_dir), Results(args.results)
    crew = Crew(Console(), args.jobs, epochs=False)
    if args.dry_run:
        tell(grid, results, crew)
    else:
        run_grid(grid, results, crew)


if __name__ == '__main__':
    run_tool(main)
