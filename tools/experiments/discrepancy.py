"""Measuring the discrepancy between runs of a grid."""
from typing import Any, List

from .grid import GridRun
from .steps import Step, read_json, short

TOOL = 'tools/analysis_tools/analyze_discrepancy.py'


class Measure(Step):
    """One call of ``analyze_discrepancy.py``.

    Args:
        student (GridRun): A student trained alone.
        teacher (GridRun): A teacher.
    """

    def __init__(self, student: GridRun, teacher: GridRun) -> None:
        self.student = student
        self.key = '-'.join(f'{run.key}.{run.seed}'
                            for run in (student, teacher))
        stage = f'discrepancy_{student.key}.{student.seed}'
        super().__init__(teacher, stage, [student.train, teacher.train])
        self.name = f'discrepancy of {student.label} from {teacher.label}'

    @property
    def arguments(self) -> List[str]:
        """The command after ``python``."""
        models = [
            short(path) for run in (self.student, self.run)
            for path in (run.train.given_config, run.checkpoint)
        ]
        return [TOOL, *models, '--out-dir', short(self.folder)]

    def output(self) -> Any:
        """The groups of rows; None if they are not there."""
        found = read_json(self.folder / 'discrepancy.json')
        return next(iter(found.values()))['groups'] if found else None
