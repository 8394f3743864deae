"""The error of a config, an argument or a file that cannot work."""
import sys


class ConfigError(ValueError):
    """A field that cannot work as it is, why, and what to write instead.

    Bugs, ours and other people's, are never one of these, so tools show this
    error as one sentence and everything else with its traceback.

    Args:
        field (str): The field or argument to change, as the user writes it,
            e.g. ``'model.teacher.checkpoint'``.
        problem (str): What is wrong, with the value and what contradicts it.
        remedy (str): What to do. Defaults to '', where the problem says it.
    """

    def __init__(self,
                 field: str,
                 problem: str = '',
                 remedy: str = '') -> None:
        raised = sys.exc_info()[1]
        # MMEngine's registries raise an error again as type(error)(text).
        if not problem and isinstance(raised, ConfigError):
            field, problem, remedy = raised.args
        super().__init__(field, problem, remedy)
        self.field, self.problem, self.remedy = field, problem, remedy

    def __str__(self) -> str:
        text = f'{self.field}: {self.problem}' if self.problem else self.field
        text = f'{text}; {self.remedy}' if self.remedy else text
        return ' '.join(text.split())  # one line, whatever was quoted


class NoClassLogitsError(ConfigError):
    """The student has no head with class logits to distil."""
