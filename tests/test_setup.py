"""The packaging and the set-up scripts, without installing anything."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmdist.version import __version__, parse_version_info

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation'}
FORKS = {
    'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'
}


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


install = load(ROOT / 'tools' / 'setup' / 'install.py')


def names(requirements):
    return {re.split('[=<>]', x)[0] for x in requirements}


def shell(*command, **env):
    """Run a command of the set-up; make's own variables stay out of it."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'MMDIST_STACK')
    }
    return subprocess.run([str(x) for x in command],
                          cwd=ROOT,
                          env=dict(clean, **env),
                          capture_output=True,
                          text=True)


@pytest.fixture
def metadata(monkeypatch):
    """What setup.py hands to setuptools."""
    found = {}
    monkeypatch.setattr('setuptools.setup', lambda **kw: found.update(kw))
    load(ROOT / 'setup.py')
    return found


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(install, 'CACHE', tmp_path)
    setup = install.Setup(tmp_path / 'venv', 'openmmlab')
    (tmp_path / 'venv' / 'bin').mkdir(parents=True)
    setup.python.symlink_to(sys.executable)
    return setup


def test_metadata(metadata):
    assert metadata['version'] == __version__
    assert metadata['license'] == 'Apache-2.0'
    assert metadata['python_requires'] == '>=3.10'
    assert 'mmdist' in metadata['packages']


def test_extras_repeat_the_pins(metadata):
    for extra in ('openmmlab', 'onedl', 'dev'):
        assert metadata['extras_require'][extra] == install.requirements(extra)


@pytest.mark.parametrize('stack, own', [('openmmlab', ORIGINALS),
                                        ('onedl', FORKS)])
def test_stacks_are_pinned_and_apart(metadata, stack, own):
    pins = metadata['extras_require'][stack]
    assert own <= names(pins)
    assert not names(pins) & (ORIGINALS | FORKS) - own
    assert all('==' in x for x in pins if 'mm' in x)


def test_no_stack_is_a_hard_dependency(metadata):
    assert not names(metadata['install_requires']) & (ORIGINALS | FORKS)


def test_pins_suit_what_is_installed():
    version = pytest.importorskip('torch').__version__
    (pin, ) = install.requirements('torch')
    if pin.partition('==')[2] != version.partition('+')[0]:
        pytest.skip('not an environment that `make` has set up')
    import mmcv
    pins = {
        version
        for _, version in map(install.mmcv_requirement, install.STACKS)
    }
    assert mmcv.__version__ in pins


@pytest.mark.parametrize('text, info', [('0.1.0', (0, 1, 0)),
                                        ('2.0.0rc1', (2, 0, 0, 'rc1'))])
def test_parse_version_info(text, info):
    assert parse_version_info(text) == info


def test_unsuitable_python_is_one_sentence(tmp_path):
    old = tmp_path / 'python'
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\n')
    old.chmod(0o755)
    result = shell('sh', 'tools/setup/install.sh', tmp_path / 'venv',
                   'openmmlab', old)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.count('\n') == 1
    assert '3.10, 3.11 or 3.12' in result.stderr
    assert 'Python 3.9.1' in result.stderr
    assert not (tmp_path / 'venv').exists()


def test_no_python_is_one_sentence(tmp_path):
    tool = tmp_path / 'dirname'
    tool.write_text('#!/bin/sh\necho tools/setup\n')
    tool.chmod(0o755)
    result = shell(
        '/bin/sh',
        'tools/setup/install.sh',
        tmp_path / 'venv',
        'openmmlab',
        PATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stderr.count('\n') == 1 and 'none was found' in result.stderr


def test_unknown_stack_is_one_sentence(tmp_path):
    result = shell(sys.executable, 'tools/setup/install.py', tmp_path / 'venv',
                   'mmlab')
    assert result.returncode == 1
    assert result.stderr == (
        'MMDIST_STACK=mmlab is not one of openmmlab, onedl.\n')


@pytest.mark.parametrize('output, sentence', [
    (None, 'no '),
    ('Python.h: No such file', 'headers of Python'),
    ('unrecognized option', 'C++17'),
])
def test_missing_compiler_is_one_sentence(setup, tmp_path, monkeypatch, output,
                                          sentence):
    compiler = tmp_path / 'compiler'
    if output:
        compiler.write_text(f'#!/bin/sh\necho "{output}" >&2\nexit 1\n')
        compiler.chmod(0o755)
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setattr(setup, 'mmcv_loads', lambda: False)
    monkeypatch.setattr(setup, 'find_wheel', lambda: None)
    monkeypatch.setattr(setup, 'run', lambda *args, **kwargs: 0)
    with pytest.raises(install.SetupError, match='C++|Python') as error:
        setup.make_venv()
    assert sentence in str(error.value) and 'mmcv==' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_ready_wheel_needs_no_compiler(setup, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    monkeypatch.setattr(setup, 'mmcv_loads', lambda: False)
    monkeypatch.setattr(setup, 'find_wheel', lambda: Path('mmcv.whl'))
    monkeypatch.setattr(setup, 'run', lambda *args, **kwargs: 0)
    setup.make_venv()


def test_other_python_leaves_the_environment_alone(setup):
    (setup.venv / 'pyvenv.cfg').write_text('version = 3.9.1\n')
    with pytest.raises(install.SetupError, match='made with Python 3.9'):
        setup()


class Steps:
    """A set-up of three steps that notes which of them ran."""

    def __init__(self, venv):
        self.venv, self.ran, self.fails = venv, [], None

    def __call__(self, pin='1'):
        setup = install.Setup(self.venv, 'openmmlab')
        setup.steps = [(name, pin if name == 'b' else '', self.step(name))
                       for name in 'abc']
        self.ran.clear()
        setup()
        return ''.join(self.ran)

    def step(self, name):

        def run():
            self.ran.append(name)
            if name == self.fails:
                raise install.SetupError(name)

        return run


def test_steps_run_once_and_go_on(setup):
    steps = Steps(setup.venv)
    steps.fails = 'b'
    with pytest.raises(install.SetupError):
        steps()
    steps.fails = None
    assert steps() == 'bc'
    assert steps() == ''
    assert steps(pin='2') == 'bc'


def test_failing_command_names_the_log(setup, capsys):
    with pytest.raises(install.SetupError, match='setup-openmmlab.log'):
        setup.run('[1/1] try', [sys.executable, '-c', 'raise OSError(42)'])
    assert 'OSError: 42' in capsys.readouterr().out


def test_progress_of_a_build(setup, capsys):
    setup.run.screen.last -= 60
    code = 'import time; print("[3/77] c++", flush=True); time.sleep(1.2)'
    setup.run('[4/7] mmcv', [sys.executable, '-c', code])
    assert re.search(r'\[4/7\] mmcv: \d s  \[3/77\]', capsys.readouterr().out)


def test_makefile_keeps_the_stacks_apart():
    for stack, folder in (('openmmlab', '.venv'), ('onedl', '.venv-onedl')):
        result = shell('make', '-n', 'test', f'MMDIST_STACK={stack}',
                       'ARGS=-x')
        assert f"'{folder}' '{stack}'" in result.stdout
        assert f'{folder}/bin/python -m pytest' in result.stdout


def test_quick_demo():
    assert '--quick' in shell('make', '-n', 'demo', 'QUICK=1').stdout
    assert '--quick' not in shell('make', '-n', 'demo').stdout
