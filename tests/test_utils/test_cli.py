"""What the tools say of an error."""
import argparse

import pytest

from mmdist.utils import add_class_map, run_tool


def raise_lines():
    raise RuntimeError('CUDA error: out of luck\nCUDA kernel errors might be')


def raise_from_lines():
    try:
        raise_lines()
    except RuntimeError as error:
        raise ValueError(f'it failed: {error}') from error


def raise_after_nothing():
    try:
        raise EOFError
    except EOFError:
        raise ValueError('the file has an end')


def raise_as_a_worker():
    raise ValueError(
        'Caught ValueError in DataLoader worker process 0.\n'
        'Original Traceback (most recent call last):\n'
        '  File "a.py", line 1, in a\n    raise\nValueError: no picture\n')


@pytest.mark.parametrize('tool, words, function', [
    (raise_lines, 'RuntimeError: CUDA error: out of luck CUDA kernel errors',
     'raise_lines'),
    (raise_from_lines, 'ValueError: it failed: CUDA error', 'raise_lines'),
    (raise_after_nothing, 'ValueError: the file has an end',
     'raise_after_nothing'),
    (raise_as_a_worker, 'ValueError: no picture', 'raise_as_a_worker'),
])
def test_one_sentence_and_one_frame(monkeypatch, tool, words, function):
    """Of errors of several lines, and of those with an error before."""
    monkeypatch.delenv('MMDIST_TRACEBACK')
    with pytest.raises(SystemExit) as end:
        run_tool(tool)
    sentence, place = end.value.code.splitlines()
    assert sentence.startswith(words)
    assert f', in {function};' in place


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
