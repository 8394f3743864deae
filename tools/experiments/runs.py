"""Trainings by ``tools/train.py``, several at a time, which can be resumed.

Shared by ``make demo`` and ``tools/run_experiments.py``.
"""
import contextlib
import copy
import fcntl
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from mmengine.config import Config

from mmdist.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = 2
MAX_THREADS = 4  # models this small do not use more
POLL_SECONDS = 1
# Another version of any of these may give other results.
VERSIONED = ('mmdist', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg',
             'mmpretrain')
# These fields of a config change what is logged and written, not the model.
NOT_HASHED = ('randomness', 'default_hooks', 'custom_imports', 'log_level',
              'log_processor', 'vis_backends', 'visualizer')
read_config = functools.lru_cache(None)(Config.fromfile)
say = functools.partial(print, flush=True)


class Metric(NamedTuple):
    """The number by which models are compared."""
    key: str  # in MMEngine's logs
    title: str
    format: str

    def show(self, value: float) -> str:
        """The metric as text."""
        return format(value, self.format)


@dataclass(eq=False)
class Run:
    """One model, which is trained and, if wanted, tested."""
    label: str  # its name in log lines
    config: Path
    folder: Path  # its work dir
    options: Dict[str, Any]  # for --cfg-options
    metric: Metric
    manifest: dict  # describes its data
    teacher: Optional['Run'] = None
    tests: bool = False  # whether tools/test.py follows

    def __post_init__(self) -> None:
        self.record_file = self.folder / 'train.json'
        self.cfg = copy.deepcopy(read_config(self.config))
        self.cfg.merge_from_dict(self.options)
        self.seed = self.cfg.randomness.seed
        loop = self.cfg.train_cfg
        self.unit = 'iter' if loop.get('max_iters') else 'epoch'
        self.length = loop.get('max_iters') or loop.max_epochs
        # The last one; never a picked one.
        self.checkpoint = self.folder / f'{self.unit}_{self.length}.pth'
        self.told = 0

    @functools.cached_property
    def key(self) -> str:
        """A hash of what is trained, without the seed, the place of the data,
        the versions of packages, and what only logs and writes."""
        cfg = self.cfg.to_dict()
        for field in NOT_HASHED:
            cfg.pop(field, None)
        if self.teacher:
            cfg['model']['teacher'].update(config=None, checkpoint=None)
        text = json.dumps(cfg, default=str, sort_keys=True)
        if cfg.get('data_root'):
            root = cfg['data_root'].rstrip('/')
            text = re.sub(rf'"{re.escape(root)}(?=["/])', '"', text)
        teacher = self.teacher and (self.teacher.key, self.teacher.seed)
        text = json.dumps([text, self.manifest, teacher], default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def seconds(self) -> Optional[float]:
        """Time spent on this very training so far; None if it never began."""
        record = read_json(self.record_file)
        known = record.get('of') == [self.key, self.seed, versions()]
        return record['seconds'] if known else None

    def save(self, seconds: float) -> None:
        """Note how long this very training took so far."""
        partial = self.record_file.with_suffix('.partial')
        of = [self.key, self.seed, versions()]
        partial.write_text(json.dumps(dict(of=of, seconds=seconds)))
        partial.replace(self.record_file)

    def validations(self) -> Dict[int, float]:
        """The metric by epoch, or by iteration."""
        return {
            entry['step']: entry[self.metric.key]
            for entry in read_scalars(self.folder) if self.metric.key in entry
        }

    def validated(self) -> Optional[float]:
        """The metric after the last epoch; None if it is not known."""
        return self.validations().get(self.length)

    def tested(self) -> Optional[float]:
        """The metric of the test; None if it is not known."""
        files = sorted(self.folder.glob('test/*/*.json'))
        return read_json(files[-1]).get(self.metric.key) if files else None

    @property
    def trained(self) -> bool:
        """Whether this very training ended, and its checkpoint is whole."""
        return (self.seconds is not None
                and zipfile.is_zipfile(self.checkpoint)
                and self.validated() is not None)

    @property
    def done(self) -> bool:
        """Whether nothing is left to be trained and tested."""
        return self.trained and not (self.tests and self.tested() is None)

    def command(self, tool: str) -> List[str]:
        """The command that trains or tests it, after ``python``."""
        words, folder = [f'tools/{tool}.py', short(self.config)], self.folder
        if tool == 'test':
            words.append(short(self.checkpoint))
            folder = folder / 'test'
        words += ['--work-dir', short(folder)]
        if self.options:
            words.append('--cfg-options')
        return words + [f'{k}={v}' for k, v in self.options.items()]

    def prepare(self) -> List[str]:
        """Make the folder ready; the command, which resumes what was begun.

        After the last checkpoint MMEngine would not validate any more, so
        such a training begins anew. The record stays, so that the folder is
        known if this is interrupted.
        """
        if self.seconds is not None and not self.checkpoint.exists():
            return [*self.command('train'), '--resume']
        if any(self.folder.glob('*')) and not any(self.folder.glob('train.*')):
            raise ConfigError('--work-dir',
                              f'{short(self.folder)} holds other files',
                              'choose another --work-dir')
        for path in self.folder.glob('*'):
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.record_file:
                path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.seconds or 0.)
        return self.command('train')

    def carry_out(self, jobs: int) -> Iterator[None]:
        """Do what is left, as :func:`call` does."""
        if not self.trained:
            words = self.prepare()
            before = self.seconds

            def watch(seconds: float) -> None:
                self.save(before + seconds)
                self.tell_validation()

            yield from call(f'train {self.label}', words,
                            self.folder / 'train.log', jobs, watch)
        if self.trained and not self.done:
            yield from call(f'test {self.label}', self.command('test'),
                            self.folder / 'test.log', jobs)

    def tell_validation(self) -> None:
        """Say the metric of the last validation, once."""
        step, value = max(self.validations().items(), default=(0, 0.))
        if step > self.told:
            self.told = step
            say(f'train {self.label}: {self.unit} {step}/{self.length}, '
                f'{self.metric.title} {self.metric.show(value)}'
                f'{self.remark()}')

    def remark(self) -> str:
        """Text after the metric of an epoch."""
        return ''


def call(
    name: str,
    words: List[str],
    log: Path,
    jobs: int,
    watch: Callable[[float], None] = lambda seconds: None,
) -> Iterator[None]:
    """Run ``python WORDS`` on a share of the cores, and yield until it ends.

    A generator that is closed ends the command and its workers. ``watch`` is
    told the seconds it has run, from time to time.
    """
    verb = 'goes on' if '--resume' in words else 'begins'
    say(f'{name}: {verb}, log in {short(log)}')
    begun, running = time.monotonic(), True
    # PyTorch's own number of threads is for one process
    threads = str(min(MAX_THREADS, max(1, torch.get_num_threads() // jobs)))
    shared = dict(OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    with open(log, 'a') as file:
        file.write(f'$ {shlex.join(["python", *words])}\n')
        file.flush()
        process = subprocess.Popen([sys.executable, *words],
                                   cwd=ROOT,
                                   env={
                                       **os.environ,
                                       **shared
                                   },
                                   stdout=file,
                                   stderr=subprocess.STDOUT,
                                   start_new_session=True,
                                   close_fds=False)  # it keeps the lock
    try:
        while running:
            yield
            running = process.poll() is None
            watch(time.monotonic() - begun)
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
                break
    code, minutes = process.returncode, (time.monotonic() - begun) / 60
    say(f'{name}: failed (exit code {code}), see {short(log)}'
        if code else f'{name}: done, {minutes:.1f} min')


def carry_out(
    runs: List[Run],
    jobs: int = SIDE_BY_SIDE,
    ended: Callable[[Run], None] = lambda run: None,
) -> List[str]:
    """Do what is left of runs, the first ones first, ``jobs`` at a time.

    A run waits until its teacher is trained. A failure stops the runs that
    wait for it; the others go on. ``ended`` gets each that ended well.
    Returned is what failed, and what waits for it.
    """
    waiting, running, failures = [r for r in runs if not r.done], {}, []
    try:
        while True:
            ready = [
                run for run in waiting
                if run.teacher is None or run.teacher.trained
            ]
            for run in ready[:jobs - len(running)]:
                waiting.remove(run)
                running[run] = run.carry_out(jobs)
            if not running:
                break
            before = len(running)
            while len(running) == before:
                for run, work in [*running.items()]:
                    if next(work, True):
                        del running[run]
                        if run.done:
                            ended(run)
                        else:
                            failures.append(f'"{run.label}" failed, see the '
                                            f'logs in {short(run.folder)}')
                time.sleep(POLL_SECONDS)
    finally:
        for work in running.values():
            work.close()
    return failures + [
        f'"{run.label}" waits for what failed' for run in waiting
    ]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other calls, and orphans of a killed one, out of a folder.

    Commands inherit the lock, so that it is held until all have ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say('Another call, or a training of one that was killed, still '
                f'works in {short(folder)}; waiting for it.')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def end_like_ctrl_c() -> None:
    """Treat other signals that end a tool as Ctrl-C: no child stays behind.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)


def versions() -> List[str]:
    """Versions of the packages that are installed."""
    return [
        importlib.import_module(name).__version__ for name in VERSIONED
        if importlib.util.find_spec(name)
    ]


def read_json(path: Path) -> dict:
    """Read a file of JSON; empty if it is missing or broken off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def read_scalars(folder: Path) -> List[dict]:
    """Metrics by epoch, then losses by iteration, of all attempts."""
    merged = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # still being written
                entry = json.loads(line)
                # A resumed training logs the steps of an epoch again.
                merged['loss' in entry, entry.get('step', 0)] = entry
    return [merged[key] for key in sorted(merged)]


def short(path: Path) -> str:
    """A path as a user types it in the root of the checkout."""
    return str(path.relative_to(ROOT) if ROOT in path.parents else path)
