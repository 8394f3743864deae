"""Trainings and tests by ``tools/``, several at a time, which go on later.

What ``make demo`` and ``tools/run_experiments.py`` share.
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
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from mmengine.config import Config
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
SIDE_BY_SIDE = 2
MAX_THREADS = 4  # models this small do not use more
POLL_SECONDS = 1
# Another version of any of these may give other results.
VERSIONED = ('mmdist', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg',
             'mmpretrain')
# MMEngine logs e.g. 'Epoch(train)  [2][ 40/125]  lr: 1e-3  eta: 0:02:10'.
PROGRESS = re.compile(r'(?:Epoch|Iter)\(\w+\) +([][ /\d]+\]) .*?eta: (\S+)')
read_config = functools.lru_cache(None)(Config.fromfile)


class Metric(NamedTuple):
    """The number by which models are compared."""
    key: str  # in MMEngine's logs
    title: str
    format: str

    def show(self, value: float) -> str:
        """The metric as text."""
        return format(value, self.format)


class Run:
    """One model, which is trained and then tested.

    Args:
        label (str): Its name in log lines.
        config (Path): Its config.
        folder (Path): Its work dir.
        options (dict): Values for ``--cfg-options``.
        metric (Metric): The metric by which it is compared.
        manifest (dict): A description of its data.
        teacher (Run, optional): Its teacher. Defaults to None.
    """

    def __init__(self,
                 label: str,
                 config: Path,
                 folder: Path,
                 options: Dict[str, Any],
                 metric: Metric,
                 manifest: dict,
                 teacher: Optional['Run'] = None) -> None:
        self.label, self.config, self.folder = label, config, folder
        self.options, self.metric, self.manifest = options, metric, manifest
        self.teacher = teacher
        self.cfg = copy.deepcopy(read_config(config))
        self.cfg.merge_from_dict(options)
        loop = self.cfg.train_cfg
        self.unit = 'iter' if loop.get('max_iters') else 'epoch'
        self.length = loop.get('max_iters') or loop.max_epochs
        # The last one; never a picked one.
        self.checkpoint = folder / f'{self.unit}_{self.length}.pth'
        self.train = Step(self, 'train', [teacher.train] if teacher else [])
        self.test = Step(self, 'test', [self.train])

    def validated(self) -> Optional[float]:
        """The metric after the last epoch; None if it is not known."""
        found = (e for e in read_scalars(self.folder) if self.metric.key in e)
        return {e['step']: e[self.metric.key] for e in found}.get(self.length)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of everything that the results depend on."""
        return digest([
            self.cfg.to_dict(), self.manifest,
            versions(), self.teacher and self.teacher.fingerprint
        ])


class Step:
    """One call of a tool, with a record of how far it came.

    Args:
        run (Run): The model.
        stage (str): 'train', 'test' or a name for another tool's call.
        needs (list[Step]): Steps that must have ended before.
    """

    def __init__(self, run: Run, stage: str, needs: List['Step']) -> None:
        self.run, self.stage, self.needs = run, stage, needs
        self.name = f'{stage} {run.label}'
        self.folder = run.folder if stage == 'train' else run.folder / stage
        self.record_file = run.folder / f'{stage}.json'
        self.log = run.folder / f'{stage}.log'

    @property
    def arguments(self) -> List[str]:
        """The command after ``python``, without ``--resume``."""
        words = [f'tools/{self.stage}.py', short(self.run.config)]
        if self.stage == 'test':
            words.append(short(self.run.checkpoint))
        words += ['--work-dir', short(self.folder)]
        if self.run.options:
            words.append('--cfg-options')
        return words + [f'{k}={v}' for k, v in self.run.options.items()]

    def output(self) -> Any:
        """The metric of a training or a test; None if it is incomplete."""
        if self.stage == 'train':
            whole = zipfile.is_zipfile(self.run.checkpoint)
            return self.run.validated() if whole else None
        results = [read_json(f) for f in sorted(self.folder.glob('*/*.json'))]
        return results[-1].get(self.run.metric.key) if results else None

    @property
    def record(self) -> dict:
        """The record of this very step; empty if it never began."""
        record = read_json(self.record_file)
        same = record.get('fingerprint') == self.run.fingerprint
        return record if same else {}

    @property
    def seconds(self) -> float:
        """Time spent on it so far, by all attempts."""
        return self.record.get('seconds', 0.)

    @property
    def done(self) -> bool:
        """Whether it ended well and its output is still whole."""
        return self.record.get('ended', False) and self.output() is not None

    def save(self, seconds: float, ended: bool = False) -> None:
        """Write the record."""
        record = dict(
            fingerprint=self.run.fingerprint, seconds=seconds, ended=ended)
        partial = self.record_file.with_suffix('.partial')
        partial.write_text(json.dumps(record))
        partial.replace(self.record_file)

    def prepare(self) -> List[str]:
        """Make the folder ready; the command, which resumes what was begun.

        After the last checkpoint MMEngine would not validate any more, so
        such a training begins anew. Of other files in the folder the record
        stays, so that the folder is known if this is interrupted.
        """
        command = [sys.executable, *self.arguments]
        run, record = self.run, self.record
        if record and self.stage == 'train' and not run.checkpoint.exists():
            return command + ['--resume']
        if any(run.folder.glob('*')) and not any(run.folder.glob('train.*')):
            raise SystemExit(f'{short(run.folder)} holds files that are not '
                             'of such a run; choose another --work-dir.')
        for path in self.folder.glob('*'):
            if path.is_dir():
                shutil.rmtree(path)
            elif path != self.record_file:
                path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save(self.seconds)
        return command

    def start(self, lock: int, jobs: int) -> None:
        """Start the command, which keeps the file descriptor `lock` open."""
        command = self.prepare()
        self.before, self.began = self.seconds, time.monotonic()
        with open(self.log, 'a') as log:
            log.write(f'$ {shlex.join(command)}\n')
            log.flush()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(jobs),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock])

    def poll(self) -> Optional[int]:
        """The exit code, None while it runs; the time is saved."""
        code = self.process.poll()
        ended = code == 0 and self.output() is not None
        self.save(self.before + time.monotonic() - self.began, ended)
        return code

    def stop(self) -> None:
        """End the process and its workers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
                return


class Display:
    """A line per event and, on a terminal, one that shows what runs.

    Args:
        console (Console): Where to print.
        epochs (bool): Whether validations are events. Defaults to True.
    """

    def __init__(self, console: Console, epochs: bool = True) -> None:
        self.console, self.epochs = console, epochs
        self.status = console.status('')
        self.tested: Dict[str, dict] = {}

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, running: List[Step]) -> None:
        """Show how far steps have come, and metrics that have changed."""
        self.status.update('   '.join(f'{step.name} {last_progress(step.log)}'
                                      for step in running))
        for step in running if self.epochs else ():
            run, metric = step.run, step.run.metric
            tested = [e for e in read_scalars(step.folder) if metric.key in e]
            if tested and tested[-1] != self.tested.get(step.name):
                last = self.tested[step.name] = tested[-1]
                self.say(f'{step.name}: {run.unit} {last["step"]}/{run.length}'
                         f', {metric.title} {metric.show(last[metric.key])}')

    def end(self, step: Step) -> None:
        """Tell of a step that has ended well."""
        self.say(f'{step.name}: done, {step.seconds / 60:.1f} min')


def carry_out(steps: List[Step],
              display: Display,
              lock: int,
              jobs: int = SIDE_BY_SIDE,
              keep_going: bool = False) -> List[str]:
    """Run the steps that are not done, several at a time.

    Args:
        steps (list[Step]): The most urgent first.
        display (Display): Told of everything that happens.
        lock (int): File descriptor that the processes keep open.
        jobs (int): How many at a time. Defaults to 2.
        keep_going (bool): Whether a failure stops only what needs the failed
            step, not everything. Defaults to False.

    Returns:
        list[str]: What failed, and what waits for it.
    """
    waiting = [step for step in steps if not step.done]
    running: List[Step] = []
    failures: List[str] = []
    try:
        while running or ready_steps(waiting, jobs):
            if failures and not keep_going:
                break
            for step in ready_steps(waiting, jobs - len(running)):
                waiting.remove(step)
                step.start(lock, jobs)
                running.append(step)
                verb = 'goes on' if step.before else 'begins'
                display.say(f'{step.name}: {verb}, log in {short(step.log)}')
            time.sleep(POLL_SECONDS)
            display.update(running)
            for step in list(running):
                code = step.poll()
                if code is not None:
                    running.remove(step)
                if step.done:
                    display.end(step)
                elif code is not None:
                    failures.append(
                        f'"{step.name}" failed (exit code {code}, '
                        f'{step.run.metric.key} {step.output()}); see '
                        f'{short(step.log)}')
                    display.say(failures[-1])
    finally:
        for step in running:
            step.stop()
    return failures + [f'"{s.name}" waits for what failed' for s in waiting]


def ready_steps(waiting: List[Step], slots: int) -> List[Step]:
    """The first steps, at most `slots`, whose needs are met."""
    return [s for s in waiting if all(n.done for n in s.needs)][:slots]


@contextlib.contextmanager
def locked(folder: Path, display: Display) -> Iterator[int]:
    """Keep other calls, and orphans of a killed one, out of a folder.

    Yields:
        int: File descriptor of the lock. Who inherits it holds the lock, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say('Another call, or a training of one that was killed, '
                        f'still works in {short(folder)}; waiting for it.')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


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


def digest(parts: Any) -> str:
    """A hash of lists and dicts; of other objects, of their text."""
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


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


def last_progress(log: Path) -> str:
    """For example '[2][ 40/125], 0:02:10 left'; '' if nothing is known."""
    found = PROGRESS.findall(log.read_text(errors='ignore')[-4000:])
    return '{}, {} left'.format(*found[-1]) if found else ''


def short(path: Path) -> str:
    """A path as a user types it in the root of the checkout."""
    return str(path.relative_to(ROOT) if ROOT in path.parents else path)
