"""Train a teacher and three students on digit scenes, and compare them.

The students are one small detector, trained alone, with vanilla KD and with
DIST, by ``tools/train.py`` and ``tools/test.py`` on ordinary configs. Two
trainings run side by side; a second call goes on where the first one stopped.
"""
import argparse
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import cv2
from mmengine.config import Config
from rich.console import Console
from rich.progress import (BarColumn, Progress, TextColumn, TimeElapsedColumn,
                           TimeRemainingColumn)
from rich.table import Table

from mmdist.datasets import write_digit_scenes

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'demo'
TEACHER = CONFIGS / 'faster-rcnn_r18-w32_fpn_5e_digits.py'
STUDENT = CONFIGS / 'faster-rcnn_r18-w16_fpn_5e_digits.py'
KD = CONFIGS / 'kd_faster-rcnn_r18-w16-w32_fpn_5e_digits.py'
DIST = CONFIGS / 'dist_faster-rcnn_r18-w16-w32_fpn_5e_digits.py'
TITLES = dict(
    teacher='teacher',
    alone='student alone',
    kd='student, vanilla KD',
    dist='student, DIST')
METRIC = 'coco/bbox_mAP'
SIDE_BY_SIDE = 2
QUICK_NOTE = 'A quick run shows the path only: its numbers mean nothing.'
POLL_SECONDS = 1
NUM_PICTURES = 3


class Scale(NamedTuple):
    """How much is trained.

    Attributes:
        num_train (int): Training scenes.
        num_val (int): Validation scenes.
        epochs (int, optional): None for what the configs say.
    """
    num_train: int
    num_val: int
    epochs: Optional[int]


FULL = Scale(num_train=1000, num_val=240, epochs=None)
QUICK = Scale(num_train=96, num_val=24, epochs=2)


class Run:
    """One model: its config, its folder and what is overridden.

    Args:
        name (str): Key of ``TITLES``.
        config (Path): Config file.
        folder (Path): Its work dir.
        options (dict): Config options of training, e.g.
            ``{'randomness.seed': 1}``. What the config says anyway is left
            out of the commands.
    """

    def __init__(self, name: str, config: Path, folder: Path,
                 options: Dict[str, Any]) -> None:
        self.name = name
        self.config = config
        self.folder = folder
        self.cfg = Config.fromfile(config)
        self.options = {
            key: value
            for key, value in options.items()
            if look_up(self.cfg, key) != value
        }
        self.cfg.merge_from_dict(self.options)

    @property
    def epochs(self) -> int:
        """Number of training epochs."""
        return self.cfg.train_cfg.max_epochs

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch; never a picked one."""
        return self.folder / f'epoch_{self.epochs}.pth'


class Step:
    """One call of ``tools/train.py`` or ``tools/test.py``.

    What is known of it stands in a file: the fingerprint of everything it
    depends on, the seconds it took and, once it has ended well, its result.

    Args:
        run (Run): The model.
        stage (str): 'train' or 'test'.
        needs (tuple[Step]): Steps that must have ended before.
    """

    def __init__(self, run: Run, stage: str, needs: Tuple['Step',
                                                          ...]) -> None:
        self.run = run
        self.stage = stage
        self.needs = needs
        self.folder = run.folder if stage == 'train' else run.folder / 'test'
        self.record_file = run.folder / f'{stage}.json'
        self.log = run.folder / f'{stage}.log'

    @property
    def name(self) -> str:
        """For messages."""
        return f'{self.stage} {self.run.name}'

    @property
    def arguments(self) -> List[str]:
        """The command after ``python``, without ``--resume``."""
        run = self.run
        words = [f'tools/{self.stage}.py', from_root(run.config)]
        options = run.options
        if self.stage == 'test':
            words.append(from_root(run.checkpoint))
            options = {k: v for k, v in options.items() if is_of_data(k)}
        words += ['--work-dir', from_root(self.folder)]
        if options:
            words.append('--cfg-options')
        return words + [f'{name}={value}' for name, value in options.items()]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes with the command, the config and the steps before."""
        parts = [self.arguments, self.run.cfg.to_dict()]
        parts += [step.fingerprint for step in self.needs]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def record(self) -> dict:
        """What is known of this very step; empty if it never began."""
        record = read_json(self.record_file)
        if record.get('fingerprint') != self.fingerprint:
            return {}
        return record

    @property
    def seconds(self) -> float:
        """Time spent on it so far, by all attempts."""
        return self.record.get('seconds', 0.)

    @property
    def done(self) -> bool:
        """Whether it ended well and its output is still as it was then."""
        result = self.record.get('result')
        if self.stage == 'train' and result is not None:
            checkpoint = self.run.checkpoint
            return (checkpoint.is_file()
                    and checkpoint.stat().st_size == result)
        return result is not None

    def save(self, seconds: float, result: Optional[float] = None) -> None:
        """Write down what is known of the step."""
        write_json(
            self.record_file,
            dict(fingerprint=self.fingerprint, seconds=seconds, result=result))

    def read_result(self) -> Optional[float]:
        """The checkpoint's size in bytes or the mAP; None if incomplete."""
        if self.stage == 'test':
            return read_metric(self.folder)
        if not zipfile.is_zipfile(self.run.checkpoint):
            return None
        return self.run.checkpoint.stat().st_size


class Attempt:
    """A running step.

    Args:
        step (Step): What to run.
        lock (int): File descriptor that the process keeps open.
    """

    def __init__(self, step: Step, lock: int) -> None:
        self.step = step
        self.before = step.seconds
        self.began = time.monotonic()
        command = prepare(step)
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

    @property
    def seconds(self) -> float:
        """Time spent on the step, with earlier attempts."""
        return self.before + time.monotonic() - self.began

    def poll(self) -> bool:
        """Whether it has ended.

        Raises:
            SystemExit: If it has failed.
        """
        code = self.process.poll()
        if code is None:
            self.step.save(self.seconds)
            return False
        result = self.step.read_result() if code == 0 else None
        self.step.save(self.seconds, result)
        if result is None:
            raise SystemExit(
                f'The demo stopped because "{self.step.name}" failed with '
                f'exit code {code}; see {relative(self.step.log)}.')
        return True

    def stop(self) -> None:
        """End the process and its workers."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=5)
                return


class Display:
    """Progress of the steps: bars on a terminal, else a line per event."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn('{task.description:14}'),
            BarColumn(),
            TextColumn('{task.fields[status]:30}'),
            TimeElapsedColumn(),
            TextColumn('eta'),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal)
        self.tasks: Dict[Step, Any] = {}
        self.epochs: Dict[Step, int] = {}

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def begin(self, step: Step) -> None:
        """A step starts or goes on."""
        verb = 'goes on' if step.seconds else 'begins'
        self.say(f'{step.name}: {verb}, log in {relative(step.log)}')
        self.epochs[step] = 0
        self.tasks[step] = self.bars.add_task(
            step.name, total=total_iters(step), status='starting')

    def update(self, step: Step) -> None:
        """Show how far a training has come."""
        if step.stage == 'test':
            return
        scalars = read_scalars(step.folder)
        iters = [entry['step'] for entry in scalars if 'loss' in entry]
        maps = [entry for entry in scalars if METRIC in entry]
        status = describe(step, maps)
        self.bars.update(
            self.tasks[step], completed=max(iters, default=0), status=status)
        if len(maps) > self.epochs[step]:
            self.epochs[step] = len(maps)
            if not self.console.is_terminal:
                self.say(f'{step.name}: {status}')

    def end(self, step: Step) -> None:
        """A step has ended well."""
        self.update(step)
        self.bars.remove_task(self.tasks[step])
        self.say(f'{step.name}: done, {step.seconds / 60:.1f} min')


def describe(step: Step, maps: List[dict]) -> str:
    """For example 'epoch 3/6, mAP 0.234'."""
    if not maps:
        return f'epoch 0/{step.run.epochs}'
    last = maps[-1]
    return f'epoch {last["step"]}/{step.run.epochs}, mAP {last[METRIC]:.3f}'


def total_iters(step: Step) -> Optional[int]:
    """Iterations of a training; None (unknown) for a test."""
    if step.stage == 'test':
        return None
    loader = step.run.cfg.train_dataloader
    data = Path(ROOT, loader.dataset.data_root, loader.dataset.ann_file)
    images = len(read_json(data).get('images', []))
    return step.run.epochs * -(-images // loader.batch_size)


def read_json(path: Path) -> dict:
    """Read a file of JSON; empty if it is missing or broken off."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_json(path: Path, content: dict) -> None:
    """Write a file of JSON that is never seen half written."""
    partial = path.with_suffix('.partial')
    partial.write_text(json.dumps(content))
    partial.replace(path)


def read_metric(folder: Path) -> Optional[float]:
    """The mAP that the last ``tools/test.py`` wrote under a folder."""
    files = sorted(folder.glob('*/*.json'))
    return read_json(files[-1]).get(METRIC) if files else None


def read_scalars(folder: Path) -> List[dict]:
    """What a training has logged, as if it had never been interrupted.

    Args:
        folder (Path): Work dir, with a log of each attempt.

    Returns:
        list[dict]: Losses of iteration ``step`` and metrics of epoch
        ``step``, each in order.
    """
    merged: Dict[Tuple[bool, int], dict] = {}
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        entries = list(parse_lines(path.read_text()))
        # A resumed training repeats what came after its checkpoint.
        for is_metric in (True, False):
            steps = [e['step'] for e in entries if (METRIC in e) == is_metric]
            merged = {
                key: entry
                for key, entry in merged.items()
                if key[0] != is_metric or key[1] < min(steps, default=1e9)
            }
        merged.update({(METRIC in e, e['step']): e for e in entries})
    return [merged[key] for key in sorted(merged)]


def parse_lines(text: str) -> Iterator[dict]:
    """Parse a line of JSON each, but not one that is still being written."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if 'step' in entry:
                yield entry


def look_up(cfg: Config, key: str) -> Any:
    """The value under a dotted key; None if there is none."""
    *parents, last = key.split('.')
    for part in parents:
        cfg = cfg.get(part, {})
    return cfg.get(last)


def is_of_data(key: str) -> bool:
    """Whether a config option says where the data are."""
    return key.split('.')[0].endswith(('_dataloader', '_evaluator'))


def from_root(path: Path) -> str:
    """A path as a user types it in the root of the checkout."""
    inside = ROOT == path or ROOT in path.parents
    return os.path.relpath(path, ROOT) if inside else str(path)


def relative(path: Path) -> str:
    """A path as short as it can be written."""
    return min(os.path.relpath(path), str(path), key=len)


def environment() -> Dict[str, str]:
    """Share the cores between the processes that run side by side."""
    cores = len(os.sched_getaffinity(0)) if hasattr(
        os, 'sched_getaffinity') else os.cpu_count()
    threads = str(max(1, cores // SIDE_BY_SIDE))
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    return dict(
        os.environ,
        OMP_NUM_THREADS=threads,
        MKL_NUM_THREADS=threads,
        PYTHONPATH=os.pathsep.join(filter(None, paths)))


def prepare(step: Step) -> List[str]:
    """Make the folder of a step ready and say what to run in it.

    Args:
        step (Step): The step that is about to run.

    Returns:
        list[str]: The command, which resumes what the same step began.
    """
    command = [sys.executable, *step.arguments]
    if can_resume(step):
        return command + ['--resume']
    clear(step)
    step.folder.mkdir(parents=True, exist_ok=True)
    step.save(step.seconds)
    return command


def can_resume(step: Step) -> bool:
    """Whether the step has begun and left a whole checkpoint."""
    pointer = step.folder / 'last_checkpoint'
    if step.stage == 'test' or not step.record or not pointer.is_file():
        return False
    return zipfile.is_zipfile(ROOT / pointer.read_text().strip())


def clear(step: Step) -> None:
    """Delete what the step, or another version of it, left behind."""
    folder = step.run.folder
    if folder.exists() and any(
            folder.iterdir()) and not (folder / 'train.json').is_file():
        raise SystemExit(
            f'{relative(folder)} holds files that are not of this '
            'demo; choose another --work-dir.')
    shutil.rmtree(step.folder, ignore_errors=True)


def data_options(data_root: Path) -> Dict[str, Any]:
    """Config options that point every loader and metric to a data set."""
    root = from_root(data_root) + '/'
    options = {}
    for part in ('train', 'val', 'test'):
        options[f'{part}_dataloader.dataset.data_root'] = root
        if part != 'train':
            options[f'{part}_evaluator.ann_file'] = (
                f'{root}annotations/instances_val.json')
    return options


def make_runs(work_dir: Path, data_root: Path, scale: Scale,
              seed: int) -> List[Run]:
    """The teacher and the three students, which share all their settings.

    Args:
        work_dir (Path): Holds a folder for each.
        data_root (Path): The digit scenes.
        scale (Scale): How much is trained.
        seed (int): Seed of every training.

    Returns:
        list[Run]: In the order of ``TITLES``.
    """
    options = {**data_options(data_root), 'randomness.seed': seed}
    if scale.epochs is not None:
        options['train_cfg.max_epochs'] = scale.epochs
    teacher = Run('teacher', TEACHER, work_dir / 'teacher', options)
    taught = {
        **options, 'model.teacher.checkpoint': from_root(teacher.checkpoint)
    }
    return [
        teacher,
        Run('alone', STUDENT, work_dir / 'alone', options),
        Run('kd', KD, work_dir / 'kd', taught),
        Run('dist', DIST, work_dir / 'dist', taught)
    ]


def make_steps(runs: List[Run]) -> List[Step]:
    """Trainings first: they take the time."""
    trains: List[Step] = []
    for run in runs:
        taught = 'teacher' in run.cfg.model
        trains.append(Step(run, 'train', tuple(trains[:1]) if taught else ()))
    return trains + [Step(step.run, 'test', (step, )) for step in trains]


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
                display.begin(step)
                running.append(Attempt(step, lock))
            time.sleep(POLL_SECONDS)
            running = [a for a in running if not advance(a, display)]
    finally:
        for attempt in running:
            attempt.stop()


def ready_steps(waiting: List[Step], slots: int) -> List[Step]:
    """The first steps, at most `slots`, whose needs are met."""
    return [s for s in waiting if all(n.done for n in s.needs)][:slots]


def advance(attempt: Attempt, display: Display) -> bool:
    """Look after a running step; whether it has ended."""
    ended = attempt.poll()
    (display.end if ended else display.update)(attempt.step)
    return ended


@contextlib.contextmanager
def locked(folder: Path, display: Display) -> Iterator[int]:
    """Keep other demos, and orphans of a killed one, out of a folder.

    Args:
        folder (Path): Made if missing.
        display (Display): Told if it has to wait.

    Yields:
        int: File descriptor of the lock. Who inherits it holds the lock, too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            display.say('Another demo, or a training of one that was killed, '
                        f'still works in {relative(folder)}; waiting for it.')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def make_rows(steps: List[Step]) -> List[List[str]]:
    """Model, mAP and minutes of training, a row each."""
    trains = {s.run.name: s for s in steps if s.stage == 'train'}
    tests = {s.run.name: s for s in steps if s.stage == 'test'}
    return [[
        title, f'{tests[name].record["result"]:.3f}',
        f'{trains[name].seconds / 60:.1f}'
    ] for name, title in TITLES.items()]


def print_table(rows: List[List[str]], console: Console) -> None:
    """Print the table of results."""
    table = Table('model')
    table.add_column('mAP', justify='right')
    table.add_column('minutes', justify='right')
    for row in rows:
        table.add_row(*row)
    console.print(table)


def plot_curves(runs: List[Run], path: Path) -> None:
    """Plot the validation mAP and the classification loss of every run."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    panels = ((METRIC, 'epoch', 'mAP on the validation scenes'),
              ('loss_cls', 'iteration', 'classification loss of the RoI head'))
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
    """Draw what every model finds in a few validation scenes.

    Args:
        runs (list[Run]): A column each, beside the ground truth.
        path (Path): JPEG file to write.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.8 * (len(runs) + 1), 4.8 * NUM_PICTURES))
    axes = figure.subplots(NUM_PICTURES, len(runs) + 1)
    for column, (title, pictures) in enumerate(picture_columns(runs)):
        axes[0, column].set_title(title, fontsize=24)
        for axis, picture in zip(axes[:, column], pictures):
            axis.imshow(picture)
            axis.axis('off')
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def picture_columns(runs: List[Run]) -> Iterator[Tuple[str, list]]:
    """Yield a title and pictures of the truth and then of each model."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import DATASETS
    from mmengine.registry import init_default_scope
    cfg = runs[0].cfg
    init_default_scope(cfg.default_scope)
    data = cfg.val_dataloader.dataset
    dataset = DATASETS.build({**data, 'data_root': str(ROOT / data.data_root)})
    samples = [dataset[index]['data_samples'] for index in range(NUM_PICTURES)]
    yield 'ground truth', [paint(sample, dataset.metainfo, 'gt')
                           for sample in samples]  # yapf: disable
    for run in runs:
        # What training wrote is a plain checkpoint of the plain config.
        config = TEACHER if run.name == 'teacher' else STUDENT
        model = init_detector(
            str(config), str(run.checkpoint), device='cpu', palette='random')
        found = [inference_detector(model, s.img_path) for s in samples]
        yield TITLES[run.name], [
            paint(sample, dataset.metainfo, 'pred') for sample in found
        ]


def paint(sample: Any, metainfo: dict, kind: str, zoom: int = 3) -> Any:
    """Draw the boxes of a sample, enlarged so that labels can be read.

    Args:
        sample (DetDataSample): With ``img_path``.
        metainfo (dict): The data set's, with ``classes``.
        kind (str): 'gt' or 'pred'.
        zoom (int): Factor of enlargement. Defaults to 3.

    Returns:
        np.ndarray: RGB, uint8, shape (zoom * H, zoom * W, 3).
    """
    from mmdet.visualization import DetLocalVisualizer
    sample = sample.clone()
    instances = sample.get(f'{kind}_instances')
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    instances.bboxes = boxes * zoom
    image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
    image = cv2.resize(image, None, fx=zoom, fy=zoom)
    visualizer = DetLocalVisualizer(line_width=2)
    visualizer.dataset_meta = metainfo
    visualizer.add_datasample(
        'scene',
        image,
        sample,
        draw_gt=kind == 'gt',
        draw_pred=kind == 'pred',
        pred_score_thr=0.3)
    return visualizer.get_image()


def write_report(folder: Path, steps: List[Step], note: str) -> Path:
    """Write ``report.md``, ``curves.png`` and ``predictions.jpg``.

    Args:
        folder (Path): Where to.
        steps (list[Step]): All done.
        note (str): A sentence on what the numbers are worth.

    Returns:
        Path: The report.
    """
    runs = [step.run for step in steps if step.stage == 'train']
    plot_curves(runs, folder / 'curves.png')
    draw_predictions(runs, folder / 'predictions.jpg')
    header = [['model', 'mAP', 'minutes'], ['---', '---:', '---:']]
    table = '\n'.join(f'| {" | ".join(row)} |'
                      for row in header + make_rows(steps))
    commands = '\n'.join(f'python {shlex.join(s.arguments)}' for s in steps)
    report = folder / 'report.md'
    report.write_text(f'# Digit scenes: a small detector, three ways\n\n'
                      f'{note}\n\n{table}\n\nMinutes are of training, two '
                      'models side by side.\n\n![curves](curves.png)\n\n'
                      'Boxes with a score above 0.3:\n\n'
                      '![predictions](predictions.jpg)\n\n'
                      f'## Commands\n\n```shell\n{commands}\n```\n')
    return report


@contextlib.contextmanager
def quiet(path: Path) -> Iterator[None]:
    """Send what libraries print to a file."""
    with open(path, 'w') as log, contextlib.redirect_stdout(
            log), contextlib.redirect_stderr(log):
        yield


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--quick',
        action='store_true',
        help='the same path in about 2 minutes; its numbers mean nothing')
    parser.add_argument(
        '--work-dir',
        type=Path,
        help='the dir to save logs, models and the report (default: '
        'work_dirs/demo, and work_dirs/demo_quick with --quick)')
    parser.add_argument(
        '--data-root',
        type=Path,
        help='the dir of the digit scenes (default: data/digit_scenes, and '
        'data/digit_scenes_quick with --quick)')
    parser.add_argument(
        '--seed', type=int, default=0, help='seed of every training')
    args = parser.parse_args(argv)
    suffix = '_quick' if args.quick else ''
    seed = f'_seed{args.seed}' if args.seed else ''
    args.work_dir = (args.work_dir
                     or ROOT / 'work_dirs' / f'demo{suffix}{seed}').resolve()
    args.data_root = (args.data_root
                      or ROOT / 'data' / f'digit_scenes{suffix}').resolve()
    return args


def make_scenes(data_root: Path, scale: Scale, display: Display) -> None:
    """Write the digit scenes if they are missing."""
    try:
        written = write_digit_scenes(data_root, scale.num_train, scale.num_val)
    except FileExistsError as error:
        raise SystemExit(str(error)) from error
    verb = 'written to' if written else 'found in'
    display.say(f'{scale.num_train} + {scale.num_val} digit scenes {verb} '
                f'{relative(data_root)}')


def demo(args: argparse.Namespace, console: Console) -> None:
    """Scenes, trainings, tests, table, report."""
    display = Display(console)
    scale = QUICK if args.quick else FULL
    note = f'Seed {args.seed}, {scale.num_train} training scenes.'
    if args.quick:
        note += f' {QUICK_NOTE}'
        display.say(QUICK_NOTE)
    with locked(args.work_dir, display) as lock:
        make_scenes(args.data_root, scale, display)
        runs = make_runs(args.work_dir, args.data_root, scale, args.seed)
        steps = make_steps(runs)
        with display.bars:
            carry_out(steps, display, lock)
        with quiet(args.work_dir / 'report.log'):
            report = write_report(args.work_dir, steps, note)
    print_table(make_rows(steps), console)
    display.say(f'{note} Curves and predictions: {relative(report)}')


def interrupt(*_) -> None:
    """Treat an ending signal as Ctrl-C, so that the children end, too."""
    raise KeyboardInterrupt


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, interrupt)
    try:
        demo(parse_args(), Console())
    except KeyboardInterrupt:
        raise SystemExit('Interrupted; the same command goes on from here.')


if __name__ == '__main__':
    main()
