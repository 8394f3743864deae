"""The packaging and the set-up scripts, without installing anything."""
import fcntl
import importlib.metadata
import importlib.util
import io
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
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
# make's variables and those of the Makefile
MAKE = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'MMDIST_STACK', 'QUICK', 'VENV',
        'ARGS', 'TESTS', 'PYTHON')


def names(requirements):
    return {re.split('[=<>]', x)[0] for x in requirements}


def script(path, *lines):
    """An executable shell script."""
    path.write_text('\n'.join(['#!/bin/sh', *lines, '']))
    path.chmod(0o755)
    return path


def shell(*command, **env):
    """Run a command of the set-up; an outer make's variables stay out."""
    clean = {k: v for k, v in os.environ.items() if k not in MAKE}
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


def test_extras(metadata):
    extras = metadata['extras_require']
    assert {'mmengine==0.10.7', 'mmcv==2.1.0'} <= {*extras['openmmlab']}
    assert {'onedl-mmengine==0.10.12',
            'onedl-mmcv==2.3.6'} <= {*extras['onedl']}
    assert {'pytest', 'yapf'} <= names(extras['dev'])
    for lines in extras.values():
        assert all(re.fullmatch(r'[\w-]+([=<>]=?[\w.]+)?', x) for x in lines)


def test_all_packages_have_a_version():
    pins = install.requirements('constraints')
    assert all(re.fullmatch(r'[\w-]+==[\d.]+', x) for x in pins)
    for name in ('openmmlab', 'onedl', 'runtime', 'dev'):
        loose = {x for x in install.requirements(name) if '=' not in x}
        assert loose - {'setuptools<80'} <= names(pins)


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
    installed = {
        x.metadata['Name']: x.version
        for x in importlib.metadata.distributions()
    }
    stack = 'onedl' if 'onedl-mmcv' in installed else 'openmmlab'
    assert install.distributions(stack).items() <= installed.items()


@pytest.mark.parametrize('text, info', [('0.1.0', (0, 1, 0)),
                                        ('2.0.0rc1', (2, 0, 0, 'rc1'))])
def test_parse_version_info(text, info):
    assert parse_version_info(text) == info


def python(folder, name, text):
    """This Python, where ``text`` is the module ``name``."""
    (folder / f'{name}.py').write_text(text)
    return script(folder / 'python3.11', f"export PYTHONPATH='{folder}'",
                  f'exec \'{sys.executable}\' "$@"')


@pytest.mark.parametrize('name, text, wrong', [
    ('sitecustomize', 'import sys; sys.version_info = 3, 9, 1',
     'is Python 3.9'),
    ('ensurepip', 'raise ImportError', 'lacks its venv module: '),
])
def test_unsuitable_python_is_one_sentence(tmp_path, name, text, wrong):
    old = python(tmp_path, name, text)
    result = shell('sh', 'tools/setup/install.sh', tmp_path / 'venv',
                   'openmmlab', old)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.count('\n') == 1
    assert '3.10, 3.11 or 3.12' in result.stderr
    assert f'PYTHON={old} {wrong}' in result.stderr
    assert not (tmp_path / 'venv').exists()


def no_python(tmp_path):
    """The sentence where the PATH holds nothing but ``tmp_path``."""
    script(tmp_path / 'dirname', 'echo tools/setup')
    result = shell(
        '/bin/sh',
        'tools/setup/install.sh',
        tmp_path / 'venv',
        'openmmlab',
        PATH=str(tmp_path))
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    return result.stderr


def test_no_python_is_one_sentence(tmp_path):
    assert 'none was found: install one' in no_python(tmp_path)
    python(tmp_path, 'sitecustomize',
           'import sys; sys.version_info = 3, 13, 0')
    assert 'none was found (python3.11 is Python 3.13)' in no_python(tmp_path)


def test_python_without_venv_is_named(tmp_path):
    python(tmp_path, 'ensurepip', 'raise ImportError')
    package = 'python{}.{}-venv'.format(*sys.version_info)
    assert (f'and python3.11 lacks its venv module: apt-get install {package}'
            ) in no_python(tmp_path)


def test_unknown_stack_is_one_sentence(tmp_path):
    result = shell(sys.executable, 'tools/setup/install.py', tmp_path / 'venv',
                   'mmlab')
    assert result.returncode == 1
    assert result.stderr == (
        'MMDIST_STACK=mmlab is not one of openmmlab, onedl, cls.\n')


@pytest.mark.parametrize('output, sentence', [
    (None, 'no '),
    ('Python.h: No such file', 'headers of Python'),
    ('unrecognized option', 'C++17'),
])
def test_missing_compiler_is_one_sentence(setup, tmp_path, monkeypatch, output,
                                          sentence):
    compiler = tmp_path / 'compiler'
    if output:
        script(compiler, f'echo "{output}" >&2', 'exit 1')
    monkeypatch.setenv('CXX', str(compiler))
    monkeypatch.setattr(setup, 'mmcv_loads', lambda: False)
    monkeypatch.setattr(setup, 'find_wheel', lambda: None)
    monkeypatch.setattr(setup, 'run', lambda *args, **kwargs: 0)
    with pytest.raises(install.SetupError, match=r'C\+\+|Python') as error:
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
        setup.check_environment()


def test_the_other_stack_is_refused(setup):
    packages = setup.venv / 'lib' / 'python3' / 'site-packages'
    (packages / 'mmcv-2.1.0.dist-info').mkdir(parents=True)
    setup.check_environment()
    (packages / 'onedl_mmcv-2.3.6.dist-info').mkdir()
    with pytest.raises(
            install.SetupError, match=r'holds onedl-mmcv .*rm -rf venv'):
        setup.check_environment()


class Steps:
    """A set-up of three steps that notes which of them ran."""

    def __init__(self, venv):
        self.venv, self.ran, self.fails = venv, [], None

    def __call__(self, pin='1'):
        setup = install.Setup(self.venv, 'openmmlab')
        setup.steps = [(name, lambda name=name: pin
                        if name == 'b' else '', self.step(name))
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
    state = {'line': ''}
    setup.run._read([b'[3/77] c++\n', b'a warning\n'], io.BytesIO(), state)
    setup.run.screen.last -= 60
    setup.run._show('[4/7] mmcv', state, 5)
    assert capsys.readouterr().out == '[4/7] mmcv: 5 s  [3/77]\n'


def test_termination_ends_the_compilers(tmp_path):
    child = 'import subprocess; subprocess.run(["sh", "beat"])'
    parent = (
        'import signal, sys\n'
        f'sys.path.insert(0, {str(ROOT / "tools" / "setup")!r})\n'
        'import install\n'
        'signal.signal(signal.SIGTERM, install.stop)\n'
        f'install.Runner("log")("try", [sys.executable, "-c", {child!r}])')
    script(tmp_path / 'beat', 'while sleep .05; do echo >>beats; done')
    beats = tmp_path / 'beats'
    process = subprocess.Popen([sys.executable, '-c', parent],
                               cwd=tmp_path,
                               stderr=subprocess.DEVNULL)
    for _ in range(200):
        if beats.exists():
            break
        time.sleep(.05)
    process.terminate()
    assert process.wait(20)
    size = beats.stat().st_size
    time.sleep(.3)
    assert size and beats.stat().st_size == size


def test_a_second_make_says_that_it_waits(setup, capsys):
    with install.take_lock() as first:
        second = threading.Thread(target=lambda: install.take_lock().close())
        second.start()
        second.join(.3)
        assert second.is_alive()
        assert 'waiting for it' in capsys.readouterr().out
        fcntl.flock(first, fcntl.LOCK_UN)
        second.join(5)
    assert not second.is_alive()


@pytest.mark.parametrize('complete', [True, False])
def test_a_truncated_wheel_is_built_again(setup, tmp_path, monkeypatch,
                                          complete):
    setup.wheels.mkdir(parents=True)
    wheel = setup.wheels / 'mmcv-2.1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        info = 'mmcv-2.1.0.dist-info'
        archive.writestr('mmcv.py', '')
        archive.writestr(f'{info}/METADATA',
                         'Metadata-Version: 2.1\nName: mmcv\nVersion: 2.1.0')
        archive.writestr(
            f'{info}/WHEEL', 'Wheel-Version: 1.0\n'
            'Root-Is-Purelib: true\nTag: py3-none-any')
        archive.writestr(f'{info}/RECORD', '')
    whole = wheel.read_bytes()
    if not complete:
        wheel.write_bytes(whole[:-40])
    source = tmp_path / 'source'
    source.mkdir()
    built = []

    def build(folder):
        assert folder == source and not wheel.exists()
        wheel.write_bytes(whole)
        built.append(wheel)
        return wheel

    monkeypatch.setattr(setup, 'python', sys.executable)
    monkeypatch.setenv('PIP_TARGET', str(tmp_path / 'target'))
    monkeypatch.setattr(setup, 'mmcv_loads', iter([False, True]).__next__)
    monkeypatch.setattr(setup, 'compiler_problem', lambda: None)
    monkeypatch.setattr(setup, 'unpack', lambda: source)
    monkeypatch.setattr(setup, 'build', build)
    setup.mmcv()
    assert bool(built) != complete
    assert (tmp_path / 'target' / 'mmcv.py').exists()


def test_half_a_wheel_stays_out(setup):
    with pytest.raises(KeyboardInterrupt), setup.incoming() as folder:
        Path(folder, 'mmcv-2.1.0-half.whl').touch()
        raise KeyboardInterrupt
    assert not [*setup.wheels.iterdir()]
    with setup.incoming() as folder:
        Path(folder, 'mmcv-2.1.0-whole.whl').touch()
    assert setup.find_wheel().name == 'mmcv-2.1.0-whole.whl'


@pytest.mark.parametrize('gpu, torch, nvcc, kind, why', [
    (False, '12.8', '12.8', 'cpu', None),
    (True, '12.8', '12.4', 'cu128', None),
    (True, '13.0', '12.8', 'cpu', 'nvcc is of CUDA 12.8, torch of CUDA 13.0'),
    (True, '13.0', None, 'cpu', 'there is no working nvcc'),
    (True, None, '12.8', 'cpu', 'torch is a CPU build'),
])
def test_cuda_needs_a_suitable_nvcc(setup, tmp_path, monkeypatch, gpu, torch,
                                    nvcc, kind, why):
    module = setup.venv / 'lib' / 'python3' / 'site-packages' / 'torch'
    module.mkdir(parents=True)
    (module / 'version.py').write_text(f'cuda: Optional[str] = {torch!r}\n')
    (tmp_path / 'bin').mkdir()
    if nvcc:
        script(tmp_path / 'bin' / 'nvcc',
               f'echo Cuda compilation tools, release {nvcc}, V{nvcc}.1')
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    monkeypatch.setenv('CUDA_HOME', str(tmp_path))
    monkeypatch.setattr(install, 'has_gpu', lambda: gpu)
    assert setup.cuda() == (kind, why)
    assert setup.wheels.name.endswith(f'-{kind}')


@pytest.mark.parametrize('cpu, memory, jobs', [
    ('200000 100000', 'max', 2),
    ('max 100000', '4500000000', 3),
    ('150000 100000', '1000000', 1),
    ('max 100000', 'max', 8),
])
def test_compile_jobs_of_a_container(tmp_path, monkeypatch, cpu, memory, jobs):
    monkeypatch.delenv('MAX_JOBS', raising=False)
    monkeypatch.setattr(install, 'CGROUP', tmp_path)
    monkeypatch.setattr(
        os, 'sched_getaffinity', lambda _: range(8), raising=False)
    monkeypatch.setattr(os, 'sysconf', lambda _: 10**6)
    assert install.compile_jobs() == 8
    (tmp_path / 'cpu.max').write_text(f'{cpu}\n')
    (tmp_path / 'memory.max').write_text(f'{memory}\n')
    assert install.compile_jobs() == jobs


def test_makefile_keeps_the_stacks_apart():
    for stack, folder in (('openmmlab', '.venv'), ('onedl', '.venv-onedl')):
        result = shell('make', '-n', 'test', f'MMDIST_STACK={stack}',
                       'ARGS=-x')
        assert f"'{folder}' '{stack}'" in result.stdout
        assert f'{folder}/bin/python -m pytest' in result.stdout


def test_quick_demo():
    assert '--quick' in shell('make', '-n', 'demo', 'QUICK=1').stdout
    assert '--quick' not in shell('make', '-n', 'demo').stdout


def test_gpu_is_hidden_where_mmcv_cannot_use_it(tmp_path):
    shown = script(tmp_path / 'python', 'echo gpu=${CUDA_VISIBLE_DEVICES-0}')
    for line, gpu in (('export CUDA_VISIBLE_DEVICES=', ''), ('', '0')):
        (tmp_path / 'gpu.env').write_text(f'{line}\n')
        for target in ('demo', 'test'):
            result = shell(
                'make',
                '-s',
                '-o',
                'setup',
                target,
                f'VENV={tmp_path}',
                f'PY={shown}',
                CUDA_VISIBLE_DEVICES='0')
            assert result.stdout == f'gpu={gpu}\n'
