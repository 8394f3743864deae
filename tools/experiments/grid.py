"""Grids of trainings: configs, options and seeds that a file declares.

A grid is an MMEngine config with these fields:

- ``title`` and ``metric`` (key, title, format);
- ``runs``: name -> ``dict(config=..., options={...}, seeds=[...],
  teacher=..., best_of=..., baseline=...)``. ``options`` are for
  ``--cfg-options``; ``teacher`` is the name of another run, whose first seed
  teaches; ``best_of`` names a sweep, whose best options are added;
  ``baseline`` is the name of the run over which the gain is reported;
- ``sweeps``: the same with a list of ``options``, one for each member;
- ``seeds`` of runs that name none, ``scenes`` (digit scenes to be drawn,
  arguments of ``write_digit_scenes``), ``test=True`` (each model is tested by
  ``tools/test.py``, too);
- ``discrepancy=dict(student=..., teachers=..., taught=...)``: how far a run is
  from others, and the names of the runs that these taught, by title.
"""
import functools
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Optional

import pandas as pd
from mmengine.config import Config

from mmdist.datasets import scenes_manifest
from .steps import (ROOT, Metric, Run, Step, digest, read_config, read_json,
                    short)

RUN_FIELDS = {'config', 'options', 'seeds', 'teacher', 'best_of', 'baseline'}
RESULTS = ('run', 'seed', 'metric', 'test', 'minutes', 'options', 'key',
           'commit', 'versions')
NOT_HASHED = ('randomness', 'default_hooks', 'custom_imports', 'log_level',
              'log_processor', 'vis_backends', 'visualizer')
DISCREPANCIES = ('student', 'teacher', 'group', 'rows', 'kl', 'inter', 'intra',
                 'spearman', 'kendall', 'top-1 agreement', 'key')


class Table:
    """A CSV file of results, which are found by their keys and seeds."""

    def __init__(self, path: Path, columns: tuple) -> None:
        self.path, self.rows = path, pd.DataFrame(columns=columns)
        if path.exists():
            self.rows = pd.read_csv(
                path, dtype=dict(key=str), float_precision='round_trip')
        if tuple(self.rows) != columns:
            raise ValueError(f'{path} has other columns than results of '
                             'experiments; choose another --results')

    def add(self, *rows: Dict[str, Any]) -> None:
        """Append rows; those that other calls have added stay."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = pd.DataFrame(rows, columns=list(self.rows))
        new.to_csv(
            self.path, mode='a', header=not self.path.exists(), index=False)
        old = [self.rows] if len(self.rows) else []
        self.rows = pd.concat([*old, new], ignore_index=True)

    def of(self, *results: Any) -> pd.DataFrame:
        """The rows of runs or measurements."""
        keys = [(result.key, result.seed) for result in results]
        seeds = self.rows.get('seed', [None] * len(self.rows))
        found = [pair in keys for pair in zip(self.rows.key, seeds)]
        return self.rows[pd.Series(found, self.rows.index, bool)]

    def __contains__(self, result: Any) -> bool:
        return len(self.of(result)) > 0


class GridRun(Run):
    """One training of a grid, with its whole config in one file."""

    def __init__(self, grid: 'Grid', name: str, seed: int,
                 entry: Dict[str, Any]) -> None:
        self.name, self.seed = name, seed
        self.declared = dict(entry.get('options') or {})
        options = {**self.declared, 'randomness.seed': seed}
        teacher = grid.first(entry['teacher']) if entry.get('teacher') \
            else None
        if teacher:
            options['model.teacher.config'] = short(teacher.config)
            options['model.teacher.checkpoint'] = short(teacher.checkpoint)
        folder = grid.work_dir / folder_name(name) / f'seed_{seed}'
        super().__init__(f'{name}, seed {seed}', ROOT / entry['config'],
                         folder, options, grid.metric, grid.manifest, teacher)
        self.config, self.options = folder.with_suffix('.py'), {}
        self.steps = [self.train, self.test] if grid.test else [self.train]

    @functools.cached_property
    def key(self) -> str:
        """A hash of what is trained: not of the seed, the place of the data,
        the versions of packages, or what only logs and writes."""
        cfg = self.cfg.to_dict()
        for field in NOT_HASHED:
            cfg.pop(field, None)
        if self.teacher:
            cfg['model']['teacher'].update(config=None, checkpoint=None)
        text = json.dumps(cfg, default=str, sort_keys=True)
        if cfg.get('data_root'):
            root = cfg['data_root'].rstrip('/')
            text = re.sub(rf'"{re.escape(root)}(?=["/])', '"', text)
        teacher = self.teacher and (self.teacher.key, self.teacher.seed)
        return digest([text, self.manifest, teacher])[:12]


class Measure(Step):
    """One call of ``analyze_discrepancy.py`` for two runs."""
    seed = None  # the key holds the seeds of both

    def __init__(self, student: GridRun, teacher: GridRun) -> None:
        super().__init__(teacher, f'discrepancy_{student.key}.{student.seed}',
                         [student.train, teacher.train])
        self.name = f'discrepancy of {student.label} from {teacher.label}'
        self.student, self.teacher = student, teacher
        self.key = '-'.join(f'{run.key}.{run.seed}'
                            for run in (student, teacher))

    @property
    def arguments(self) -> List[str]:
        """The command after ``python``."""
        models = (
            path for run in (self.student, self.teacher)
            for path in (run.config, run.checkpoint))
        return [
            'tools/analysis_tools/analyze_discrepancy.py', *map(short, models),
            '--out-dir',
            short(self.folder)
        ]

    def output(self) -> Optional[dict]:
        """The measures of each group of rows; None if they are missing."""
        found = read_json(self.folder / 'discrepancy.json')
        return next(iter(found.values()))['groups'] if found else None


class Grid:
    """The runs that a file declares.

    Args:
        path (Path): The file.
        work_dir (Path): The folder of all trainings.

    Raises:
        ValueError: If a field is missing or unknown, or names a run or a
            sweep that is not there, or if runs take each other's place.
    """

    def __init__(self, path: Path, work_dir: Path) -> None:
        self.name, self.work_dir = path.stem, work_dir
        read_config.cache_clear()  # configs are read once a grid
        cfg = Config.fromfile(path, lazy_import=False).to_dict()
        for field in ('title', 'metric', 'runs'):
            if field not in cfg:
                raise ValueError(f'{path} has no {field!r}')
        self.title, self.metric = cfg['title'], Metric(**cfg['metric'])
        self.scenes, self.test = cfg.get('scenes'), cfg.get('test', False)
        self.seeds, self.sweeps = cfg.get('seeds', [0]), cfg.get('sweeps', {})
        measured = cfg.get('discrepancy') or {}
        self.student = measured.get('student')
        self.teachers = measured.get('teachers', [])
        self.taught = measured.get('taught', {})
        scenes = dict(self.scenes or {})
        scenes.pop('out_dir', None)
        self.manifest = scenes_manifest(**scenes) if scenes else {}
        self.runs = cfg['runs']
        self.members = {
            sweep:
            [(f'{sweep}: {describe(options)}', dict(entry, options=options))
             for options in entry['options']]
            for sweep, entry in self.sweeps.items()
        }
        entries = [*self.runs.items(), *sum(self.members.values(), [])]
        self.entries = dict(entries)
        self.made: Dict[Any, GridRun] = {}
        self._check([folder_name(name) for name, _ in entries])

    def _check(self, folders: List[str]) -> None:
        named = dict(
            teacher=self.runs, baseline=self.runs, best_of=self.sweeps)
        for name, entry in [*self.sweeps.items(), *self.runs.items()]:
            wrong = [f'no {x!r}' for x in {'config'} - set(entry)]
            wrong += [f'the unknown {x!r}' for x in set(entry) - RUN_FIELDS]
            wrong += [
                f'{field}={entry[field]!r}, which is none of {list(known)}'
                for field, known in named.items()
                if entry.get(field) not in (None, *known)
            ]
            if wrong:
                raise ValueError(f'{self.name}: {name!r} has {wrong[0]}')
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(
                    f'{self.name}: the folder {folder!r} is that of two runs; '
                    'rename one (options count by their last names)')
        taught = [entry.get('teacher') for entry in self.runs.values()]
        for name in filter(None, [*taught, self.student, *self.teachers]):
            if 'best_of' in self.runs.get(name, ['best_of']):
                raise ValueError(
                    f'{self.name}: {name!r} is a teacher or in `discrepancy`, '
                    'and must be one of `runs` without `best_of`')

    def of(self, name: str, results: Optional[Table] = None) -> List[GridRun]:
        """The runs of a name, one for each seed; none if its options are
        those of a sweep that is not complete."""
        entry = self.entries[name]
        if entry.get('best_of'):
            best = self._best(entry['best_of'], results)
            if best is None:
                return []
            entry = dict(entry, options={**best, **entry.get('options', {})})
        pairs = [(name, seed) for seed in entry.get('seeds', self.seeds)]
        for pair in pairs:
            if pair not in self.made:
                self.made[pair] = GridRun(self, *pair, entry)
        return [self.made[pair] for pair in pairs]

    def first(self, name: str) -> GridRun:
        """The run of a name with its first seed."""
        return self.of(name)[0]

    def all(self, results: Optional[Table] = None) -> List[GridRun]:
        """All runs whose options are known, seed by seed."""
        runs = [run for name in self.entries for run in self.of(name, results)]
        return sorted(runs, key=lambda run: run.seed)

    def _best(self, sweep: str, results: Table) -> Optional[Dict[str, Any]]:
        """The options with the best mean; None if a result is missing."""
        means = []
        for name, entry in self.members[sweep]:
            runs = self.of(name)
            if not results or not all(run in results for run in runs):
                return None
            means.append(results.of(*runs).metric.mean())
        return self.members[sweep][means.index(max(means))][1]['options']

    def measures(self) -> List[Measure]:
        """The measurements of discrepancies."""
        return [
            Measure(self.first(self.student), self.first(teacher))
            for teacher in self.teachers
        ]


def folder_name(name: str) -> str:
    """The folder of the runs of a name."""
    return re.sub(r'[^\w.=-]+', '_', name)


def describe(options: Dict[str, Any]) -> str:
    """Options as text, by the last part of their names."""
    return ', '.join(f'{name.split(".")[-1]}='
                     f'{f"{value:g}" if isinstance(value, float) else value}'
                     for name, value in options.items())
