"""Trainings and tests by ``tools/``, several at a time, which go on later.

What ``make demo`` and ``tools/run_experiments.py`` share.
"""
import contextlib
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
# mmengine logs e.g. 'Epoch(train)  [2][ 40/125]  lr: 1e-3  eta: 0:02:10'.
PROGRESS = re.compile(r'(?:Epoch|Iter)\(\w+\) +([][ /\d]+\]) .*?eta: (\S+)')


class Metric(NamedTuple):
    """What models are compared by."""
    key: str  # in MMEngine's logs
    title: str
    format: str

    def show(self, value: float) -> str:
        """The metric as text."""
        return format(value, self.format)


class Run:
    """One model, which is trained and then tested.

    Args:
        label (str): What the log lines call it.
        config (Path): Its config.
        folder (Path): Its work dir.
        options (dict): Of ``--cfg-options``.
        metric (Metric): What it is compared by.
        manifest (dict): What is known of its data.
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
        self.cfg = self.read_config()
        self.cfg.merge_from_dict(options)
        loop = self.cfg.train_cfg
        self.unit = 'iter' if loop.get('max_iters') else 'epoch'
        self.length = loop.get('max_iters') or loop.max_epochs
        # The last one; never a picked one.
        self.checkpoint = folder / f'{self.unit}_{self.length}.pth'
        self.train = Step(self, 'train', [teacher.train] if teacher else [])
        self.test = Step(self, 'test', [self.train])

    def read_config(self) -> Config:
        """The config without the options."""
        return Config.fromfile(self.config)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the results depend on."""
        parts = [self.cfg.to_dict(), self.manifest, versions()]
        if self.teacher:
            parts.append(self.teacher.fingerprint)
        return digest(parts)


def versions() -> List[str]:
    """Those of the packages that are installed."""
    return [
        importlib.import_module(name).__version__ for name in VERSIONED
        if importlib.util.find_spec(name)
    ]


def digest(parts: Any) -> str:
    """A hash of what JSON can hold; of the rest, its text."""
    text = json.dumps(parts, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_json(path: Path) -> dict:
    """Read a file of JSON; empty if it is missing or broken off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


class Step:
    """One call of ``tools/train.py`` or ``tools/test.py``; kept in a file.

    Args:
        run (Run): The model.
        stage (str): 'train' or 'test'.
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

    @property
    def record(self) -> dict:
        """What is known of this very step; empty if it never began."""
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
        """Write down what is known of the step."""
        record = dict(
            fingerprint=self.run.fingerprint, seconds=seconds, ended=ended)
        partial = self.record_file.with_suffix('.partial')
        partial.write_text(json.dumps(record))
        partial.replace(self.record_file)

    def scalar(self, key: str) -> Optional[float]:
        """What a training logged of a metric after its last epoch."""
        values = {
            entry['step']: entry[key]
            for entry in read_scalars(self.folder) if key in entry
        }
        return values.get(self.run.length)

    def resumable(self) -> bool:
        """Whether an attempt left a checkpoint from which it goes on."""
        pointer = self.folder / 'last_checkpoint'  # mmengine's
        return bool(self.record) and pointer.is_file() and zipfile.is_zipfile(
            ROOT / pointer.read_text().strip())

    def make_ready(self) -> None:
        """Write what the command needs; nothing here."""

    def output(self) -> Any:
        """The checkpoint's path or the metric; None if incomplete."""
        if self.stage == 'train':
            checkpoint = self.run.checkpoint
            return checkpoint if zipfile.is_zipfile(checkpoint) else None
        results = [read_json(f) for f in sorted(self.folder.glob('*/*.json'))]
        return results[-1].get(self.run.metric.key) if results else None


class Attempt:
    """A running step; `lock` is a file that the process keeps open."""

    def __init__(self, step: Step, lock: int, jobs: int) -> None:
        self.step = step
        command = prepare(step)
        self.before = step.seconds
        self.began = time.monotonic()
        with open(step.log, 'a') as log:
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

    def poll(self) -> bool:
        """Whether it has ended well."""
        code = self.process.poll()
        ended = code == 0 and self.step.output() is not None
        self.step.save(self.before + time.monotonic() - self.began, ended)
        return ended

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
        self.progress: Dict[str, str] = {}
        self.tested: Dict[str, dict] = {}

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: Step) -> None:
        """Show how far a step has come."""
        self.progress[step.name] = f'{step.name} {last_progress(step.log)}'
        self.status.update('   '.join(self.progress.values()))
        if self.epochs:
            self.tell_of_epochs(step)

    def tell_of_epochs(self, step: Step) -> None:
        """Print the metric when it has changed."""
        run, metric = step.run, step.run.metric
        tested = [e for e in read_scalars(step.folder) if metric.key in e]
        if tested and tested[-1] != self.tested.get(step.name):
            last = self.tested[step.name] = tested[-1]
            self.say(f'{step.name}: {run.unit} {last["step"]}/{run.length}, '
                     f'{metric.title} {metric.show(last[metric.key])}')

    def end(self, step: Step) -> None:
        """A step has ended well."""
        self.update(step)
        del self.progress[step.name]
        self.say(f'{step.name}: done, {step.seconds / 60:.1f} min')

    def fail(self, step: Step, why: str) -> None:
        """A step has ended otherwise."""
        self.progress.pop(step.name, None)
        self.say(why)


def short(path: Path) -> str:
    """A path as a user types it in the root of the checkout."""
    return str(path.relative_to(ROOT) if ROOT in path.parents else path)


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


def environment(jobs: int) -> Dict[str, str]:
    """Share the cores between the processes that run side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count()
    threads = str(min(MAX_THREADS, max(1, cores // jobs)))
    return dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


def prepare(step: Step) -> List[str]:
    """Make the folder ready; the command, which resumes what was begun."""
    command = [sys.executable, *step.arguments]
    if step.resumable():
        return command + ['--resume']
    clear(step)
    step.folder.mkdir(parents=True, exist_ok=True)
    step.make_ready()
    step.save(step.seconds)
    return command


def clear(step: Step) -> None:
    """Delete what the step, or another version of it, left behind."""
    folder = step.run.folder
    # train.json, or train.partial if its very first writing was interrupted
    ours = any(folder.glob('train.*'))
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise SystemExit(f'{short(folder)} holds files that are not of such '
                         'a run; choose another --work-dir.')
    # Renamed first: half deleted, it would look like somebody else's.
    trash = step.folder.with_name(f'.{step.folder.name}.old')
    shutil.rmtree(trash, ignore_errors=True)
    if step.folder.exists():
        step.folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


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
        keep_going (bool): Whether a failure stops only what needs the step.
            Defaults to False.

    Returns:
        list[str]: What failed, and what waits for it.

    Raises:
        SystemExit: If a step fails; the others are stopped. Not with
            `keep_going`.
    """
    waiting = [step for step in steps if not step.done]
    running: List[Attempt] = []
    failures: List[str] = []
    try:
        while running or ready_steps(waiting, jobs):
            for step in ready_steps(waiting, jobs - len(running)):
                waiting.remove(step)
                failures += begin(step, running, display, lock, jobs)
            time.sleep(POLL_SECONDS)
            failures += look_after(running, display)
            if failures and not keep_going:
                raise SystemExit(f'Stopped because {"; ".join(failures)}')
    finally:
        for attempt in running:
            attempt.stop()
    return failures + [
        f'"{step.name}" waits for what failed' for step in waiting
    ]


def begin(step: Step, running: List[Attempt], display: Display, lock: int,
          jobs: int) -> List[str]:
    """Start a step; what is to be said if it cannot be."""
    try:
        attempt = Attempt(step, lock, jobs)
    except SystemExit as error:
        display.fail(step, f'"{step.name}" did not begin: {error}')
        return [f'"{step.name}" did not begin: {error}']
    running.append(attempt)
    verb = 'goes on' if '--resume' in attempt.process.args else 'begins'
    display.say(f'{step.name}: {verb}, log in {short(step.log)}')
    return []


def look_after(running: List[Attempt], display: Display) -> List[str]:
    """Take out the steps that have ended; what is to be said of failures."""
    failures = []
    for attempt in list(running):
        step, ended = attempt.step, attempt.poll()
        code = attempt.process.returncode
        if code is not None:
            running.remove(attempt)
        if ended:
            display.end(step)
        elif code is None:
            display.update(step)
        else:
            failures.append(failure(step, code))
            display.fail(step, failures[-1])
    return failures


def failure(step: Step, code: int) -> str:
    """What is to be said of a step that ended with an exit code."""
    what = f'failed with exit code {code}' if code else (
        f'ended without its {"checkpoint or " * (step.stage == "train")}'
        f'{step.run.metric.key} (a detector that finds nothing has none)')
    return f'"{step.name}" {what}; see {short(step.log)}'


def end_like_ctrl_c() -> None:
    """Treat other signals that end a tool as Ctrl-C: no child stays behind.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)


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
