"""What trainings and measurements gave, a row each, in files that are kept."""
import json
from pathlib import Path
from typing import Any, Dict, Iterable, List

import mmengine
import pandas as pd
import torch

import mmdist


class Table:
    """A CSV file, written anew with every row.

    Args:
        path (Path): The file.

    Raises:
        ValueError: If it has other columns.
    """
    columns: List[str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = pd.DataFrame(columns=self.columns)
        if path.exists():
            self.rows = pd.read_csv(path)
            if list(self.rows) != self.columns:
                raise ValueError(f'{path} has other columns than results of '
                                 'experiments; choose another --results')

    def append(self, row: Dict[str, Any]) -> None:
        """Add a row and write the file."""
        rows = self.rows.to_dict('records') + [row]
        self.rows = pd.DataFrame(rows, columns=self.columns)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix('.partial')
        self.rows.to_csv(partial, index=False)
        partial.replace(self.path)


class Results(Table):
    """The metrics of runs."""
    columns = [
        'run', 'seed', 'metric', 'test', 'minutes', 'options', 'key', 'mmdist',
        'mmengine', 'torch'
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
                mmdist=mmdist.__version__,
                mmengine=mmengine.__version__,
                torch=torch.__version__))

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
        for group, values in step.output().items():
            self.append(
                dict(
                    student=step.student.name,
                    teacher=step.run.name,
                    group=group,
                    key=step.key,
                    **values))
