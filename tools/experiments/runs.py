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
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from mmengine.config import Config
from rich.console import Console

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


class Metric(NamedTuple):
    """The number by which models are compared."""
    key: str  # in MMEngine's logs
    title: str
    format: str

    def show(self, value: float) -> str:
        """The metric as text."""
        return format(value, self.format)


class StepError(Exception):
    """A command failed, or something waits for one that did."""


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
    tests: bool = True  # whether tools/test.py follows

    def __post_init__(self) -> None:
        self.needs = [self.teacher] if self.teacher else []
        self.record_file = self.folder / 'train.json'
        self.cfg = copy.deepcopy(read_config(self.config))
        self.cfg.merge_from_dict(self.options)
        self.seed = self.cfg.randomness.seed
        loop = self.cfg.train_cfg
        self.unit = 'iter' if loop.get('max_iters') else 'epoch'
        self.length = loop.get('max_iters') or loop.max_epochs
        # The last one; never a picked one.
        self.checkpoint = self.folder / f'{self.unit}_{self.length}.pth'

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

    def carry_out(self, crew: 'Crew') -> None:
        """Do what is left, and say each validation."""
        if not self.trained:
            command = self.prepare()
            before, told = self.seconds, set()

            def watch(seconds: float) -> None:
                self.save(before + seconds)
                self.tell_validation(crew, told)

            crew.call(f'train {self.label}', command,
                      self.folder / 'train.log', lambda: self.trained, watch)
        if self.tests and self.tested() is None:
            crew.call(f'test {self.label}', self.command('test'),
                      self.folder / 'test.log',
                      lambda: self.tested() is not None)

    def tell_validation(self, crew: 'Crew', told: set) -> None:
        """Say the metric of the last validation, once."""
        for step, value in [*self.validations().items()][-1:]:
            if step not in told:
                told.add(step)
                crew.say(f'train {self.label}: {self.unit} {step}/'
                         f'{self.length}, {self.metric.title} '
                         f'{self.metric.show(value)}')


class Crew:
    """Carries out runs, several at a time, with a line for each event."""

    def __init__(self, console: Console, jobs: int = SIDE_BY_SIDE) -> None:
        self.console, self.jobs = console, jobs
        self.stop, self.inherited = Event(), ()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def call(self,
             name: str,
             words: List[str],
             log: Path,
             complete: Callable[[], bool],
             watch: Callable[[float], None] = lambda seconds: None) -> None:
        """Run ``python WORDS``; end it and its workers when the crew stops.

        ``watch`` is told the seconds it has run, from time to time. It is a
        StepError if the command fails or leaves something that is not
        ``complete``.
        """
        verb = 'goes on' if '--resume' in words else 'begins'
        self.say(f'{name}: {verb}, log in {short(log)}')
        begun = time.monotonic()
        with open(log, 'a') as file:
            file.write(f'$ {shlex.join(["python", *words])}\n')
            file.flush()
            process = subprocess.Popen([sys.executable, *words],
                                       cwd=ROOT,
                                       env=environment(self.jobs),
                                       stdout=file,
                                       stderr=subprocess.STDOUT,
                                       start_new_session=True,
                                       pass_fds=self.inherited)
        try:
            while process.poll() is None and not self.stop.wait(POLL_SECONDS):
                watch(time.monotonic() - begun)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
                    break
        seconds = time.monotonic() - begun
        watch(seconds)
        if process.returncode or not complete():
            raise StepError(f'"{name}" failed (exit code {process.returncode})'
                            f'; see {short(log)}')
        self.say(f'{name}: done, {seconds / 60:.1f} min')

    def carry_out(
            self,
            runs: List[Run],
            ended: Callable[[Run], None] = lambda run: None) -> List[str]:
        """Do what is left of runs, each once those that it needs are trained.

        A failure stops what needs the failed run; the others go on. Runs are
        anything with `label`, `needs`, `done` and `carry_out`, the most urgent
        first. ``ended`` is called with each that ended well. Returned is what
        failed, and what waits for it.
        """
        waiting = [run for run in runs if not run.done]
        running, failures = {}, []
        self.stop.clear()
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                while True:
                    ready = [
                        run for run in waiting
                        if all(need.trained for need in run.needs)
                    ]
                    for run in ready[:self.jobs - len(running)]:
                        waiting.remove(run)
                        running[pool.submit(run.carry_out, self)] = run
                    if not running:
                        break
                    for future in wait(running, None, FIRST_COMPLETED).done:
                        run = running.pop(future)
                        try:
                            future.result()
                        except StepError as error:
                            failures.append(str(error))
                            self.say(str(error))
                        else:
                            ended(run)
            finally:
                self.stop.set()
        return failures + [
            f'"{run.label}" waits for what failed' for run in waiting
        ]

    @contextlib.contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Keep other calls, and orphans of a killed one, out of a folder.

        Commands inherit the lock, so that it is held until all have ended.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / '.lock', 'w') as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say('Another call, or a training of one that was killed, '
                         f'still works in {short(folder)}; waiting for it.')
                fcntl.flock(file, fcntl.LOCK_EX)
            self.inherited = [file.fileno()]
            yield


def end_like_ctrl_c() -> None:
    """Treat other signals that end a tool as Ctrl-C: no child stays behind.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)


def environment(jobs: int) -> Dict[str, str]:
    """Share the cores between the processes that run side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count()
    threads = str(min(MAX_THREADS, max(1, cores // jobs)))
    return dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


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
