"""Grids of trainings: configs, options and seeds that a file declares.

A grid is an MMEngine config with these fields:

- ``title``, ``about`` (Markdown) and ``metric`` (key, title, format);
- ``runs``: name -> ``dict(config=..., options={...}, seeds=[...],
  teacher=..., best_of=...)``. ``options`` are those of ``--cfg-options``;
  ``teacher`` is the name of another run, whose first seed teaches;
  ``best_of`` names a sweep, whose best options are added;
- ``sweeps``: the same with a list of ``options``, one for each member;
- ``seeds`` of runs that name none, ``scenes`` (digit scenes to be drawn,
  arguments of ``write_digit_scenes``), ``test=True`` (each model is tested by
  ``tools/test.py``, too);
- ``discrepancy=dict(student=..., teachers=..., taught=...)``: how far a run is
  from others, and the names of what these taught, by title;
- ``conclusion``, for the report.
"""
import functools
import json
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

from mmengine.config import Config

from .results import Results
from .steps import ROOT, Metric, Run, digest, read_json, short


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
        self.name, self.seed = name, seed
        self.declared = dict(entry.get('options') or {})
        options = {**self.declared, 'randomness.seed': seed}
        if teacher:
            options['model.teacher.config'] = short(teacher.whole_config)
            options['model.teacher.checkpoint'] = short(teacher.checkpoint)
        folder = grid.work_dir / re.sub(r'[^\w.=-]+', '_', name)
        super().__init__(f'{name}, seed {seed}', ROOT / entry['config'],
                         folder / f'seed_{seed}', options, grid.metric,
                         grid.manifest, teacher)
        self.steps = [self.train, self.test] if grid.test else [self.train]

    @property
    def whole_config(self) -> Path:
        """The config with its options, as MMEngine writes it down."""
        return self.folder / self.config.name

    @functools.cached_property
    def key(self) -> str:
        """Changes with what is trained, but not with the seed, the place of
        the data or the versions of packages."""
        cfg = self.cfg.to_dict()
        cfg.pop('randomness')
        if self.teacher:
            cfg['model']['teacher'].update(config=None, checkpoint=None)
        text = json.dumps(cfg, default=str)
        if cfg.get('data_root'):
            text = text.replace(cfg['data_root'], '')
        teacher = self.teacher.key if self.teacher else None
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
        ValueError: If a field names what is not there.
    """

    def __init__(self, path: Path, work_dir: Path) -> None:
        self.name, self.work_dir = path.stem, work_dir
        cfg = Config.fromfile(path).to_dict()
        self.title, self.about = cfg['title'], cfg.get('about', '')
        self.metric = Metric(**cfg['metric'])
        self.scenes, self.test = cfg.get('scenes'), cfg.get('test', False)
        self.seeds = cfg.get('seeds', [0])
        self.runs, self.sweeps = cfg['runs'], cfg.get('sweeps', {})
        self.discrepancy = cfg.get('discrepancy')
        self.made: Dict[Any, GridRun] = {}
        self._refuse_unknown_names()

    def _refuse_unknown_names(self) -> None:
        for name, entry in {**self.sweeps, **self.runs}.items():
            for field, names in (('teacher', self.runs), ('best_of',
                                                          self.sweeps)):
                if entry.get(field, None) not in (None, *names):
                    raise ValueError(f'{self.name}: {field}={entry[field]!r} '
                                     f'of {name!r} is none of {list(names)}')

    @functools.cached_property
    def manifest(self) -> dict:
        """What is known of the scenes, once they are drawn."""
        if not self.scenes:
            return {}
        return read_json(ROOT / self.scenes['out_dir'] / 'manifest.json')

    def run(self, name: str, seed: int, entry: Dict[str, Any]) -> GridRun:
        """The run of an entry; the same one each time."""
        if (name, seed) not in self.made:
            teacher = entry.get('teacher')
            self.made[name,
                      seed] = GridRun(self, name, seed, entry,
                                      self.first(teacher) if teacher else None)
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
            for options in entry['options'] for seed in entry['seeds']
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
    return ', '.join(f'{k.split(".")[-1]}={v:g}'
                     if isinstance(v, float) else f'{k.split(".")[-1]}={v}'
                     for k, v in options.items())
