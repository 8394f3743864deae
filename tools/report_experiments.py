"""Write a page of what the experiments gave: tables, figures, conclusions.

The numbers are those of the CSV files that ``tools/run_experiments.py``
writes, the words those of the grids.
"""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

import pandas as pd
from experiments.discrepancy import Measure
from experiments.grid import Grid, describe
from experiments.results import Discrepancies, Results
from experiments.steps import ROOT
from matplotlib.figure import Figure

from mmdist.utils import run_tool

HEAD = """# Results

*Measured here*: every metric on this page is of a training by
`tools/train.py` that `tools/run_experiments.py` ran, and is kept, seed by
seed, in a CSV file that is named with the tables. The page is written by
`tools/report_experiments.py`. Means are over the seeds, whose number is in
brackets; ± is the standard deviation of one run (n - 1). A gain is the mean
of the differences from the baseline with the same seed, which draws the same
initial weights and order of pictures; ± is the deviation of one difference.
Minutes are of one training, two at a time on two cores that other work shared.
"""
# What is shown of the discrepancy, of labelled rows.
MEASURES = ('kl', 'inter', 'intra', 'top-1 agreement')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        'grids',
        nargs='*',
        type=Path,
        help='default: all of tools/experiments/grids')
    parser.add_argument(
        '--results',
        type=Path,
        default=ROOT / 'docs' / 'en' / 'results',
        help='folder of the files GRID.csv (default: docs/en/results)')
    parser.add_argument(
        '--out', type=Path, default=ROOT / 'docs' / 'en' / 'results.md')
    args = parser.parse_args()
    args.grids = args.grids or sorted(
        (ROOT / 'tools' / 'experiments' / 'grids').glob('*.py'))
    return args


class Report:
    """The part of the page about one grid.

    Args:
        path (Path): The grid.
        folder (Path): Of its CSV files, and of figures.
        page (Path): What is written, for links.
    """

    def __init__(self, path: Path, folder: Path, page: Path) -> None:
        self.page = page
        self.grid, self.folder = Grid(path, ROOT / 'work_dirs'), folder
        self.results = Results(folder / f'{path.stem}.csv')
        self.known = Discrepancies(folder / f'{path.stem}_discrepancy.csv')
        self.runs = [
            *self.grid.plain_runs(), *self.grid.best_runs(self.results)
        ]
        self.field = 'test' if self.grid.test else 'metric'
        self.gain_title = 'gain, test split' if self.grid.test else 'gain'

    def link(self, name: str) -> str:
        """A file of the folder, as the page names it."""
        return os.path.relpath(self.folder / name, self.page.parent)

    def refuse_other_rows(self) -> None:
        """Raise ValueError if the results are of another grid."""
        if not any(run in self.results for run in self.runs):
            raise ValueError(
                f'{self.results.path} has no result of a run that '
                f'{self.grid.name} declares now; train them again, or take '
                'back what was changed in the grid or its configs')

    def rows_of(self, name: str) -> pd.DataFrame:
        """The results of a run by its name."""
        return self.results.of(run for run in self.runs if run.name == name)

    def mean(self, rows: pd.DataFrame, field: str) -> str:
        """For example '0.512 ± 0.004 (5)'."""
        show, values = self.grid.metric.show, rows[field].dropna()
        if values.empty:
            return ''
        spread = f' ± {show(values.std())}' if len(values) > 1 else ''
        return f'{show(values.mean())}{spread} ({len(values)})'

    def baseline_of(self, name: str) -> Optional[str]:
        """The run over which a run gains; None if it is not declared."""
        return self.grid.runs.get(name, {}).get('baseline')

    def baselines(self) -> Iterator[str]:
        """Say what gains are over; of most runs first."""
        runs: Dict[str, List[str]] = {}
        for name in self.grid.runs:
            if self.baseline_of(name):
                runs.setdefault(self.baseline_of(name), []).append(name)
        most, *others = sorted(runs, key=lambda b: -len(runs[b])) or [None]
        if most:
            yield '; '.join([f'Gains are over *{most}*'] + [
                f'those of *{"*, *".join(runs[name])}* over *{name}*'
                for name in others
            ]) + '.'

    def gain(self, name: str) -> str:
        """For example '+0.025 ± 0.019 (5)'; empty without a baseline."""
        baseline = self.baseline_of(name)
        if baseline is None:
            return ''
        own, base = (
            self.rows_of(run).set_index('seed')[self.field]
            for run in (name, baseline))
        gains = (own - base).dropna().rename('gain').to_frame()
        mean = self.mean(gains, 'gain')
        return mean if mean.startswith('-') or not mean else f'+{mean}'

    def main_runs(self) -> List[str]:
        """The runs that are not in the table of teachers."""
        elsewhere = {
            pattern.format(teacher)
            for teacher in self.grid.teachers
            for pattern in self.taught.values()
        }
        return [
            name for name in self.grid.runs
            if name not in elsewhere and name not in self.grid.teachers
        ]

    @property
    def taught(self) -> Dict[str, str]:
        """What is said of students by teacher, and the pattern of names."""
        return self.grid.discrepancy.get('taught', {})

    def main_table(self) -> pd.DataFrame:
        """A row a run."""
        table = []
        for name in self.main_runs():
            rows = self.rows_of(name)
            if rows.empty:
                continue
            row = {
                'run': name,
                self.grid.metric.title: self.mean(rows, 'metric')
            }
            if self.grid.test:
                row['test split'] = self.mean(rows, 'test')
            if any(map(self.baseline_of, self.main_runs())):
                row[self.gain_title] = self.gain(name)
            row['minutes'] = f'{rows.minutes.mean():.1f}'
            row['options'] = self.options_of(name)
            table.append(row)
        return pd.DataFrame(table)

    def teacher_table(self) -> pd.DataFrame:
        """A row a teacher: its metric, the discrepancy, its students."""
        table = []
        for teacher in self.grid.teachers:
            row = dict(teacher=teacher)
            row['its ' + self.grid.metric.title] = self.mean(
                self.rows_of(teacher), 'metric')
            measured = self.measured(teacher)
            for name in MEASURES:
                row[name] = f'{measured[name]:.3f}' if measured else ''
            for title, pattern in self.taught.items():
                name = pattern.format(teacher)
                row[title] = self.mean(self.rows_of(name), self.field)
                if self.baseline_of(name):
                    row[f'{title}, {self.gain_title}'] = self.gain(name)
            table.append(row)
        return pd.DataFrame(table)

    def options_of(self, name: str) -> str:
        """The options of a run, for its table."""
        return describe(next(r for r in self.runs if r.name == name).declared)

    def measured(self, teacher: str) -> Dict[str, Any]:
        """The discrepancy of a teacher from the student alone."""
        student = self.grid.first(self.grid.discrepancy['student'])
        return self.known.of(Measure(student, self.grid.first(teacher)))

    def sweep_table(self, sweep: str) -> pd.DataFrame:
        """The metric of each member, a column a value of the last option."""
        members = self.grid.members(sweep)
        means = self.results.means(members)
        table: Dict[str, Dict[str, str]] = {}
        for run in members:
            if run.key in means:
                *others, last = run.declared.items()
                row, column = describe(dict(others)), describe(dict([last]))
                table.setdefault(row, {'options': row})[column] = \
                    self.grid.metric.show(means[run.key])
        return pd.DataFrame(list(table.values()))

    def text(self) -> Iterator[str]:
        """The paragraphs."""
        yield f'## {self.grid.title}'
        yield self.grid.about.strip()
        yield markdown(self.main_table())
        yield from self.baselines()
        yield (f'Every training: [{self.results.path.name}]'
               f'({self.link(self.results.path.name)}).')
        if self.draw_runs():
            yield f'![runs]({self.link(self.grid.name)}.png)'
        for sweep in self.grid.sweeps:
            table = self.sweep_table(sweep)
            if len(table):
                yield (f'The sweep of {sweep.upper()}, '
                       f'{self.grid.metric.title}:')
                yield markdown(table)
        if self.grid.teachers:
            yield from self.text_of_teachers()
        yield self.grid.conclusion.strip()

    def text_of_teachers(self) -> Iterator[str]:
        """The table and the figure of teachers."""
        yield ('Stronger teachers, and how far the student that was trained '
               'alone (its first seed) is from each on rows with a label:')
        yield markdown(self.teacher_table())
        if self.known.path.exists():
            yield (f'By groups of rows: [{self.known.path.name}]'
                   f'({self.link(self.known.path.name)}).')
        if self.draw_teachers():
            yield f'![teachers]({self.link(self.grid.name)}_teachers.png)'

    def draw_runs(self) -> bool:
        """A point a seed and a line for the mean, a row a run."""
        found = {name: self.rows_of(name) for name in self.main_runs()}
        found = {k: v[self.field].dropna() for k, v in found.items()}
        found = {k: v for k, v in found.items() if len(v)}
        if not found:
            return False
        figure, axes = new_figure(7, 1 + 0.35 * len(found))
        for i, values in enumerate(found.values()):
            axes.plot(values, [i] * len(values), 'o', color=f'C{i}', alpha=0.6)
            axes.plot(values.mean(), i, '|', color=f'C{i}', markersize=18)
        axes.set_yticks(range(len(found)), found)
        axes.invert_yaxis()
        split = ', test split' if self.grid.test else ''
        axes.set(xlabel=f'{self.grid.metric.title}, {self.grid.title}{split}')
        axes.grid(axis='x', alpha=0.3)
        figure.savefig(self.folder / f'{self.grid.name}.png', dpi=110)
        return True

    def points(self, measure: str,
               pattern: str) -> List[Tuple[float, float, float]]:
        """Of each teacher a measure, the mean and the deviation of what its
        students reach, by the measure."""
        points = []
        for teacher in self.grid.teachers:
            found = self.measured(teacher)
            values = self.rows_of(pattern.format(teacher)).metric
            if found and len(values):
                points.append((found[measure], values.mean(), values.std()))
        return sorted(points)

    def draw_teachers(self) -> bool:
        """The students' metric by the discrepancy of their teachers."""
        known = [t for t in self.grid.teachers if self.measured(t)]
        if not known or not self.taught:
            return False
        figure, panels = new_figure(12, 4, len(MEASURES))
        for axes, name in zip(panels, MEASURES):
            for title, pattern in self.taught.items():
                points = self.points(name, pattern)
                if points:
                    axes.errorbar(
                        *zip(*points), fmt='o-', capsize=3, label=title)
            axes.set(xlabel=name)
            axes.grid(alpha=0.3)
        panels[0].set(ylabel=self.grid.metric.title)
        panels[0].legend()
        figure.savefig(self.folder / f'{self.grid.name}_teachers.png', dpi=110)
        return True


def new_figure(width: float, height: float, panels: int = 1) -> Any:
    """A figure and its axes."""
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(1, panels, sharey=True)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    cells = [list(table), ['---'] * len(table.columns)]
    cells += table.fillna('').values.tolist()
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in cells)


def main() -> None:
    args = parse_args()
    parts = [HEAD.strip()]
    for path in args.grids:
        report = Report(path, args.results, args.out)
        if not len(report.results.rows):
            print(f'{report.results.path} has no results yet: left out')
            continue
        report.refuse_other_rows()
        parts += [part for part in report.text() if part]
    args.out.write_text('\n\n'.join(parts) + '\n')
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
