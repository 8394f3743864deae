"""The packaging and the set-up scripts, offline."""
import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

from mmdist.version import __version__, parse_version_info

ROOT = Path(__file__).resolve().parents[1]
ORIGINALS = {'mmengine', 'mmcv', 'mmdet', 'mmsegmentation'}
FORKS = {
    'onedl-mmengine', 'onedl-mmcv', 'onedl-mmdetection', 'onedl-mmsegmentation'
}
# make's variables and those of the Makefile
MAKE = ('MAKEFLAGS', 'MAKELEVEL', 'MFLAGS', 'MMDIST_STACK', 'QUICK', 'VENV',
        'ARGS', 'TESTS', 'PYTHON')


def requirements(name):
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def names(requirements):
    return {re.split('[=<>]', x)[0] for x in requirements}


def script(path, *lines):
    """An executable shell script."""
    path.write_text('\n'.join(['#!/bin/sh', *lines, '']))
    path.chmod(0o755)
    return path


def shell(*command, cwd=ROOT, **env):
    """Run a command of the set-up; an outer make's variables stay out."""
    clean = {k: v for k, v in os.environ.items() if k not in MAKE}
    return subprocess.run([str(x) for x in command],
                          cwd=cwd,
                          env=dict(clean, **env),
                          capture_output=True,
                          text=True)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel of mmdist, built without a network from a copy."""
    root = tmp_path_factory.mktemp('wheel')
    for name in ('mmdist', 'configs', 'tools', 'requirements'):
        shutil.copytree(
            ROOT / name,
            root / name,
            ignore=shutil.ignore_patterns('.mim', '__pycache__'))
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE',
                 'MANIFEST.in', 'model-index.yml'):
        shutil.copy(ROOT / name, root)
    done = shell(sys.executable, '-m', 'pip', 'wheel', '--no-deps',
                 '--no-build-isolation', '--no-index', '-w', root, root)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(root.glob('*.whl'))


@pytest.fixture(scope='module')
def metadata(wheel):
    """The metadata that a package index reads."""
    with zipfile.ZipFile(wheel) as archive:
        name, = (x for x in archive.namelist() if x.endswith('/METADATA'))
        return message_from_string(archive.read(name).decode())


def required(metadata, extra=None):
    """The requirements of mmdist, or of an extra."""
    parts = [x.split('; extra == ') for x in metadata.get_all('Requires-Dist')]
    return {
        name
        for name, *rest in parts
        if [x.strip('"') for x in rest] == ([extra] if extra else [])
    }


def test_metadata(metadata):
    assert metadata['Version'] == __version__
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Requires-Python'] == '>=3.10'
    for field in ('Author', 'Author-email', 'Maintainer', 'Home-page',
                  'Project-URL'):
        assert metadata[field] is None


def test_the_package_page_has_no_link_into_the_checkout(metadata):
    page = metadata.get_payload()
    assert page.startswith('# mmdist') and 'quickstart' in page
    targets = re.findall(r'\]\(([^)]*)\)', page)
    assert targets and all(x.startswith(('https:', '#')) for x in targets)


def test_dependencies_are_what_training_imports(metadata):
    assert names(required(metadata)) == {'numpy', 'safetensors', 'torch'}


def test_extras(metadata):
    assert {'mmengine==0.10.7',
            'mmcv==2.1.0'} <= required(metadata, 'openmmlab')
    assert {'onedl-mmengine==0.10.12',
            'onedl-mmcv==2.3.6'} <= required(metadata, 'onedl')
    assert {'mmcv-lite==2.1.0',
            'mmpretrain==1.2.0'} <= required(metadata, 'cls')
    assert {'pytest', 'yapf'} <= names(required(metadata, 'dev'))
    assert 'scikit-learn' in required(metadata, 'demo')
    assert 'pandas' in required(metadata, 'analysis')
    assert 'onnxscript' in required(metadata, 'onnx')


def test_all_packages_have_a_version():
    pins = requirements('constraints')
    assert all(re.fullmatch(r'[\w-]+==[\d.]+', x) for x in pins)
    for name in ('openmmlab', 'onedl', 'runtime', 'demo', 'analysis', 'onnx',
                 'dev'):
        loose = {x for x in requirements(name) if '=' not in x}
        assert loose - {'setuptools<80'} <= names(pins)


@pytest.mark.parametrize('stack, own', [('openmmlab', ORIGINALS),
                                        ('onedl', FORKS)])
def test_stacks_are_pinned_and_apart(metadata, stack, own):
    pins = required(metadata, stack)
    assert own <= names(pins)
    assert not names(pins) & (ORIGINALS | FORKS) - own
    assert all('==' in x for x in pins if 'mm' in x)


def test_pins_suit_what_is_installed():
    version = pytest.importorskip('torch').__version__
    (pin, ) = requirements('torch')
    if pin.partition('==')[2] != version.partition('+')[0]:
        pytest.skip('not an environment that `make` has set up')
    installed = {
        x.metadata['Name']: x.version
        for x in importlib.metadata.distributions()
    }
    stack = 'onedl' if 'onedl-mmcv' in installed else 'openmmlab'
    pins = [pin.split('==') for pin in requirements(stack) if 'mm' in pin]
    assert all(installed[name] == version for name, version in pins)


@pytest.mark.parametrize('text, info', [('0.1.0', (0, 1, 0)),
                                        ('2.0.0rc1', (2, 0, 0, 'rc1'))])
def test_parse_version_info(text, info):
    assert parse_version_info(text) == info


INSTALLED = """
import os.path as osp
import sys
import mmdist
from mmengine.config import Config
from mmengine.utils import get_installed_path
assert mmdist.__file__.startswith(sys.prefix), mmdist.__file__
folder = osp.join(get_installed_path('mmdist'), '.mim')
assert folder.startswith(sys.prefix)
for name in ('tools/train.py', 'tools/dist_train.sh', 'model-index.yml'):
    assert osp.isfile(osp.join(folder, name)), name
from mmdist.utils import find_config
name = 'mmdist::experiments/dist_fpn_r18-w12-w24_5e_digits.py'
cfg = Config.fromfile(find_config(name, 'config'))
assert cfg.model.type == 'mmdist.DistillSegmentor'
import torch
from mmdist.models.teacher import build_model
from mmengine.registry import MODELS
config = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
plain, _ = build_model(config, 'config')
torch.save(plain.state_dict(), 'teacher.pth')
model = MODELS.build(dict(
    type='mmdist.DistillDetector', student=config,
    teacher=dict(config=config, checkpoint='teacher.pth'),
    distill_loss=dict(type='mmdist.DISTLoss')))
assert isinstance(model, type(plain))
assert model.state_dict().keys() == plain.state_dict().keys()
"""


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(wheel, tmp_path):
    """With the stack of this one, but not its mmdist; no checkout is near."""
    pytest.importorskip('mmdet', reason='the model is a detector')
    venv.create(tmp_path / 'venv')  # without pip
    own = tmp_path / 'venv' / 'bin' / 'python'
    packages, = tmp_path.glob('venv/lib/python3*/site-packages')
    (packages / 'stack.pth').write_text(sysconfig.get_path('purelib'))
    pip = [sys.executable, '-m', 'pip', '--python', own, 'install']
    done = shell(*pip, '--no-deps', '--no-index', wheel, PYTHONPATH='')
    assert done.returncode == 0, done.stderr
    done = shell(own, '-c', INSTALLED, cwd=tmp_path, PYTHONPATH='')
    assert done.returncode == 0, done.stderr
    assert (packages / 'mmdist' / 'py.typed').is_file()


# ------------------------------------------------------- which Python

# what the Python of these tests can set up
STACK = 'onedl' if sys.version_info >= (3, 13) else 'openmmlab'
MMCV = requirements(STACK)[1]
other_stacks = pytest.mark.skipif(
    STACK == 'onedl', reason='this Python sets up the forks alone')


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
    result = shell('sh', 'tools/setup/install.sh', tmp_path / 'venv', STACK,
                   old)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr.count('\n') == 1
    assert '3.10, 3.11 or 3.12' in result.stderr
    assert f'PYTHON={old} {wrong}' in result.stderr
    assert not (tmp_path / 'venv').exists()


def no_python(tmp_path, stack=STACK):
    """The sentence where the PATH holds nothing but ``tmp_path``."""
    result = shell(
        '/bin/sh',
        'tools/setup/find_python.sh',
        tmp_path / 'venv',
        stack,
        PATH=str(tmp_path))
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    return result.stderr


def test_no_python_is_one_sentence(tmp_path):
    assert 'none was found: install one' in no_python(tmp_path)
    python(tmp_path, 'sitecustomize',
           'import sys; sys.version_info = 3, 14, 0')
    for stack in ('openmmlab', 'onedl'):
        assert 'none was found (python3.11 is Python 3.14)' in no_python(
            tmp_path, stack)


def test_the_forks_alone_take_python_3_13(tmp_path):
    """As mmcv 2.1.0 cannot be built with it."""
    new = python(tmp_path, 'sitecustomize',
                 'import sys; sys.version_info = 3, 13, 0')
    for stack in ('onedl', 'openmmlab', 'cls'):
        result = shell('sh', 'tools/setup/find_python.sh', tmp_path / 'venv',
                       stack, new)
        if stack == 'onedl':
            assert result.stdout == f'{new}\n'
        else:
            assert '3.13 with MMDIST_STACK=onedl' in result.stderr


def test_python_without_venv_is_named(tmp_path):
    python(tmp_path, 'ensurepip', 'raise ImportError')
    package = 'python{}.{}-venv'.format(*sys.version_info)
    assert (f'and python3.11 lacks its venv module: apt-get install {package}'
            ) in no_python(tmp_path)


# ------------------------------------------------------------ the steps


@pytest.fixture
def setup(tmp_path):
    """A function that sets up a copy of the checkout: its environments have
    no pip, unless the test writes one."""
    for name in ('tools/setup', 'requirements'):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ('setup.py', 'pyproject.toml'):
        (tmp_path / name).touch()
    quick = script(
        tmp_path / 'python', 'case "$*" in "-m venv"*) '
        'set -- "$@" --without-pip ;; esac', f'exec \'{sys.executable}\' "$@"')

    def run(stack=STACK, **env):
        return shell(
            'sh',
            'tools/setup/install.sh',
            'venv',
            stack,
            quick,
            cwd=tmp_path,
            **env)

    return run


def test_unknown_stack_is_one_sentence(setup):
    result = setup('mmlab')
    assert result.returncode == 1
    assert result.stderr == (
        'MMDIST_STACK=mmlab is not one of openmmlab, onedl, cls.\n')


@pytest.mark.parametrize('output, sentence', [
    (None, 'no '),
    ('Python.h: No such file', 'headers of Python'),
    ('unrecognized option', 'C++17'),
])
def test_missing_compiler_is_one_sentence(setup, tmp_path, output, sentence):
    """Before anything is downloaded, as there is no wheel of mmcv."""
    compiler = tmp_path / 'compiler'
    if output:
        script(compiler, f'echo "{output}" >&2', 'exit 1')
    result = setup(CXX=str(compiler))
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert result.stderr.startswith(f'{MMCV} has no ready wheel here')
    assert sentence in result.stderr and 'failed' not in result.stdout


@pytest.fixture
def damaged(tmp_path):
    """A file in the place of a wheel of mmcv, which cannot be loaded."""
    version = 'cp{}{}'.format(*sys.version_info)
    torch = requirements('torch')[0].replace('==', '')
    wheels = tmp_path / '.cache' / 'wheels' / f'{version}-{torch}-cpu'
    wheels.mkdir(parents=True)
    name, version = MMCV.split('==')
    wheel = wheels / f'{name.replace("-", "_")}-{version}-py3-none-any.whl'
    wheel.touch()
    return wheel


def test_a_ready_wheel_needs_no_compiler(setup, damaged):
    """The set-up goes on to its first call of pip, which is not there; the
    last lines are shown, and the log is named."""
    result = setup(CXX='no-such-compiler', FORCE_CUDA='0')
    assert result.returncode == 1 and damaged.exists()
    assert 'build tools ... failed' in result.stdout
    assert 'No module named pip' in result.stdout
    assert f'.cache/setup-{STACK}.log' in result.stderr


def test_a_wheel_that_does_not_load_is_not_kept(setup, damaged, tmp_path):
    """It would be built, but for the compiler."""
    (tmp_path / 'modules').mkdir()
    (tmp_path / 'modules' / 'pip.py').touch()  # does nothing, well
    result = setup(
        CXX='no-such-compiler',
        FORCE_CUDA='0',
        PYTHONPATH=str(tmp_path / 'modules'))
    assert result.returncode == 1 and not damaged.exists()
    assert 'damaged or does not suit torch' in result.stdout
    assert 'building it needs a C++ compiler' in result.stderr


def test_other_python_leaves_the_environment_alone(setup, tmp_path):
    (tmp_path / 'venv' / 'bin').mkdir(parents=True)
    script(tmp_path / 'venv' / 'bin' / 'python', 'echo 3.9')
    result = setup()
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert 'made with Python 3.9' in result.stderr


def test_the_other_stack_is_refused(setup, tmp_path):
    (tmp_path / 'venv').mkdir()
    other = 'openmmlab' if STACK == 'onedl' else 'onedl'
    (tmp_path / 'venv' / 'stack.txt').write_text(f'{other}\n')
    result = setup()
    assert result.returncode == 1 and result.stderr.count('\n') == 1
    assert f'holds the {other} stack' in result.stderr
    assert "rm -rf 'venv'" in result.stderr


@other_stacks
def test_steps_run_once_and_go_on(setup, tmp_path):
    """With a pip that notes its calls, and fails where `broken` is."""
    modules = tmp_path / 'modules'
    modules.mkdir()
    for name in ('cv2', 'mmcv', 'mmengine', 'mmpretrain'):
        (modules / f'{name}.py').touch()
    (modules / 'pip.py').write_text(
        'import os, sys\n'
        f'os.chdir({str(tmp_path)!r})\n'
        'open("calls", "a").write(" ".join(sys.argv[1:]) + "\\n")\n'
        'assert not (os.path.exists("broken") and "torch" in sys.argv[-1]), 42'
    )

    def calls():
        """Whether it went well, and the last lists of each call of pip."""
        (tmp_path / 'calls').write_text('')
        result = setup('cls', PYTHONPATH=str(modules))
        lines = (tmp_path / 'calls').read_text().splitlines()
        return result, [Path(line.split()[-1]).stem for line in lines]

    (tmp_path / 'broken').touch()
    result, ran = calls()
    assert result.returncode == 1 and ran == ['build', 'torch-cls']
    assert 'AssertionError: 42' in result.stdout
    (tmp_path / 'broken').unlink()
    result, ran = calls()
    assert result.returncode == 0 and ran == ['build', 'torch-cls', 'dev']
    assert (tmp_path / 'venv' / 'gpu.env').read_text() == ''
    result, ran = calls()
    assert result.returncode == 0 and not result.stdout and not ran
    (tmp_path / 'requirements' / 'cls.txt').write_text('mmengine==0.10.6\n')
    assert calls()[1] == ['build', 'torch-cls', 'dev']


def test_a_second_make_says_that_it_waits(setup, tmp_path):
    (tmp_path / '.cache').mkdir()
    waits = tmp_path / 'waits'
    # a make that ends as soon as the other one says that it waits
    with open(tmp_path / '.cache' / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        first = subprocess.Popen(
            ['sh', '-c', f"until [ -s '{waits}' ]; do sleep 0.1; done"],
            pass_fds=[lock.fileno()])
    with open(waits, 'w') as output:
        second = subprocess.run([
            'sh', 'tools/setup/install.sh', 'venv', STACK, tmp_path / 'python'
        ],
                                cwd=tmp_path,
                                stdout=output,
                                stderr=output)
    assert first.wait() == 0 and second.returncode == 1  # there is no pip
    assert 'waiting for it' in waits.read_text().splitlines()[0]


@pytest.mark.parametrize('gpu, torch, nvcc, kind, why', [
    (False, '12.8', '12.8', 'cpu', ''),
    (True, '12.8', '12.4', 'cu128', ''),
    (True, '13.0', '12.8', 'cpu', 'nvcc is of CUDA 12.8, torch of CUDA 13.0'),
    (True, '13.0', None, 'cpu', 'there is no working nvcc'),
    (True, None, '12.8', 'cpu', 'torch is a CPU build'),
])
def test_cuda_needs_a_suitable_nvcc(tmp_path, gpu, torch, nvcc, kind, why):
    module = tmp_path / 'venv' / 'lib' / 'python3.11' / 'site-packages/torch'
    module.mkdir(parents=True)
    (module / 'version.py').write_text(f'cuda: Optional[str] = {torch!r}\n')
    for folder in ('bin', 'dev'):
        (tmp_path / folder).mkdir()
    if gpu:
        (tmp_path / 'dev' / 'nvidia0').touch()
    if nvcc:
        script(tmp_path / 'bin' / 'nvcc',
               f'echo Cuda compilation tools, release {nvcc}, V{nvcc}.1')
    for force in ('', '0'):
        result = shell(
            'sh',
            'tools/setup/cuda.sh',
            tmp_path / 'venv',
            tmp_path / 'dev',
            FORCE_CUDA=force,
            CUDA_HOME=str(tmp_path),
            PATH='/usr/bin:/bin')
        assert result.returncode == 0
        assert result.stdout == ('cpu\n' if force else f'{kind}\n')
        assert bool(result.stderr) == bool(why and not force)
        assert force or why in result.stderr


@pytest.mark.skipif(not shutil.which('g++'), reason='there is no g++')
def test_headers_are_parsed_once(tmp_path):
    """The compiler takes its precompiled header for a second file, too."""
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch' /
     'types.h').write_text('#pragma once\nstatic int of_torch = 3;\n')
    for name in ('a', 'b c'):
        source = tmp_path / f'{name}.cpp'
        source.write_text('#include <torch/types.h>\nint x = of_torch;\n')
        result = shell(
            ROOT / 'tools' / 'setup' / 'precompiling-c++',
            '-MMD',
            '-MF',
            tmp_path / 'x.d',
            '-H',
            f'-I{tmp_path}',
            '-c',
            '-c',  # as torch does
            source,
            '-o',
            f'{source}.o',
            MMDIST_HEADERS=str(tmp_path),
            MMDIST_CXX='g++')
        assert result.returncode == 0 and Path(f'{source}.o').exists()
        header, = tmp_path.glob('*/torch_headers.h.gch')
        assert f'! {header}' in result.stderr  # "!" for one that is used


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
