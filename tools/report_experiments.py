"""Write the tables and figures of experiments into a page.

The numbers are those of the CSV files that ``tools/run_experiments.py``
writes. In the page they stand between two comments that name the grid; the
words around them are written by hand and stay. A grid without such comments
gets a section at the end of the page.
"""
import argparse
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pandas as pd
from experiments.grid import (DISCREPANCIES, RESULTS, Grid, Measure, Table,
                              describe)
from experiments.steps import ROOT
from matplotlib.figure import Figure

from mmdist.utils import run_tool

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
    """The tables and figures of one grid.

    Args:
        path (Path): The grid.
        folder (Path): The folder of its CSV files, and of figures.
        page (Path): The page, for links.
    """

    def __init__(self, path: Path, folder: Path, page: Path) -> None:
        self.folder, self.links = folder, os.path.relpath(folder, page.parent)
        self.grid = grid = Grid(path, ROOT / 'work_dirs')
        self.results = Table(folder / f'{path.stem}.csv', RESULTS)
        self.known = Table(folder / f'{path.stem}_discrepancy.csv',
                           DISCREPANCIES)
        # by run: a row for each seed
        self.rows = {
            name: self.results.of(*grid.of(name, self.results))
            for name in grid.entries
        }
        if len(self.results.rows) and not any(map(len, self.rows.values())):
            raise ValueError(
                f'{self.results.path} has no result of a run that {grid.name} '
                'declares now; train them again, or take back what was '
                'changed in the grid or its configs')
        self.baseline = {
            name: entry['baseline']
            for name, entry in grid.runs.items() if entry.get('baseline')
        }
        elsewhere = [
            pattern.format(teacher) for teacher in grid.teachers
            for pattern in grid.taught.values()
        ]
        self.main_runs = [
            name for name in grid.runs if len(self.rows[name])
            and name not in elsewhere and name not in grid.teachers
        ]
        self.measured = {}
        for teacher in grid.teachers:
            found = self.known.of(
                Measure(grid.first(grid.student), grid.first(teacher)))
            found = found[found.group == 'foreground']
            if len(found):
                self.measured[teacher] = found.iloc[-1]
        self.field = 'test' if grid.test else 'metric'
        self.gain_title = 'gain, test split' if grid.test else 'gain'

    def mean(self, values: pd.Series) -> str:
        """For example '0.512 ± 0.004 (5)'."""
        show, values = self.grid.metric.show, values.dropna()
        if values.empty:
            return ''
        spread = f' ± {show(values.std())}' if len(values) > 1 else ''
        return f'{show(values.mean())}{spread} ({len(values)})'

    def gain(self, name: str) -> str:
        """For example '+0.025 ± 0.019 (5)'; empty without a baseline."""
        if name not in self.baseline:
            return ''
        own, base = (
            self.rows[run].set_index('seed')[self.field].astype(float)
            for run in (name, self.baseline[name]))
        mean = self.mean(own - base)
        return mean if mean.startswith('-') or not mean else f'+{mean}'

    def main_table(self) -> pd.DataFrame:
        """The runs that are not in the table of teachers."""
        table = []
        for name in self.main_runs:
            rows = self.rows[name]
            row = {'run': name, self.grid.metric.title: self.mean(rows.metric)}
            if self.grid.test:
                row['test split'] = self.mean(rows.test)
            if set(self.baseline) & set(self.main_runs):
                row[self.gain_title] = self.gain(name)
            row['minutes'] = f'{rows.minutes.mean():.1f}'
            row['options'] = describe(
                self.grid.of(name, self.results)[0].declared)
            table.append(row)
        return pd.DataFrame(table)

    def baselines(self) -> str:
        """A sentence about what gains are over; of most runs first."""
        names = pd.Series(self.baseline, dtype=object)
        most, *others = names.value_counts().index
        return '; '.join([f'Gains are over *{most}*'] + [
            f'those of *{"*, *".join(names.index[names == name])}* over '
            f'*{name}*' for name in others
        ]) + '.'

    def sweep_table(self, sweep: str) -> pd.DataFrame:
        """The metric of each member, a column a value of the last option."""
        table: Dict[str, Dict[str, str]] = {}
        for name, entry in self.grid.members[sweep]:
            if len(self.rows[name]):
                *others, last = entry['options'].items()
                row = describe(dict(others))
                table.setdefault(row, {'options': row})[describe(dict([
                    last
                ]))] = self.grid.metric.show(self.rows[name].metric.mean())
        return pd.DataFrame(list(table.values()))

    def teacher_table(self) -> pd.DataFrame:
        """The metric of each teacher, the discrepancy, and its students."""
        table = []
        for teacher in self.grid.teachers:
            row = {
                'teacher':
                teacher,
                f'its {self.grid.metric.title}':
                self.mean(self.rows[teacher].metric)
            }
            measured = self.measured.get(teacher)
            for name in MEASURES:
                row[name] = '' if measured is None else f'{measured[name]:.3f}'
            for title, pattern in self.grid.taught.items():
                name = pattern.format(teacher)
                row[title] = self.mean(self.rows[name][self.field])
                if name in self.baseline:
                    row[f'{title}, {self.gain_title}'] = self.gain(name)
            table.append(row)
        return pd.DataFrame(table)

    def text(self) -> Iterator[str]:
        """The paragraphs; figures are drawn as they are mentioned."""
        grid, links = self.grid, self.links
        if self.main_runs:
            yield markdown(self.main_table())
            if self.baseline:
                yield self.baselines()
        yield (f'Every training: [{grid.name}.csv]({links}/{grid.name}.csv).')
        if self.main_runs:
            self.draw_runs(self.folder / f'{grid.name}.png')
            yield f'![runs]({links}/{grid.name}.png)'
        for sweep in grid.sweeps:
            table = self.sweep_table(sweep)
            if len(table):
                yield f'The sweep of {sweep.upper()}, {grid.metric.title}:'
                yield markdown(table)
        if grid.teachers:
            yield ('Stronger teachers, and how far the student that was '
                   'trained alone (its first seed) is from each on rows with '
                   'a label:')
            yield markdown(self.teacher_table())
        if self.measured:
            name = self.known.path.name
            yield f'By groups of rows: [{name}]({links}/{name}).'
        if self.measured and grid.taught:
            self.draw_teachers(self.folder / f'{grid.name}_teachers.png')
            yield f'![teachers]({links}/{grid.name}_teachers.png)'

    def draw_runs(self, path: Path) -> None:
        """A point a seed and a line for the mean, a row a run."""
        figure, axes = new_figure(7, 1 + 0.35 * len(self.main_runs))
        for i, name in enumerate(self.main_runs):
            values = self.rows[name][self.field].dropna()
            axes.plot(values, [i] * len(values), 'o', color=f'C{i}', alpha=0.6)
            axes.plot(values.mean(), i, '|', color=f'C{i}', markersize=18)
        axes.set_yticks(range(len(self.main_runs)), self.main_runs)
        axes.invert_yaxis()
        split = ', test split' if self.grid.test else ''
        axes.set(xlabel=f'{self.grid.metric.title}, {self.grid.title}{split}')
        axes.grid(axis='x', alpha=0.3)
        figure.savefig(path, dpi=110)

    def draw_teachers(self, path: Path) -> None:
        """The students' metric by the discrepancy of their teachers."""
        figure, panels = new_figure(12, 4, len(MEASURES))
        for axes, measure in zip(panels, MEASURES):
            for title, pattern in self.grid.taught.items():
                points = sorted(
                    (found[measure], values.mean(), values.std())
                    for teacher, found in self.measured.items() if len(
                        values := self.rows[pattern.format(teacher)].metric))
                if points:
                    axes.errorbar(
                        *zip(*points), fmt='o-', capsize=3, label=title)
            axes.set(xlabel=measure)
            axes.grid(alpha=0.3)
        panels[0].set(ylabel=self.grid.metric.title)
        panels[0].legend()
        figure.savefig(path, dpi=110)


def new_figure(width: float, height: float, panels: int = 1) -> Any:
    """A figure and its axes."""
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(1, panels, sharey=True)


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown."""
    cells: List[list] = [list(table), ['---'] * len(table.columns)]
    cells += table.fillna('').values.tolist()
    return '\n'.join('| ' + ' | '.join(map(str, row)) + ' |' for row in cells)


def put(page: str, report: Report) -> str:
    """The page with the tables and figures of a grid."""
    name, body = report.grid.name, '\n\n'.join(report.text())
    begin, end = f'<!-- {name}: generated -->', f'<!-- {name}: end -->'
    if begin not in page:
        page += f'\n## {report.grid.title}\n\n{begin}\n{end}\n'
    return re.sub(
        f'{begin}.*?{end}',
        lambda _: f'{begin}\n\n{body}\n\n{end}',
        page,
        flags=re.DOTALL)


def main() -> None:
    args = parse_args()
    page = args.out.read_text() if args.out.exists() else '# Results\n'
    for path in args.grids:
        report = Report(path, args.results, args.out)
        if len(report.results.rows):
            page = put(page, report)
        else:
            print(f'{report.results.path} has no results yet: left out')
    args.out.write_text(page)
    print(f'Wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
