"""Grids of trainings: configs, options and seeds that a file declares.

A grid is a Python file with these names:

- ``title`` and ``metric`` (key, title, format);
- ``runs``: name -> ``dict(config=..., options={...}, seeds=[...],
  teacher=..., best_of=..., baseline=...)``. ``options`` are for
  ``--cfg-options``; ``teacher`` is the name of another run, whose first seed
  teaches; ``best_of`` names a sweep, whose best options are added;
  ``baseline`` is the name of the run over which the gain is reported;
- ``sweeps``: the same with a list of ``options``, one for each member;
- ``seeds`` of runs that name none, ``scenes`` (digit scenes to be drawn,
  arguments of ``write_digit_scenes``), ``test=True`` (each model is tested by
  ``tools/test.py``, too).
"""
import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from mmdist.datasets import scenes_manifest
from mmdist.errors import ConfigError
from .runs import ROOT, Metric, Run, short, versions

try:
    import pandas as pd
except ModuleNotFoundError:
    sys.exit("Error: pandas is not installed; pip install 'mmdist[analysis]'")


class GridRun(Run):
    """One training of a grid, with its whole config in one file."""
    COLUMNS = ('run', 'seed', 'metric', 'test', 'minutes', 'options', 'key',
               'commit', 'versions', 'curve')

    def __init__(self, grid: 'Grid', name: str, seed: int,
                 entry: Dict[str, Any]) -> None:
        self.name, self.declared = name, entry.get('options') or {}
        options, teacher = {**self.declared, 'randomness.seed': seed}, None
        if entry.get('teacher'):
            teacher = grid.of(entry['teacher'])[0]
            options['model.teacher.config'] = short(teacher.config)
            options['model.teacher.checkpoint'] = short(teacher.checkpoint)
        folder = grid.work_dir / folder_name(name) / f'seed_{seed}'
        super().__init__(f'{name}, seed {seed}', ROOT / entry['config'],
                         folder, options, grid.metric, grid.manifest, teacher,
                         grid.test)
        self.config, self.options = folder.with_suffix('.py'), {}
        self.id = f'{self.key}.{seed}'

    def carry_out(self, jobs: int) -> Iterator[None]:
        """Write the config, and do what is left."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.cfg.dump(self.config)
        yield from super().carry_out(jobs)

    def row(self) -> Dict[str, Any]:
        """The row of a run that is done."""
        commit = subprocess.run(['git', 'describe', '--always', '--dirty'],
                                cwd=ROOT,
                                capture_output=True,
                                text=True).stdout.strip()
        curve = ' '.join(f'{k}:{v:g}' for k, v in self.validations().items())
        values = (self.name, self.seed, self.validated(),
                  self.tested() if self.tests else None,
                  round(self.seconds / 60, 2), json.dumps(self.declared),
                  self.key, commit, ' '.join(versions()), curve)
        return dict(zip(self.COLUMNS, values))


class Table:
    """A CSV file of results, one row per run, found by the run's id."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, self.read(path)

    @staticmethod
    def read(path: Path) -> pd.DataFrame:
        """The rows of the file, which other calls write to, too."""
        if not path.exists():
            return pd.DataFrame(columns=GridRun.COLUMNS)
        rows = pd.read_csv(
            path, dtype=dict(key=str), float_precision='round_trip')
        if tuple(rows) != GridRun.COLUMNS:
            raise ConfigError(
                '--results', f'{path} has other columns than results of '
                'experiments', 'choose another file')
        return rows

    def keep(self, run: GridRun) -> None:
        """Append the row of a run, once."""
        if run not in self:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = pd.DataFrame([run.row()], columns=GridRun.COLUMNS)
            header = not self.path.exists()
            new.to_csv(self.path, mode='a', header=header, index=False)
            self.rows = self.read(self.path)

    def of(self, *runs: GridRun) -> pd.DataFrame:
        """The rows of runs."""
        ids = self.rows.key + '.' + self.rows.seed.astype(str)
        return self.rows[ids.isin([run.id for run in runs])]

    def __contains__(self, run: GridRun) -> bool:
        return len(self.of(run)) > 0


class Grid:
    """The runs that a file declares.

    Args:
        path (Path): The file.
        work_dir (Path): The folder of all trainings.
        results (Table, optional): What is known of the members of sweeps.

    Raises:
        ConfigError: If an entry has a field that is unknown or names a run or
            a sweep that is not there, or if runs take each other's place.
    """

    def __init__(self,
                 path: Path,
                 work_dir: Path,
                 results: Optional[Table] = None) -> None:
        cfg = runpy.run_path(str(path))
        self.name, self.work_dir, self.results = path.stem, work_dir, results
        self.title, self.metric = cfg['title'], Metric(**cfg['metric'])
        self.scenes, self.test = cfg.get('scenes'), cfg.get('test', False)
        self.seeds, self.sweeps = cfg.get('seeds', [0]), cfg.get('sweeps', {})
        scenes = dict(self.scenes or {})
        scenes.pop('out_dir', None)
        self.manifest = scenes_manifest(**scenes) if scenes else {}
        self.runs = cfg['runs']
        self.made: Dict[Any, GridRun] = {}
        # names and entries of the members of each sweep
        self.members = {
            sweep:
            [(f'{sweep}: {describe(options)}', dict(entry, options=options))
             for options in entry['options']]
            for sweep, entry in self.sweeps.items()
        }
        entries = [*self.runs.items(), *sum(self.members.values(), [])]
        self.entries = dict(entries)
        for name, entry in [*self.sweeps.items(), *self.runs.items()]:
            self.check(name, entry)
        folders = Counter(folder_name(name) for name, _ in entries)
        twice = [folder for folder, number in folders.items() if number > 1]
        if twice:
            raise ConfigError(
                'runs', f'two share the folder {twice[0]!r}',
                'rename one (options count by their last names)')

    def check(self, name: str, entry: Dict[str, Any]) -> None:
        """Refuse fields that are unknown or name what is not there."""
        plain = [n for n, e in self.runs.items() if not e.get('best_of')]
        known = dict(teacher=plain, baseline=self.runs, best_of=self.sweeps)
        fields = {'config', 'options', 'seeds', *known}
        wrong = (set(entry) - fields) | ({'config'} - set(entry)) | {
            field
            for field, names in known.items()
            if entry.get(field) not in (None, *names)
        }
        for field in sorted(wrong):
            raise ConfigError(
                'runs', f'{name!r} has {field}={entry.get(field)!r}',
                f'its fields are {sorted(fields)}; a teacher or a baseline is '
                'a run (a teacher has no best_of), and best_of is a sweep')

    def of(self, name: str) -> List[GridRun]:
        """The runs of a name, one for each seed.

        There are none if its options are those of a sweep that is not
        complete; otherwise the best member gives them.
        """
        entry = self.entries[name]
        if entry.get('best_of'):
            means = {}
            for member, _ in self.members[entry['best_of']]:
                runs = self.of(member)
                if not self.results or not all(run in self.results
                                               for run in runs):
                    return []
                means[member] = self.results.of(*runs).metric.mean()
            best = self.entries[max(means, key=means.get)]['options']
            entry = dict(entry, options={**best, **entry.get('options', {})})
        pairs = [(name, seed) for seed in entry.get('seeds', self.seeds)]
        for pair in pairs:
            if pair not in self.made:
                self.made[pair] = GridRun(self, *pair, entry)
        return [self.made[pair] for pair in pairs]

    def all(self) -> List[GridRun]:
        """All runs whose options are known, seed by seed."""
        runs = [run for name in self.entries for run in self.of(name)]
        return sorted(runs, key=lambda run: run.seed)


def folder_name(name: str) -> str:
    """The folder of the runs of a name."""
    return re.sub(r'[^\w.=-]+', '_', name)


def describe(options: Dict[str, Any]) -> str:
    """Options as text, by the last part of their names."""
    return ', '.join(f'{name.split(".")[-1]}='
                     f'{f"{value:g}" if isinstance(value, float) else value}'
                     for name, value in options.items())
