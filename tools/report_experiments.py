"""Write the tables and figures of experiments into a page.

The numbers are those of the CSV files that ``tools/run_experiments.py``
writes. In the page they stand between two comments that name the grid; the
words around them are written by hand and stay. A grid without such comments
gets a section at the end of the page.
"""
import argparse
import os
import re
from collections import Counter
from pathlib import Path
from typing import Dict, Iterator

from experiments.grid import Grid, Table, describe, pd
from experiments.runs import ROOT
from matplotlib.figure import Figure
from scipy import stats

from mmdist.errors import ConfigError
from mmdist.utils import markdown_table, run_tool


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
    """The tables and figures of one grid, from the CSV files in a folder."""

    def __init__(self, path: Path, folder: Path, page: Path) -> None:
        self.folder, self.links = folder, os.path.relpath(folder, page.parent)
        self.results = Table(folder / f'{path.stem}.csv')
        self.grid = grid = Grid(path, ROOT / 'work_dirs', self.results)
        self.field, self.split = 'metric', ''
        if grid.test:
            self.field, self.split = 'test', ', test split'
        rows = pd.concat([
            self.results.of(*grid.of(name)).assign(run=name)
            for name in grid.entries
        ])
        if len(self.results.rows) and not len(rows):
            raise ConfigError(
                '--results', f'{self.results.path} has no result of a run '
                f'that {grid.name} declares now', 'train them again, or take '
                'back what was changed in the grid or its configs')
        rows = rows.astype(dict(metric=float, test=float, minutes=float))
        self.rows = rows = rows.set_index(['run', 'seed'], drop=False)
        self.baseline = {
            name: entry['baseline']
            for name, entry in grid.runs.items() if entry.get('baseline')
        }
        # paired by seed
        base = [rows.run.map(self.baseline), rows.seed]
        rows['gain'] = rows[self.field] - rows[self.field].reindex(
            pd.MultiIndex.from_arrays(base)).to_numpy()
        self.main_runs = [name for name in grid.runs if name in rows.index]
        # of more than one validation
        self.curves = rows[rows.curve.astype(str).str.contains(' ')]

    def mean(self, field: str, run: str) -> str:
        """Mean, deviation and number of runs: 0.512 ± 0.004 (5)."""
        show = self.grid.metric.show
        values = self.rows[field][self.rows.run == run].dropna()
        if not len(values):
            return ''
        spread = f' ± {show(values.std())}' if len(values) > 1 else ''
        text = f'{show(values.mean())}{spread} ({len(values)})'
        return f'+{text}' if field == 'gain' and text[0] != '-' else text

    def interval(self, run: str) -> str:
        """The 95 % interval of Student's t of the mean gain, bold where it
        excludes 0; '' for fewer than two pairs."""
        gains = self.rows.gain[self.rows.run == run].dropna()
        if len(gains) < 2:
            return ''
        half = stats.t.ppf(0.975, len(gains) - 1) * gains.sem()
        low, high = gains.mean() - half, gains.mean() + half
        text = ' to '.join(map(self.grid.metric.show, (low, high)))
        return f'**{text}**' if low > 0 or high < 0 else text

    def main_table(self) -> str:
        """A row for each run."""
        rows, grid = [], self.grid
        for name in self.main_runs:
            row = {'run': name, grid.metric.title: self.mean('metric', name)}
            if grid.test:
                row['test split'] = self.mean('test', name)
            if self.baseline:
                row[f'gain{self.split}'] = self.mean('gain', name)
                row['gain, 95 % interval'] = self.interval(name)
            row['minutes'] = f'{self.rows.minutes[name].mean():.1f}'
            row['options'] = describe(grid.of(name)[0].declared)
            rows.append(row)
        return markdown_table(rows)

    def sweep_table(self, sweep: str) -> str:
        """The metric of each member, with a column per value of the last
        option."""
        table: Dict[str, Dict[str, str]] = {}
        for name, entry in self.grid.members[sweep]:
            if name in self.rows.index:
                *others, last = entry['options'].items()
                row, column = describe(dict(others)), describe(dict([last]))
                table.setdefault(row, {'options': row})[column] = \
                    self.grid.metric.show(self.rows.metric[name].mean())
        return markdown_table([*table.values()], missing='') if table else ''

    def baselines(self) -> str:
        """A sentence about what gains are over; of most runs first."""
        (most, _), *others = Counter(self.baseline.values()).most_common()
        parts = [f'Gains are over *{most}*']
        for other, _ in others:
            names = [k for k, v in self.baseline.items() if v == other]
            parts.append(f'those of *{"*, *".join(names)}* over *{other}*')
        return ('; '.join(parts) +
                '. A bold interval excludes 0: that gain is decided.')

    def text(self) -> Iterator[str]:
        """The paragraphs; figures are drawn as they are mentioned."""
        grid, place = self.grid, f'{self.links}/{self.grid.name}'
        if self.main_runs:
            yield self.main_table()
            if self.baseline:
                yield self.baselines()
        yield f'Every training: [{grid.name}.csv]({place}.csv).'
        if self.main_runs:
            self.draw_runs(self.folder / f'{grid.name}.png')
            yield f'![runs]({place}.png)'
            if len(self.curves):
                self.draw_curves(self.folder / f'{grid.name}_curves.png')
                yield f'![curves]({place}_curves.png)'
        for sweep in grid.sweeps:
            table = self.sweep_table(sweep)
            if table:
                yield f'The sweep of {sweep}, {grid.metric.title}:'
                yield table

    def draw_runs(self, path: Path) -> None:
        """A row per run, with a point per seed and a line for the mean."""
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

    def draw_curves(self, path: Path) -> None:
        """The metric by epoch or iteration; the mean over seeds."""
        figure = Figure((7, 4), layout='constrained')
        axes = figure.subplots()
        for name in self.main_runs:
            curves = [
                dict(point.split(':') for point in text.split())
                for text in self.curves.curve[self.curves.run == name]
            ]
            if curves:
                values = pd.DataFrame(curves, dtype=float).mean()
                axes.plot(values.index.astype(int), values, '.-', label=name)
        axes.set(
            xlabel=self.grid.of(self.main_runs[0])[0].unit,
            ylabel=f'{self.grid.metric.title}, validation')
        axes.grid(alpha=0.3)
        axes.legend()
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
