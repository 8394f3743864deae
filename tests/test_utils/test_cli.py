"""Errors in the terminal of a tool."""
import argparse

import pytest

from mmdist import ConfigError
from mmdist.utils import add_class_map
from mmdist.utils.cli import run_tool


def test_a_refusal_is_one_sentence(capsys):
    """Without a traceback; the exit status is 1."""

    def refuse():
        raise ConfigError('model.alpha', 'two\nlines', 'use one')

    with pytest.raises(SystemExit) as end:
        run_tool(refuse)
    assert end.value.code == 'Error: model.alpha: two lines; use one'


@pytest.mark.parametrize('kind', [ValueError, RuntimeError, OSError])
def test_a_bug_keeps_its_traceback(kind):
    """The tool lets it through, with the error before it."""

    def fail():
        try:
            raise KeyError('before')
        except KeyError as error:
            raise kind('after') from error

    with pytest.raises(kind, match='after') as raised:
        run_tool(fail)
    assert isinstance(raised.value.__cause__, KeyError)
    assert raised.traceback[-1].name == 'fail'


def test_an_interrupted_tool(capsys):
    """130, as a shell says of Ctrl-C."""

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run_tool(interrupt)
    assert end.value.code == 130
    assert capsys.readouterr().err == 'Interrupted\n'


@pytest.mark.parametrize('words, spec', [
    ([], None),
    (['names'], 'names'),
    (['2', '0'], [2, 0]),
    (['traffic light', 'car'], ['traffic light', 'car']),
    (['names', 'car'], ['names', 'car']),
])
def test_class_map_on_the_command_line(words, spec):
    """What model.teacher.class_map would say."""
    parser = argparse.ArgumentParser()
    add_class_map(parser)
    flag = ['--class-map', *words] if words else []
    assert parser.parse_args(flag).class_map == spec
