"""Train a teacher and three students on digit scenes, and compare them.

The students are one small model, trained alone, with vanilla KD and with
DIST, by ``tools/train.py`` and ``tools/test.py`` on ordinary configs. Two
trainings run side by side; a second call goes on where the first one stopped.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import importlib
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
from typing import Any, Dict, Iterator, List, Optional

from demo_tasks import TASKS, Task, read_json
from mmengine.config import Config
from rich.console import Console

from mmdist.datasets import write_digit_scenes
from mmdist.utils import run_tool

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'demo'
TITLES = dict(
    teacher='teacher',
    alone='student alone',
    kd='student, vanilla KD',
    dist='student, DIST')
QUICK = dict(num_train=96, num_val=24)
QUICK_EPOCHS = 2
QUICK_NOTE = 'A quick run shows the path only: its numbers mean nothing.'
SIDE_BY_SIDE = 2
MAX_THREADS = 4  # models this small do not use more
POLL_SECONDS = 1
NUM_PICTURES = 3
# Another version of any of these may give other results.
VERSIONED = ('mmdist', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg')
# mmengine logs e.g. 'Epoch(train)  [2][ 40/125]  lr: 1e-3  eta: 0:02:10'.
PROGRESS = re.compile(r'Epoch\(\w+\) +([][ /\d]+\]) .*?eta: (\S+)')


class Run:
    """One model, which is trained and then tested.

    Args:
        task (Task): What it learns.
        name (str): Key of ``TITLES``.
        args (argparse.Namespace): What the user asked for.
        teacher (Run, optional): Its teacher. Defaults to None.
    """

    def __init__(self,
                 task: Task,
                 name: str,
                 args: argparse.Namespace,
                 teacher: Optional['Run'] = None) -> None:
        self.task, self.name, self.teacher = task, name, teacher
        self.label = str(Path(task.folder, name))
        self.config = CONFIGS / task.configs[name]
        self.folder = args.work_dir / self.label
        self.data_root = data_root(task, args)
        self.manifest = read_json(self.data_root / 'manifest.json')
        self.cfg = Config.fromfile(self.config)
        self.options = config_options(self.cfg, task, args, teacher)
        self.cfg.merge_from_dict(self.options)
        self.epochs = self.cfg.train_cfg.max_epochs
        # That of the last epoch; never a picked one.
        self.checkpoint = self.folder / f'epoch_{self.epochs}.pth'
        self.train = Step(self, 'train', [teacher.train] if teacher else [])
        self.test = Step(self, 'test', [self.train])

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with everything that the results depend on."""
        versions = [importlib.import_module(m).__version__ for m in VERSIONED]
        parts = [self.cfg.to_dict(), self.manifest, versions]
        if self.teacher:
            parts.append(self.teacher.fingerprint)
        text = json.dumps(parts, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


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
        self.folder = run.folder if stage == 'train' else run.folder / 'test'
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

    def output(self) -> Any:
        """The checkpoint's path or the metric; None if incomplete."""
        if self.stage == 'train':
            checkpoint = self.run.checkpoint
            return checkpoint if zipfile.is_zipfile(checkpoint) else None
        results = [read_json(f) for f in sorted(self.folder.glob('*/*.json'))]
        return results[-1].get(self.run.task.metric) if results else None


class Attempt:
    """A running step; `lock` is a file that the process keeps open."""

    def __init__(self, step: Step, lock: int) -> None:
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
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock])

    def poll(self) -> bool:
        """Whether it has ended.

        Raises:
            SystemExit: If it has failed.
        """
        code = self.process.poll()
        ended = code == 0 and self.step.output() is not None
        self.step.save(self.before + time.monotonic() - self.began, ended)
        if code is not None and not ended:
            raise SystemExit(
                f'The demo stopped because "{self.step.name}" failed with '
                f'exit code {code}; see {short(self.step.log)}.')
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
    """A line per event and, on a terminal, one that shows what runs."""

    def __init__(self, console: Console) -> None:
        self.console = console
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
        task = step.run.task
        tested = [e for e in read_scalars(step.folder) if task.metric in e]
        if tested and tested[-1] != self.tested.get(step.name):
            last = self.tested[step.name] = tested[-1]
            self.say(f'{step.name}: epoch {last["step"]}/{step.run.epochs}, '
                     f'{task.metric_title} {task.show(last[task.metric])}')

    def end(self, step: Step) -> None:
        """A step has ended well."""
        self.update(step)
        del self.progress[step.name]
        self.say(f'{step.name}: done, {step.seconds / 60:.1f} min')


def data_root(task: Task, args: argparse.Namespace) -> Path:
    """The folder of a task's scenes."""
    return args.data_root.with_name(args.data_root.name + task.data)


def config_options(cfg: Config, task: Task, args: argparse.Namespace,
                   teacher: Optional[Run]) -> Dict[str, Any]:
    """What the user asked for, where the config says something else."""
    options = {}
    if args.seed:
        options['randomness.seed'] = args.seed
    if args.quick:
        options['train_cfg.max_epochs'] = QUICK_EPOCHS
    if teacher and short(teacher.checkpoint) != cfg.model.teacher.checkpoint:
        options['model.teacher.checkpoint'] = short(teacher.checkpoint)
    root = short(data_root(task, args)) + '/'
    if root != cfg.data_root:
        for part in ('train', 'val', 'test'):
            options[f'{part}_dataloader.dataset.data_root'] = root
        for part in ('val_evaluator', 'test_evaluator'):
            if 'ann_file' in cfg[part]:
                options[f'{part}.ann_file'] = cfg[part].ann_file.replace(
                    cfg.data_root, root)
    return options


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


def environment() -> Dict[str, str]:
    """Share the cores between the processes that run side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count()
    threads = str(min(MAX_THREADS, max(1, cores // SIDE_BY_SIDE)))
    return dict(os.environ, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)


def prepare(step: Step) -> List[str]:
    """Make the folder ready; the command, which resumes what was begun."""
    command = [sys.executable, *step.arguments]
    pointer = step.folder / 'last_checkpoint'  # mmengine's; tests have none
    if step.record and pointer.is_file() and zipfile.is_zipfile(
            ROOT / pointer.read_text().strip()):
        return command + ['--resume']
    clear(step)
    step.folder.mkdir(parents=True, exist_ok=True)
    step.save(step.seconds)
    return command


def clear(step: Step) -> None:
    """Delete what the step, or another version of it, left behind."""
    folder = step.run.folder
    # train.json, or train.partial if its very first writing was interrupted
    ours = any(folder.glob('train.*'))
    if folder.exists() and any(folder.iterdir()) and not ours:
        raise SystemExit(f'{short(folder)} holds files that are not of this '
                         'demo; choose another --work-dir.')
    # Renamed first: half deleted, it would look like somebody else's.
    trash = step.folder.with_name(f'.{step.folder.name}.old')
    shutil.rmtree(trash, ignore_errors=True)
    if step.folder.exists():
        step.folder.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def make_runs(task: Task, args: argparse.Namespace) -> List[Run]:
    """The teacher and the three students, in the order of ``TITLES``."""
    teacher = Run(task, 'teacher', args)
    return [
        teacher,
        Run(task, 'alone', args),
        Run(task, 'kd', args, teacher),
        Run(task, 'dist', args, teacher)
    ]


def carry_out(steps: List[Step], display: Display, lock: int) -> None:
    """Run the steps that are not done, two at a time.

    Args:
        steps (list[Step]): The most urgent first.
        display (Display): Told of everything that happens.
        lock (int): File descriptor that the processes keep open.

    Raises:
        SystemExit: If a step fails; the others are stopped.
    """
    waiting = [step for step in steps if not step.done]
    running: List[Attempt] = []
    try:
        while waiting or running:
            for step in ready_steps(waiting, SIDE_BY_SIDE - len(running)):
                waiting.remove(step)
                running.append(Attempt(step, lock))
                resumed = '--resume' in running[-1].process.args
                verb = 'goes on' if resumed else 'begins'
                display.say(f'{step.name}: {verb}, log in {short(step.log)}')
            time.sleep(POLL_SECONDS)
            for attempt in list(running):
                if attempt.poll():
                    running.remove(attempt)
                    display.end(attempt.step)
                else:
                    display.update(attempt.step)
    finally:
        for attempt in running:
            attempt.stop()


def ready_steps(waiting: List[Step], slots: int) -> List[Step]:
    """The first steps, at most `slots`, whose needs are met."""
    return [s for s in waiting if all(n.done for n in s.needs)][:slots]


@contextlib.contextmanager
def locked(folder: Path, display: Display) -> Iterator[int]:
    """Keep other demos, and orphans of a killed one, out of a folder.

    Yields:
        int: File descriptor of the lock. Who inherits it holds the lock, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say('Another demo, or a training of one that was killed, '
                        f'still works in {short(folder)}; waiting for it.')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def make_table(runs: List[Run]) -> str:
    """Metric and minutes of a task's models, as Markdown."""
    task = runs[0].task
    rows = [
        f'| {TITLES[run.name]:19} | {task.show(run.test.output()):>9} '
        f'| {run.train.seconds / 60:7.1f} |' for run in runs
    ]
    return '\n'.join([
        f'| {task.title:19} | {task.metric_title:>9} | minutes |',
        f'| {"-" * 19} | {"-" * 8}: | ------: |', *rows
    ])


def plot_curves(runs: List[Run], path: Path) -> None:
    """Plot the validation metric and the training loss of every run."""
    from matplotlib.figure import Figure
    task = runs[0].task
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    panels = ((task.metric, 'epoch', f'validation {task.metric_title}'),
              (task.loss, 'iteration', f'training {task.loss}'))
    for axis, (key, unit, title) in zip(axes, panels):
        for run in runs:
            points = [e for e in read_scalars(run.folder) if key in e]
            axis.plot([e['step'] for e in points], [e[key] for e in points],
                      label=TITLES[run.name])
        axis.set(xlabel=unit, title=title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def draw_predictions(runs: List[Run], path: Path) -> None:
    """Draw a column of pictures per model, beside the truth."""
    from matplotlib.figure import Figure
    task, data_root = runs[0].task, runs[0].data_root
    figure = Figure(figsize=(16, 3.4 * NUM_PICTURES), layout='constrained')
    axes = figure.subplots(NUM_PICTURES, len(runs) + 1)
    for run, column in zip([None, *runs], axes.T):
        if run:
            # The checkpoint is a plain student's, and so is its config.
            name = 'alone' if run.teacher else run.name
            task.draw_predictions(data_root, column,
                                  CONFIGS / task.configs[name], run.checkpoint)
        else:
            task.draw_truth(data_root, column)
        column[0].set_title(TITLES[run.name] if run else 'ground truth')
        for axis in column:
            axis.axis('off')
    figure.savefig(path, dpi=100)


def write_report(groups: List[List[Run]], args: argparse.Namespace,
                 note: str) -> Path:
    """Write ``report.md`` and two pictures for the runs of each task."""
    text = (f'# Digit scenes: a small model, three ways\n\n{note} Minutes '
            f'are of training, {SIDE_BY_SIDE} models side by side.\n')
    for runs in groups:
        task = runs[0].task
        (args.work_dir / task.folder).mkdir(exist_ok=True)
        curves = Path(task.folder, 'curves.png')
        pictures = Path(task.folder, 'predictions.jpg')
        plot_curves(runs, args.work_dir / curves)
        draw_predictions(runs, args.work_dir / pictures)
        steps = [step for run in runs for step in (run.train, run.test)]
        commands = [f'python {shlex.join(step.arguments)}' for step in steps]
        text += '\n'.join([
            f'\n## {task.title.capitalize()}\n',
            make_table(runs), '', f'![curves]({curves})', '',
            f'![predictions]({pictures})', '', '```shell', *commands, '```', ''
        ])
    report = args.work_dir / 'report.md'
    report.write_text(text)
    return report


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--quick', action='store_true', help='the path only, in 2 minutes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--work-dir', type=Path, help='default: work_dirs/demo*')
    parser.add_argument(
        '--data-root', type=Path, help='default: data/digit_scenes*')
    args = parser.parse_args(argv)
    kind = '_quick' if args.quick else ''
    seed = f'_seed{args.seed}' if args.seed else ''
    work_dir = args.work_dir or ROOT / 'work_dirs' / f'demo{kind}{seed}'
    data_root = args.data_root or ROOT / 'data' / f'digit_scenes{kind}'
    args.work_dir, args.data_root = work_dir.resolve(), data_root.resolve()
    return args


def write_scenes(task: Task, args: argparse.Namespace,
                 display: Display) -> None:
    """Draw the pictures of a task, if they are not there."""
    root = data_root(task, args)
    display.say(f'Digit scenes for {task.title} in {short(root)}')
    scenes = dict(task.scenes, **(QUICK if args.quick else {}))
    try:
        write_digit_scenes(root, **scenes)
    except FileExistsError as error:
        raise SystemExit(str(error)) from error


def demo(args: argparse.Namespace, console: Console) -> None:
    """Scenes, trainings, tests, table, report."""
    display = Display(console)
    note = QUICK_NOTE if args.quick else f'Seed {args.seed}.'
    display.say(note)
    with locked(args.work_dir, display) as lock:
        for task in TASKS:
            write_scenes(task, args, display)
        groups = [make_runs(task, args) for task in TASKS]
        runs = sum(groups, [])
        # Trainings first: they take the time.
        steps = [run.train for run in runs] + [run.test for run in runs]
        with display.status:
            carry_out(steps, display, lock)
        # Libraries print a lot while a model is loaded.
        with open(args.work_dir / 'report.log', 'w') as log, \
                contextlib.redirect_stdout(log), \
                contextlib.redirect_stderr(log):
            report = write_report(groups, args, note)
    for runs in groups:
        display.say(f'\n{make_table(runs)}\n')
    display.say(f'{note} Curves and predictions: {short(report)}')


def main() -> None:
    # Other signals that end it are treated as Ctrl-C: no child stays behind.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    try:
        demo(parse_args(), Console())
    except KeyboardInterrupt:
        raise SystemExit('Interrupted; the same command goes on from here.')


if __name__ == '__main__':
    run_tool(main)
