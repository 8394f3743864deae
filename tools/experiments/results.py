"""What trainings and measurements gave, a row each, in files that are kept."""
import fcntl
import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List

import pandas as pd

from .steps import ROOT, versions


class Table:
    """A CSV file, to which several calls may write at a time.

    Args:
        path (Path): The file.

    Raises:
        ValueError: If it has other columns.
    """
    columns: List[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = self._read()

    def _read(self) -> pd.DataFrame:
        if not self.path.exists():
            return pd.DataFrame(columns=self.columns)
        rows = pd.read_csv(
            self.path, dtype=dict(key=str), float_precision='round_trip')
        if list(rows) != self.columns:
            raise ValueError(f'{self.path} has other columns than results of '
                             'experiments; choose another --results')
        return rows

    def append(self, *rows: Dict[str, Any]) -> None:
        """Add rows to those that the file has now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.path.parent):
            known = self._read().to_dict('records')
            self.rows = pd.DataFrame(known + [*rows], columns=self.columns)
            partial = self.path.with_suffix('.partial')
            self.rows.to_csv(partial, index=False)
            partial.replace(self.path)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other call writes to a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Results(Table):
    """The metrics of runs."""
    columns = [
        'run', 'seed', 'metric', 'test', 'minutes', 'options', 'key', 'commit',
        'versions'
    ]

    def __contains__(self, run: Any) -> bool:
        return bool(self._rows(run).any())

    def _rows(self, run: Any) -> pd.Series:
        return (self.rows.key == run.key) & (self.rows.seed == run.seed)

    def add(self, run: Any) -> None:
        """Write down what a run reached."""
        self.append(
            dict(
                run=run.name,
                seed=run.seed,
                metric=run.validated(),
                test=run.test.output() if run.test in run.steps else None,
                minutes=round(run.train.seconds / 60, 2),
                options=json.dumps(run.declared),
                key=run.key,
                commit=commit(),
                versions=' '.join(versions())))

    def of(self, runs: Iterable[Any]) -> pd.DataFrame:
        """The rows of runs, under the names that these have."""
        rows = [
            self.rows[self._rows(run)].iloc[:1].assign(run=run.name)
            for run in runs
        ]
        return pd.concat(rows) if rows else self.rows.iloc[:0]

    def means(self, runs: Iterable[Any]) -> Dict[str, float]:
        """The mean metric by the keys of runs."""
        return self.of(runs).groupby('key').metric.mean().to_dict()


class Discrepancies(Table):
    """How far a student, trained alone, is from teachers."""
    columns = [
        'student', 'teacher', 'group', 'rows', 'kl', 'inter', 'intra',
        'spearman', 'kendall', 'top-1 agreement', 'key'
    ]

    def __contains__(self, step: Any) -> bool:
        return step.key in set(self.rows.key)

    def add(self, step: Any) -> None:
        """Write down what was measured, a row a group."""
        names = dict(
            student=step.student.name, teacher=step.run.name, key=step.key)
        self.append(*(dict(names, group=group, **values)
                      for group, values in step.output().items()))

    def of(self, step: Any) -> Dict[str, Any]:
        """What was measured of labelled rows; empty if nothing was."""
        rows = self.rows[(self.rows.key == step.key)
                         & (self.rows.group == 'foreground')]
        return rows.iloc[-1].to_dict() if len(rows) else {}


def commit() -> str:
    """The checkout's; empty without git."""
    command = ['git', 'describe', '--always', '--dirty']
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True,
            check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ''
