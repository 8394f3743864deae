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
from typing import Dict, Iterable, Iterator, List

import pandas as pd
from experiments.grid import DISCREPANCIES, RESULTS, Grid, Table, describe
from experiments.runs import ROOT
from matplotlib.figure import Figure
from scipy import stats

from mmdist.errors import ConfigError
from mmdist.utils import markdown_table, run_tool

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
        self.grid = grid = Grid(path, ROOT / 'work_dirs')
        self.folder, self.links = folder, os.path.relpath(folder, page.parent)
        self.results = results = Table(folder / f'{grid.name}.csv', RESULTS)
        self.field, self.split = 'metric', ''
        if grid.test:
            self.field, self.split = 'test', ', test split'
        rows = pd.concat([
            results.of(*grid.of(name, results)).assign(run=name)
            for name in grid.entries
        ])
        if len(results.rows) and not len(rows):
            raise ConfigError(
                '--results', f'{results.path} has no result of a run that '
                f'{grid.name} declares now', 'train them again, or take back '
                'what was changed in the grid or its configs')
        rows = rows.astype(dict(metric=float, test=float, minutes=float))
        self.rows = rows = rows.set_index(['run', 'seed'], drop=False)
        self.baseline = pd.Series(
            {
                name: entry.get('baseline')
                for name, entry in grid.runs.items()
            },
            dtype=object).dropna()
        # paired by seed
        base = pd.MultiIndex.from_arrays(
            [rows.run.map(self.baseline), rows.seed])
        rows['gain'] = rows[self.field] - rows[self.field].reindex(
            base).to_numpy()
        elsewhere = grid.teachers + [
            pattern.format(teacher) for teacher in grid.teachers
            for pattern in grid.taught.values()
        ]
        self.main_runs = [
            name for name in grid.runs
            if name in rows.index and name not in elsewhere
        ]
        known = Table(folder / f'{grid.name}_discrepancy.csv', DISCREPANCIES)
        names = {m.key: m.teacher.name for m in grid.measures()}
        found = known.of(*grid.measures())
        found = found[found.group == 'foreground'].assign(
            teacher=found.key.map(names))
        self.measured = found.drop_duplicates(
            'teacher', keep='last').set_index('teacher')

    def means(self, field: str, runs: Iterable[str]) -> List[str]:
        """For example '0.512 ± 0.004 (5)' for each run, '' without values."""
        show, texts = self.grid.metric.show, []
        for run in runs:
            values = self.rows[field][self.rows.run == run].dropna()
            spread = f' ± {show(values.std())}' if len(values) > 1 else ''
            text = f'{show(values.mean())}{spread} ({len(values)})'
            plus = '+' if field == 'gain' and text[0] != '-' else ''
            texts.append(plus + text if len(values) else '')
        return texts

    def intervals(self, runs: Iterable[str]) -> List[str]:
        """The 95 % interval of Student's t of each run's mean gain, bold where
        it excludes 0; '' for fewer than two pairs."""
        show, texts = self.grid.metric.show, []
        for run in runs:
            gains = self.rows.gain[self.rows.run == run].dropna()
            text = ''
            if len(gains) > 1:
                half = stats.t.ppf(0.975, len(gains) - 1) * gains.sem()
                low, high = gains.mean() - half, gains.mean() + half
                text = f'{show(low)} to {show(high)}'
                if low > 0 or high < 0:
                    text = f'**{text}**'
            texts.append(text)
        return texts

    def gains(self, runs: List[str], title: str) -> Dict[str, List[str]]:
        """A column of gains, where one of the runs has a baseline."""
        if self.baseline.index.isin(runs).any():
            return {f'{title}gain{self.split}': self.means('gain', runs)}
        return {}

    def main_table(self) -> List[Dict[str, str]]:
        """The runs that are not in the table of teachers."""
        names, grid = self.main_runs, self.grid
        minutes = self.rows.minutes.groupby(level='run').mean()
        table = {'run': names, grid.metric.title: self.means('metric', names)}
        if grid.test:
            table['test split'] = self.means('test', names)
        if self.gains(names, ''):
            table.update(self.gains(names, ''))
            table['gain, 95 % interval'] = self.intervals(names)
        table['minutes'] = [f'{minutes[name]:.1f}' for name in names]
        table['options'] = [
            describe(grid.of(name, self.results)[0].declared) for name in names
        ]
        return pd.DataFrame(table).to_dict('records')

    def teacher_table(self) -> List[Dict[str, str]]:
        """Each teacher's metric, discrepancy and students."""
        teachers = self.grid.teachers
        table = {
            'teacher': teachers,
            f'its {self.grid.metric.title}': self.means('metric', teachers)
        }
        for name in MEASURES:
            table[name] = self.measured[name].map('{:.3f}'.format).reindex(
                teachers, fill_value='')
        for title, pattern in self.grid.taught.items():
            names = [pattern.format(teacher) for teacher in teachers]
            table[title] = self.means(self.field, names)
            table.update(self.gains(names, f'{title}, '))
        return pd.DataFrame(table).to_dict('records')

    def sweep_table(self, sweep: str) -> List[Dict[str, str]]:
        """The metric of each member, a column a value of the last option."""
        table: Dict[str, Dict[str, str]] = {}
        for name, entry in self.grid.members[sweep]:
            if name in self.rows.index:
                *others, last = entry['options'].items()
                row, column = describe(dict(others)), describe(dict([last]))
                table.setdefault(row, {'options': row})[column] = \
                    self.grid.metric.show(self.rows.metric[name].mean())
        return list(table.values())

    def baselines(self) -> str:
        """A sentence about what gains are over; of most runs first."""
        names = self.baseline
        most, *others = names.value_counts().index
        return '; '.join([f'Gains are over *{most}*'] + [
            f'those of *{"*, *".join(names.index[names == name])}* over '
            f'*{name}*' for name in others
        ]) + '. A bold interval excludes 0: that gain is decided.'

    def text(self) -> Iterator[str]:
        """The paragraphs; figures are drawn as they are mentioned."""
        grid, place = self.grid, f'{self.links}/{self.grid.name}'
        if self.main_runs:
            yield markdown_table(self.main_table())
            if len(self.baseline):
                yield self.baselines()
        yield f'Every training: [{grid.name}.csv]({place}.csv).'
        if self.main_runs:
            self.draw_runs(self.folder / f'{grid.name}.png')
            yield f'![runs]({place}.png)'
        for sweep in grid.sweeps:
            table = self.sweep_table(sweep)
            if table:
                yield f'The sweep of {sweep.upper()}, {grid.metric.title}:'
                yield markdown_table(table, missing='')
        if grid.teachers:
            yield ('Stronger teachers, and how far the student that was '
                   'trained alone (its first seed) is from each on rows with '
                   'a label:')
            yield markdown_table(self.teacher_table())
        if len(self.measured):
            name = f'{grid.name}_discrepancy.csv'
            yield f'By groups of rows: [{name}]({self.links}/{name}).'
            if grid.taught:
                self.draw_teachers(self.folder / f'{grid.name}_teachers.png')
                yield f'![teachers]({place}_teachers.png)'

    def draw_runs(self, path: Path) -> None:
        """A point a seed and a line for the mean, a row a run."""
        figure = Figure((7, 1 + 0.35 * len(self.main_runs)),
                        layout='constrained')
        axes = figure.subplots()
        for i, name in enumerate(self.main_runs):
            values = self.rows[self.field][name].dropna()
            axes.plot(values, [i] * len(values), 'o', color=f'C{i}', alpha=0.6)
            axes.plot(values.mean(), i, '|', color=f'C{i}', markersize=18)
        axes.set_yticks(range(len(self.main_runs)), self.main_runs)
        axes.invert_yaxis()
        axes.set(xlabel=f'{self.grid.metric.title}, {self.grid.title}'
                 f'{self.split}')
        axes.grid(axis='x', alpha=0.3)
        figure.savefig(path, dpi=110)

    def draw_teachers(self, path: Path) -> None:
        """The students' metric by the discrepancy of their teachers."""
        figure = Figure((12, 4), layout='constrained')
        panels = figure.subplots(1, len(MEASURES), sharey=True)
        metric = self.rows.metric.groupby(level='run').agg(['mean', 'std'])
        for axes, measure in zip(panels, MEASURES):
            for title, pattern in self.grid.taught.items():
                points = self.measured[[measure]].rename(pattern.format)
                points = points.join(metric, how='inner').sort_values(measure)
                if len(points):
                    axes.errorbar(
                        *points.T.values, fmt='o-', capsize=3, label=title)
            axes.set(xlabel=measure)
            axes.grid(alpha=0.3)
        panels[0].set(ylabel=self.grid.metric.title)
        panels[0].legend()
        figure.savefig(path, dpi=110)


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
