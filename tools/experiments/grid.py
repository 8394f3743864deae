"""Grids of trainings: configs, options and seeds that a file declares.

A grid is an MMEngine config with these fields:

- ``title``, ``about`` (Markdown) and ``metric`` (key, title, format);
- ``runs``: name -> ``dict(config=..., options={...}, seeds=[...],
  teacher=..., best_of=..., baseline=...)``. ``options`` are those of
  ``--cfg-options``; ``teacher`` is the name of another run, whose first seed
  teaches; ``best_of`` names a sweep, whose best options are added;
  ``baseline`` is the name of the run over which the gain is reported;
- ``sweeps``: the same with a list of ``options``, one for each member;
- ``seeds`` of runs that name none, ``scenes`` (digit scenes to be drawn,
  arguments of ``write_digit_scenes``), ``test=True`` (each model is tested by
  ``tools/test.py``, too);
- ``discrepancy=dict(student=..., teachers=..., taught=...)``: how far a run is
  from others, and the names of what these taught, by title;
- ``conclusion``, for the report.
"""
import copy
import functools
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from mmengine.config import Config

from mmdist.datasets import scenes_manifest
from .results import Results
from .steps import ROOT, Metric, Run, Step, digest, short

FIELDS = {
    'title': True,
    'metric': True,
    'runs': True,
    'about': False,
    'sweeps': False,
    'seeds': False,
    'scenes': False,
    'test': False,
    'discrepancy': False,
    'conclusion': False
}
RUN_FIELDS = {'config', 'options', 'seeds', 'teacher', 'best_of', 'baseline'}


class GridTraining(Step):
    """Trains with the very config that the grid has read, from a file beside
    the run's folder, and is not done without its metric."""

    @property
    def given_config(self) -> Path:
        """The whole config; MMEngine writes one of this name, too."""
        return self.folder.with_suffix('.py')

    @property
    def arguments(self) -> List[str]:
        """The command after ``python``, without ``--resume``."""
        return [
            'tools/train.py',
            short(self.given_config), '--work-dir',
            short(self.folder)
        ]

    def make_ready(self) -> None:
        """Write the config."""
        self.run.cfg.dump(self.given_config)

    def resumable(self) -> bool:
        """Not after the last checkpoint: MMEngine would validate no more."""
        return super().resumable() and not self.run.checkpoint.exists()

    def output(self) -> Any:
        """The checkpoint's path; None if it or the metric is missing."""
        metric = self.scalar(self.run.metric.key)
        return None if metric is None else super().output()


class GridRun(Run):
    """One training of a grid.

    Args:
        grid (Grid): What declares it.
        name (str): Of the run, or of the sweep and its member.
        seed (int): Of the training.
        entry (dict): The fields of the run.
        teacher (GridRun, optional): Its teacher. Defaults to None.
    """

    def __init__(self,
                 grid: 'Grid',
                 name: str,
                 seed: int,
                 entry: Dict[str, Any],
                 teacher: Optional['GridRun'] = None) -> None:
        self.grid, self.name, self.seed = grid, name, seed
        self.declared = dict(entry.get('options') or {})
        options = {**self.declared, 'randomness.seed': seed}
        if teacher:
            options['model.teacher.config'] = short(teacher.train.given_config)
            options['model.teacher.checkpoint'] = short(teacher.checkpoint)
        folder = grid.work_dir / re.sub(r'[^\w.=-]+', '_', name)
        super().__init__(f'{name}, seed {seed}', ROOT / entry['config'],
                         folder / f'seed_{seed}', options, grid.metric,
                         grid.manifest, teacher)
        self.train = GridTraining(self, 'train', self.train.needs)
        self.test = Step(self, 'test', [self.train])
        self.steps = [self.train, self.test] if grid.test else [self.train]

    def read_config(self) -> Config:
        """The config without the options, read once for all runs."""
        return copy.deepcopy(self.grid.config(self.config))

    @functools.cached_property
    def key(self) -> str:
        """Changes with what is trained, but not with the seed, the place of
        the data or the versions of packages."""
        cfg = self.cfg.to_dict()
        cfg.pop('randomness')
        if self.teacher:
            cfg['model']['teacher'].update(config=None, checkpoint=None)
        text = json.dumps(cfg, default=str, sort_keys=True)
        if cfg.get('data_root'):
            root = cfg['data_root'].rstrip('/')
            text = re.sub(rf'"{re.escape(root)}(?=["/])', '"', text)
        teacher = self.teacher and (self.teacher.key, self.teacher.seed)
        return digest([text, self.manifest, teacher])[:12]

    def validated(self) -> Optional[float]:
        """The metric after the last epoch; None if it is not known."""
        return self.train.scalar(self.metric.key)


class Grid:
    """What a file declares.

    Args:
        path (Path): The file.
        work_dir (Path): Of all trainings.

    Raises:
        ValueError: If a field is missing or unknown, or names what is not
            there.
    """

    def __init__(self, path: Path, work_dir: Path) -> None:
        self.name, self.work_dir = path.stem, work_dir
        cfg = Config.fromfile(path, lazy_import=False).to_dict()
        missing = [
            f for f, needed in FIELDS.items() if needed and f not in cfg
        ]
        if missing:
            raise ValueError(f'{path} has no {missing[0]!r}')
        self.title, self.about = cfg['title'], cfg.get('about', '')
        self.metric = Metric(**cfg['metric'])
        self.scenes, self.test = cfg.get('scenes'), cfg.get('test', False)
        self.seeds = cfg.get('seeds', [0])
        self.runs, self.sweeps = cfg['runs'], cfg.get('sweeps', {})
        self.discrepancy = cfg.get('discrepancy') or {}
        self.conclusion = cfg.get('conclusion', '')
        self.manifest = self._manifest()
        self.configs: Dict[Path, Config] = {}
        self.made: Dict[Any, GridRun] = {}
        for name, entry in [*self.sweeps.items(), *self.runs.items()]:
            self._check(name, entry)
        self._check_teachers()

    def _manifest(self) -> dict:
        """What is known of the scenes, drawn or not."""
        scenes = dict(self.scenes or {})
        scenes.pop('out_dir', None)
        return scenes_manifest(**scenes) if scenes else {}

    def _check(self, name: str, entry: Dict[str, Any]) -> None:
        """Refuse fields that are not there or name what is not."""
        unknown = set(entry) - RUN_FIELDS
        if unknown or 'config' not in entry:
            raise ValueError(f'{self.name}: {name!r} has ' + (
                f'{sorted(unknown)[0]!r}, which is none of '
                f'{sorted(RUN_FIELDS)}' if unknown else "no 'config'"))
        for field, names in (('teacher', self.runs), ('baseline', self.runs),
                             ('best_of', self.sweeps)):
            if entry.get(field) not in (None, *names):
                raise ValueError(f'{self.name}: {field}={entry[field]!r} '
                                 f'of {name!r} is none of {list(names)}')

    def _check_teachers(self) -> None:
        """Those whose weights others need must be known from the start."""
        needed = [e.get('teacher') for e in self.runs.values()]
        if self.discrepancy:
            needed += [self.discrepancy['student'], *self.teachers]
        for name in filter(None, needed):
            if name not in self.runs or 'best_of' in self.runs[name]:
                raise ValueError(
                    f'{self.name}: {name!r} is a teacher or in `discrepancy`, '
                    'and must be one of `runs` without `best_of`')

    def config(self, path: Path) -> Config:
        """The content of a config."""
        if path not in self.configs:
            self.configs[path] = Config.fromfile(path)
        return self.configs[path]

    @property
    def teachers(self) -> List[str]:
        """Those whose discrepancy is measured."""
        return self.discrepancy.get('teachers', [])

    def run(self, name: str, seed: int, entry: Dict[str, Any]) -> GridRun:
        """The run of an entry; the same one each time.

        Raises:
            ValueError: If another has its name or its folder.
        """
        options = dict(entry.get('options') or {})
        if (name, seed) not in self.made:
            teacher = entry.get('teacher')
            made = GridRun(self, name, seed, entry,
                           self.first(teacher) if teacher else None)
            if made.folder in {run.folder for run in self.made.values()}:
                raise ValueError(
                    f'{self.name}: the folder of {name!r} is that '
                    'of another run; rename one')
            self.made[name, seed] = made
        if self.made[name, seed].declared != options:
            raise ValueError(f'{self.name}: two runs are called {name!r}; '
                             'let their options differ by their last names')
        return self.made[name, seed]

    def first(self, name: str) -> GridRun:
        """The run of a name with its first seed."""
        entry = self.runs[name]
        return self.run(name, entry.get('seeds', self.seeds)[0], entry)

    def members(self, sweep: str) -> List[GridRun]:
        """The runs of a sweep."""
        entry = self.sweeps[sweep]
        return [
            self.run(f'{sweep}: {describe(options)}', seed,
                     dict(entry, options=options))
            for options in entry['options']
            for seed in entry.get('seeds', self.seeds)
        ]

    def plain_runs(self) -> Iterator[GridRun]:
        """The runs whose options are known, and the sweeps."""
        entries = {k: v for k, v in self.runs.items() if 'best_of' not in v}
        yield from self._by_seed(entries)
        for sweep in self.sweeps:
            yield from self.members(sweep)

    def best_runs(self, results: Results) -> Iterator[GridRun]:
        """The runs that take the options of a sweep that is complete."""
        entries = {}
        for name, entry in self.runs.items():
            best = self.best_options(entry.get('best_of'), results)
            if best is not None:
                options = {**best, **entry.get('options', {})}
                entries[name] = dict(entry, options=options)
        yield from self._by_seed(entries)

    def _by_seed(self, entries: Dict[str, dict]) -> Iterator[GridRun]:
        seeds = {n: e.get('seeds', self.seeds) for n, e in entries.items()}
        for seed in sorted(set(sum(seeds.values(), []))):
            for name, entry in entries.items():
                if seed in seeds[name]:
                    yield self.run(name, seed, entry)

    def best_options(self, sweep: Optional[str],
                     results: Results) -> Optional[Dict[str, Any]]:
        """Those of the member with the best mean; None if any is missing."""
        members = self.members(sweep) if sweep else []
        if not members or not all(run in results for run in members):
            return None
        means = results.means(members)
        return max(members, key=lambda run: means[run.key]).declared


def describe(options: Dict[str, Any]) -> str:
    """Options as text, by the last part of their names."""
    return ', '.join(f'{name.split(".")[-1]}='
                     f'{f"{value:g}" if isinstance(value, float) else value}'
                     for name, value in options.items())
