"""Make the virtual environment of mmdist, one resumable step after another.

Run by ``make`` through ``install.sh``; needs the standard library only.
A finished step leaves a stamp in the environment. The stamp holds a hash of
what the step depends on, its predecessors included, so that a changed pin
redoes its own step and those after it, and an interrupted set-up goes on at
the step it was in.
"""
import argparse
import contextlib
import fcntl
import hashlib
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / '.cache'
# stack: its lists of requirements, first that of torch
STACKS = {
    'openmmlab': ('torch', 'openmmlab'),
    'onedl': ('torch', 'onedl'),
    'cls': ('torch-cls', 'cls', 'mmpretrain', 'timm'),
}
CGROUP = Path('/sys/fs/cgroup')
# on one core of 2024, for the estimate printed before a build
SECONDS_PER_FILE = 3
SECONDS_PER_HEADER = 25
PROGRAM = '#include <Python.h>\n#include <optional>\nint main() {}\n'
PROGRESS = re.compile(r'\[\d+/\d+\]|Downloading|Installing|Precompiling')
# mmcv itself cannot be imported yet: its dependencies come later
LOAD_OPS = '''
import importlib.metadata, importlib.util, pathlib, sys, sysconfig, torch
name, version, kind = sys.argv[1:]
assert importlib.metadata.version(name) == version
folder = pathlib.Path(sysconfig.get_paths()['platlib'], 'mmcv')
ops = importlib.util.spec_from_file_location(
    'mmcv._ext', next(folder.glob('_ext*.so')))
ops = importlib.util.module_from_spec(ops)
assert kind == 'cpu' or ops.get_compiling_cuda_version() != 'not available'
'''
# MMEngine takes the GPU if there is one, with or without mmcv's operators for
# it: the Makefile reads this file
CHECK = '''
import pathlib, sys
import mmcv.ops, mmdet, mmengine, mmseg
cuda = mmcv.ops.get_compiling_cuda_version() != 'not available'
pathlib.Path(sys.prefix, 'gpu.env').write_text(
    '' if cuda else 'export CUDA_VISIBLE_DEVICES=\\n')
'''
CHECK_WITHOUT_OPS = '''
import pathlib, sys
import mmcv, mmengine, mmpretrain
pathlib.Path(sys.prefix, 'gpu.env').write_text('')
'''


class SetupError(Exception):
    """What the user reads: a sentence, not a traceback."""


def requirements(name):
    """The file's lines without comments."""
    text = (ROOT / 'requirements' / f'{name}.txt').read_text()
    return [x for x in text.splitlines() if x and not x.startswith('#')]


def distributions(stack):
    """{'mmcv': '2.1.0', ...}, or the forks' names and versions."""
    pins = (line.partition('==') for line in requirements(stack))
    return {name: version for name, _, version in pins if 'mm' in name}


def mmcv_requirement(stack):
    """('mmcv', '2.1.0'), or the fork's name and version."""
    return next(x for x in distributions(stack).items() if 'mmcv' in x[0])


def cgroup(name):
    """The numbers of a container's limit; none where there is no limit."""
    try:
        return [float(x) for x in (CGROUP / name).read_text().split()]
    except (OSError, ValueError):  # no such file, or "max"
        return []


def compile_jobs():
    """All cores, unless the memory would not do: a compiler takes 1.5 GB."""
    jobs = os.environ.get('MAX_JOBS')
    if jobs and jobs.isdigit():
        return int(jobs)
    try:
        limits = [len(os.sched_getaffinity(0))]
    except AttributeError:  # macOS
        limits = [os.cpu_count() or 1]
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        limits.append(memory / 1.5e9)
    limits += [x / 1.5e9 for x in cgroup('memory.max')]
    if share := cgroup('cpu.max'):
        limits.append(math.ceil(share[0] / share[1]))
    return max(1, int(min(limits)))


def has_gpu():
    return any(Path('/dev').glob('nvidia[0-9]*')) or Path('/dev/dxg').exists()


def nvcc_release():
    """'12.8', of the compiler that torch would take, or None."""
    home = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH')
    nvcc = f'{home}/bin/nvcc' if home else shutil.which('nvcc')
    try:
        result = subprocess.run(
            [nvcc or '/usr/local/cuda/bin/nvcc', '--version'],
            capture_output=True,
            text=True)
    except OSError:
        return None
    found = re.search(r'release (\d+\.\d+)', result.stdout)
    return found and found[1]


def take_lock():
    """The lock file, locked: of two makes at a time the second waits."""
    lock = open(CACHE / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('Another make is setting up here; waiting for it.', flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


class Screen:
    """One line a step: rewritten on a terminal, sparse in a log."""

    def __init__(self):
        self.live = sys.stdout.isatty()
        self.last = time.monotonic()

    def update(self, text, every=30):
        """Show a passing state; in a log at most once in ``every`` s."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print(f'\r\033[K{text[:width]}', end='', flush=True)
        elif time.monotonic() - self.last >= every:
            self.last = time.monotonic()
            print(text, flush=True)

    def done(self, text):
        self.last = time.monotonic()
        print(f'\r\033[K{text}' if self.live else text, flush=True)


class Runner:
    """Runs commands: output to the log, progress to the screen.

    The commands inherit the descriptors ``pass_fds``: while one of them is
    left, a killed set-up keeps its lock.
    """

    def __init__(self, log, pass_fds=()):
        self.log = log
        self.pass_fds = pass_fds
        self.screen = Screen()

    def __call__(self, title, command, env=None, cwd=None, check=True):
        start = time.monotonic()
        with open(self.log, 'ab') as log:
            log.write(f'\n$ {" ".join(map(str, command))}\n'.encode())
            log.flush()
            offset = log.tell()
            process = subprocess.Popen([str(x) for x in command],
                                       cwd=cwd,
                                       env=dict(os.environ, **(env or {})),
                                       pass_fds=self.pass_fds,
                                       start_new_session=True,
                                       stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE,
                                       stderr=subprocess.STDOUT)
            state = {'line': ''}
            reader = threading.Thread(
                target=self._read, args=(process.stdout, log, state))
            reader.start()
            try:
                while reader.is_alive():
                    reader.join(1)
                    self._show(title, state, time.monotonic() - start)
            except BaseException:
                self._stop(process, reader)
                raise
            code = process.wait()
        if code and check:
            self.screen.done(f'{title}: failed')
            self._tail(offset)
            raise SetupError(
                f'The whole log is in {os.path.relpath(self.log)}. Once the '
                'cause is removed, the same command goes on from here.')
        return code

    @staticmethod
    def _stop(process, reader):
        """End the command and all that it started, compilers included."""

        def signal_all(number):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, number)

        try:
            # the first lets pip remove its gigabytes of temporary files
            for number in (signal.SIGINT, signal.SIGTERM):
                signal_all(number)
                reader.join(5)
        finally:
            signal_all(signal.SIGKILL)
            process.wait()
            reader.join(10)  # it writes to the log, which is closed next

    @staticmethod
    def _read(pipe, log, state):
        for line in pipe:
            log.write(line)
            log.flush()
            text = line.decode(errors='replace').strip()
            if PROGRESS.match(text):
                state['line'] = text

    def _show(self, title, state, elapsed):
        line, every = state['line'], 30
        count = re.match(r'\[(\d+)/(\d+)\]', line)
        if count:
            done, total = map(int, count.groups())
            before, since = state.setdefault('first', (done, elapsed))
            line, every = count[0], 10
            if done > before + 2:
                left = (elapsed - since) / (done - before) * (total - done)
                line += f' about {duration(left)} left'
        elif line.startswith('Installing'):
            line = 'Installing'
        self.screen.update(f'{title}: {duration(elapsed)}  {line}', every)

    def _tail(self, offset, lines=15):
        with open(self.log, 'rb') as log:
            log.seek(offset)
            text = log.read().decode(errors='replace').splitlines()
        print(*(f'    {x[:200]}' for x in text[-lines:]), sep='\n')


class Setup:

    def __init__(self, venv, stack, pass_fds=()):
        self.venv = venv
        self.stack = stack
        self.python = venv / 'bin' / 'python'
        self.stamps = venv / '.stamps'
        self.title = ''
        self.run = Runner(CACHE / f'setup-{stack}.log', pass_fds)
        version = '{}.{}'.format(*sys.version_info)
        self.key = f'{version} {stack} {ROOT}'
        self.lists = *STACKS[stack], 'runtime', 'dev'
        # mmcv-lite has none
        self.with_ops = mmcv_requirement(stack)[0] != 'mmcv-lite'
        # name, what it depends on (asked when its turn comes), what it does
        self.steps = [
            ('environment', str, self.make_venv),
            ('build tools', lambda: requirements('build'), self.build_tools),
            ('torch', lambda: requirements(self.lists[0]), self.torch),
            ('mmcv', lambda: [*mmcv_requirement(stack), self.kind], self.mmcv),
            ('packages', lambda: [*map(requirements, self.lists)] +
             requirements('constraints'), self.packages),
            ('mmdist', (ROOT / 'setup.py').read_text, self.mmdist),
            ('check', lambda: self.check_code, self.check),
        ]
        if not self.with_ops:
            self.steps = [x for x in self.steps if x[0] != 'mmcv']

    def __call__(self):
        self.check_environment()
        start, ran = time.monotonic(), 0
        for number, (name, depends, action) in enumerate(self.steps, 1):
            self.key = hashlib.sha256(
                f'{self.key} {name} {depends()}'.encode()).hexdigest()
            stamp = self.stamps / name.replace(' ', '-')
            if stamp.exists() and stamp.read_text() == self.key:
                continue
            if not ran:
                print(
                    f'Setting up {self.venv.name} with Python '
                    f'{sys.version.split()[0]} and the {self.stack} stack: '
                    'a few minutes and the download of torch\n(log: '
                    f'{os.path.relpath(self.run.log)}; interrupted, it goes '
                    'on where it was)',
                    flush=True)
            ran += 1
            self.title = f'[{number}/{len(self.steps)}] {name}'
            began = time.monotonic()
            note = action()
            stamp.parent.mkdir(exist_ok=True)
            stamp.write_text(self.key)
            self.run.screen.done(f'{self.title}: {note or "done"} '
                                 f'({duration(time.monotonic() - began)})')
        if ran:
            print(f'Set-up finished in {duration(time.monotonic() - start)}.')

    def pip(self, *args, check=True):
        return self.run(
            self.title, [self.python, '-m', 'pip', *args],
            env={'PIP_DISABLE_PIP_VERSION_CHECK': '1'},
            check=check)

    def install(self, *args, check=True):
        return self.pip(
            'install', '--progress-bar=off', '--no-input', *args, check=check)

    def works(self, code, *args):
        command = [self.python, '-c', code, *args]
        return self.run(self.title, command, check=False) == 0

    # -- the steps --------------------------------------------------------

    def check_environment(self):
        """A half-made environment is completed, another's is left alone."""
        config = self.venv / 'pyvenv.cfg'
        if not self.python.exists():
            shutil.rmtree(self.stamps, ignore_errors=True)
        found = config.exists() and re.search(r'version\s*=\s*(\d+\.\d+)',
                                              config.read_text())
        mine = '{}.{}'.format(*sys.version_info)
        if found and found[1] != mine:
            raise SetupError(
                f'{self.venv.name} was made with Python {found[1]}, not '
                f'{mine}: remove it (rm -rf '
                f'{shlex.quote(self.venv.name)}) to change.')
        # the two sets would overwrite each other's files
        installed = {
            x.name.split('-')[0].replace('_', '-').lower()
            for x in self.venv.glob('lib/*/site-packages/*.dist-info')
        }
        for other in STACKS:
            both = installed & (
                distributions(other).keys() - distributions(self.stack).keys())
            if other != self.stack and both:
                raise SetupError(
                    f'{self.venv.name} holds {sorted(both)[0]} of the {other} '
                    f'stack, not the {self.stack} one: remove it (rm -rf '
                    f'{shlex.quote(self.venv.name)}) to change.')

    def make_venv(self):
        # the Python that it was made from may be gone
        broken = self.python.is_symlink() and not self.python.exists()
        self.run(self.title, [
            sys.executable, '-m', 'venv', *(['--clear'] if broken else []),
            self.venv
        ])
        # now, before gigabytes of torch are fetched in vain
        problem = self.with_ops and self.compiler_problem()
        if problem and not (self.mmcv_loads() or self.find_wheel()):
            raise SetupError(problem)

    def build_tools(self):
        self.install('-r', ROOT / 'requirements' / 'build.txt')

    def torch(self):
        if sys.platform == 'linux':
            print(
                f'      {requirements(self.lists[0])[0]}: several GB, the '
                'CUDA build, unless pip is pointed to a CPU build '
                '(docs/en/install.md)',
                flush=True)
        self.install('-r', ROOT / 'requirements' / f'{self.lists[0]}.txt')

    def packages(self):
        folder = ROOT / 'requirements'
        files = [folder / f'{x}.txt' for x in self.lists]
        self.install('-c', folder / 'constraints.txt',
                     *(x for file in files for x in ('-r', file)))
        # the metadata asks for opencv-python, which needs a system's libGL
        if not self.works('import cv2'):
            found = next(self.venv.glob('lib/*/*/opencv_python-*.dist-info'))
            self.install(
                '--force-reinstall', '--no-deps',
                f'opencv-python-headless=={found.stem.split("-")[1]}')
            return 'done, with OpenCV headless for want of libGL'

    def mmdist(self):
        # not `pip install -e`: its metadata lies where the package does not,
        # so that mim finds neither configs nor tools (nor in compat mode)
        self.run(
            self.title,
            [self.python, ROOT / 'setup.py', '-q', 'develop', '--no-deps'],
            cwd=ROOT)

    @property
    def check_code(self):
        return CHECK if self.with_ops else CHECK_WITHOUT_OPS

    def check(self):
        self.run(self.title, [self.python, '-c', self.check_code])

    # -- mmcv -------------------------------------------------------------

    def mmcv(self):
        if self.mmcv_loads():
            return 'already there'
        if why := self.cuda()[1]:
            print(
                f'      mmcv gets no CUDA operators, as {why}: the GPU stays '
                'unused (docs/en/install.md)',
                flush=True)
        wheel = self.find_wheel()
        if wheel:
            if self.use(wheel):
                return f'took the wheel {wheel.name}'
            print(f'      {wheel.name} is damaged or does not suit torch')
            wheel.unlink()
            if problem := self.compiler_problem():
                raise SetupError(problem)
        source = self.unpack()
        wheel = self.build(source)
        if not self.use(wheel):
            raise SetupError(f'{wheel} was built but does not load.')
        shutil.rmtree(source)
        return 'built'

    def use(self, wheel):
        """Install a wheel; whether that went well and it loads."""
        code = self.install(
            '--no-deps', '--force-reinstall', wheel, check=False)
        return code == 0 and self.mmcv_loads()

    def mmcv_loads(self):
        return self.works(LOAD_OPS, *mmcv_requirement(self.stack), self.kind)

    def cuda(self):
        """What mmcv is to be built for ('cpu', 'cu128'), and why not CUDA."""
        if os.environ.get('FORCE_CUDA') == '0' or not has_gpu():
            return 'cpu', None
        # read, as importing torch would take seconds of every make
        version = next(
            self.venv.glob('lib/*/site-packages/torch/version.py'), None)
        torch = version and re.search(r"^cuda\b.*'([\d.]+)'",
                                      version.read_text(), re.MULTILINE)
        if not torch:
            return 'cpu', 'torch is a CPU build'
        nvcc = nvcc_release()
        if not nvcc:
            return 'cpu', 'there is no working nvcc'
        if nvcc.split('.')[0] != torch[1].split('.')[0]:
            return 'cpu', f'nvcc is of CUDA {nvcc}, torch of CUDA {torch[1]}'
        return f'cu{torch[1].replace(".", "")}', None

    @property
    def kind(self):
        return self.cuda()[0]

    @property
    def wheels(self):
        """One folder for all that a wheel has to suit."""
        torch = requirements('torch')[0].replace('==', '')
        python = 'cp{}{}'.format(*sys.version_info)
        return CACHE / 'wheels' / f'{python}-{torch}-{self.kind}'

    @contextlib.contextmanager
    def incoming(self):
        """A folder whose wheel joins the others only when it is complete."""
        self.wheels.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.wheels) as folder:
            yield folder
            for wheel in Path(folder).glob('*.whl'):
                wheel.replace(self.wheels / wheel.name)

    def find_wheel(self):
        """A wheel built here before, or one that pip is pointed to."""
        name, version = mmcv_requirement(self.stack)
        pattern = f'{name.replace("-", "_")}-{version}-*.whl'
        if not list(self.wheels.glob(pattern)):
            with self.incoming() as folder:
                self.pip(
                    'download',
                    '--quiet',
                    '--no-deps',
                    '--only-binary=:all:',
                    f'--dest={folder}',
                    f'{name}=={version}',
                    check=False)
        return next(self.wheels.glob(pattern), None)

    def compiler_problem(self):
        """Compile a few lines; the sentence to end with if that fails."""
        compiler = os.environ.get('CXX') or 'c++'
        name = '{}=={}'.format(*mmcv_requirement(self.stack))
        need = f'{name} has no ready wheel here and building it needs '
        if not shutil.which(compiler.split()[0]):
            return (f'{need}a C++ compiler, but there is no {compiler}: '
                    'install one (for instance: apt-get install g++) or set '
                    'CXX.')
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, 'try.cpp')
            source.write_text(PROGRAM)
            include = sysconfig.get_paths()['include']
            command = [
                *compiler.split(), '-std=c++17', f'-I{include}', '-c',
                str(source), '-o', f'{source}.o'
            ]
            result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            what = 'a compiler of C++17'
            if 'Python.h' in result.stderr:
                what = 'the headers of Python (such as python3-dev)'
            error = (result.stderr.strip() or 'nothing').splitlines()[0]
            return f'{need}{what}, and {compiler} says: {error}'

    def unpack(self):
        """The source, where an interrupted build has left it."""
        name, version = mmcv_requirement(self.stack)
        parent = self.wheels / 'build'
        source = parent / f'{name.replace("-", "_")}-{version}'
        if not source.exists():
            shutil.rmtree(parent, ignore_errors=True)
            self.pip('download', '--no-deps', '--no-build-isolation',
                     f'--no-binary={name}', f'--dest={parent}',
                     f'{name}=={version}')
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                with tarfile.open(next(parent.glob('*.tar.gz'))) as archive:
                    # early releases of Python 3.10 and 3.11 have no filters
                    archive.extraction_filter = getattr(
                        tarfile, 'data_filter', None)
                    archive.extractall(folder)
                next(Path(folder).iterdir()).rename(source)
        return source

    def build(self, source):
        jobs = compile_jobs()
        operators = source / 'mmcv' / 'ops' / 'csrc' / 'pytorch'
        files = len([*operators.glob('*.cpp'), *operators.glob('cpu/*.cpp')])
        seconds = SECONDS_PER_HEADER + files * SECONDS_PER_FILE / jobs
        minutes = math.ceil(seconds / 60)
        cpu = self.kind == 'cpu'
        more = '' if cpu else ', and much longer for those of CUDA'
        print(
            f'      no ready wheel: building {source.name} from source, '
            f'{files} files on {jobs} core(s), about {minutes} min{more}, '
            'once',
            flush=True)
        env = {
            'MMCV_WITH_OPS': '1',
            'MAX_JOBS': str(jobs),
            # half the time of the default flags
            'CFLAGS': '-g0 -O1',
            'CXXFLAGS': '-g0 -O1',
            # else mmcv's setup.py decides by whether torch sees a GPU
            'FORCE_CUDA': '0' if cpu else '1',
        }
        if cpu:
            env['CUDA_VISIBLE_DEVICES'] = ''
        with self.incoming() as folder:
            self.run(
                self.title, [
                    self.python, ROOT / 'tools' / 'setup' / 'build_mmcv.py',
                    'bdist_wheel', f'--dist-dir={folder}'
                ],
                env=env,
                cwd=source)
        return self.find_wheel()


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('venv', type=Path)
    parser.add_argument('stack')
    return parser.parse_args()


def stop(*_):
    raise KeyboardInterrupt


def main():
    args = parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    try:
        if args.stack not in STACKS:
            raise SetupError(f'MMDIST_STACK={args.stack} is not one of '
                             f'{", ".join(STACKS)}.')
        CACHE.mkdir(exist_ok=True)
        with take_lock() as lock:
            Setup(args.venv.absolute(), args.stack, [lock.fileno()])()
    except SetupError as error:
        sys.exit(f'{error}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted; the same command goes on from here.')


if __name__ == '__main__':
    main()
