"""Train a teacher and three students on digit scenes, and compare them.

The students are one small model, trained alone, with vanilla KD and with
DIST, by ``tools/train.py`` on ordinary configs. Two trainings run side by
side; a second call goes on where the first one stopped.
"""
import argparse
import contextlib
import shlex
import sys
from pathlib import Path
from typing import List, Optional

from demo_tasks import TASKS, Task
from experiments.runs import (ROOT, SIDE_BY_SIDE, Run, carry_out,
                              end_like_ctrl_c, locked, read_config, read_json,
                              read_scalars, say, short)
from matplotlib.figure import Figure

from mmdist.datasets import write_digit_scenes
from mmdist.utils import run_tool

CONFIGS = ROOT / 'configs' / 'experiments'
SCENES = dict(num_train=2000, num_val=240, size=96)
NUM_TRAINED = 1200  # of the scenes, to take less than ten minutes
TITLES = dict(
    teacher='teacher',
    alone='student alone',
    kd='student, vanilla KD',
    dist='student, DIST')
QUICK = dict(num_train=96, num_val=24)
QUICK_EPOCHS = 2
NEXT = (f'Next: `{short(Path(sys.executable))} tools/make_config.py STUDENT '
        'TEACHER CHECKPOINT` writes a config for your own data; see '
        'docs/en/quickstart.md.')
QUICK_NOTE = 'A quick run shows the path only: its numbers mean nothing.'
NUM_IMAGES = 3


class DemoRun(Run):
    """A teacher or a student, by the key of ``TITLES``."""

    def __init__(self,
                 task: Task,
                 name: str,
                 args: argparse.Namespace,
                 teacher: Optional['DemoRun'] = None) -> None:
        self.task, self.name = task, name
        self.data_root, self.runs = args.data_root, [self]
        label = str(Path(task.folder, name))
        config = CONFIGS / task.configs[name]
        # Curves need each epoch; what follows, only another place or call.
        cfg, options = read_config(config), {'train_cfg.val_interval': 1}
        if args.seed:
            options['randomness.seed'] = args.seed
        if args.quick:
            options['train_cfg.max_epochs'] = QUICK_EPOCHS
        else:
            options['train_dataloader.dataset.indices'] = NUM_TRAINED
        if teacher and short(
                teacher.checkpoint) != cfg.model.teacher.checkpoint:
            options['model.teacher.checkpoint'] = short(teacher.checkpoint)
        root = short(self.data_root) + '/'
        if root != cfg.data_root:
            for part in ('train', 'val', 'test'):
                options[f'{part}_dataloader.dataset.data_root'] = root
            for part in ('val_evaluator', 'test_evaluator'):
                if 'ann_file' in cfg[part]:
                    options[f'{part}.ann_file'] = cfg[part].ann_file.replace(
                        cfg.data_root, root)
        super().__init__(label, config, args.work_dir / label, options,
                         task.metric,
                         read_json(self.data_root / 'manifest.json'), teacher)

    def remark(self) -> str:
        """The minutes that are left for all runs, from those spent so far."""
        minutes = [run.task.minutes[run.name] for run in self.runs]
        parts = [(run.told / run.length or run.trained) * usual
                 for run, usual in zip(self.runs, minutes)]
        # (A run that has told nothing yet may be halfway through an epoch.)
        spent = sum(run.seconds for run, part in zip(self.runs, parts) if part)
        slower = spent / 60 / sum(parts)
        left = (sum(minutes) - sum(parts)) * slower / SIDE_BY_SIDE
        return f', about {max(left, 1):.0f} min left'


def make_runs(task: Task, args: argparse.Namespace) -> List[DemoRun]:
    """The teacher and the three students, in the order of ``TITLES``."""
    runs: List[DemoRun] = []
    for name in TITLES:
        teacher = runs[0] if name in ('kd', 'dist') else None
        runs.append(DemoRun(task, name, args, teacher))
    return runs


def make_table(runs: List[DemoRun]) -> str:
    """Metric and minutes of a task's models, as Markdown."""
    task = runs[0].task
    rows = [
        f'| {TITLES[run.name]:19} | {task.metric.show(run.validated()):>9} '
        f'| {run.seconds / 60:7.1f} |' for run in runs
    ]
    return '\n'.join([
        f'| {task.title:19} | {task.metric.title:>9} | minutes |',
        f'| {"-" * 19} | {"-" * 8}: | ------: |', *rows
    ])


def plot_curves(runs: List[DemoRun], path: Path) -> None:
    """Plot the validation metric and the training loss of every run."""
    task = runs[0].task
    figure = Figure(figsize=(10, 4), layout='constrained')
    axes = figure.subplots(1, 2)
    panels = ((task.metric.key, 'epoch', f'validation {task.metric.title}'),
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


def draw_predictions(runs: List[DemoRun], path: Path) -> None:
    """Draw a column of images per model, beside the truth."""
    task, data_root = runs[0].task, runs[0].data_root
    figure = Figure(figsize=(16, 3.4 * NUM_IMAGES), layout='constrained')
    axes = figure.subplots(NUM_IMAGES, len(runs) + 1)
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


def write_report(groups: List[List[DemoRun]], args: argparse.Namespace,
                 note: str) -> Path:
    """Write ``report.md`` and two images for the runs of each task."""
    text = (f'# Digit scenes: a small model, three ways\n\n{note} Minutes '
            f'are of training, {SIDE_BY_SIDE} models side by side.\n')
    for runs in groups:
        task = runs[0].task
        (args.work_dir / task.folder).mkdir(exist_ok=True)
        curves = Path(task.folder, 'curves.png')
        images = Path(task.folder, 'predictions.jpg')
        plot_curves(runs, args.work_dir / curves)
        draw_predictions(runs, args.work_dir / images)
        commands = [
            f'python {shlex.join(run.command("train"))}' for run in runs
        ]
        text += '\n'.join([
            f'\n## {task.title.capitalize()}\n',
            make_table(runs), '', f'![curves]({curves})', '',
            f'![predictions]({images})', '', '```shell', *commands, '```', ''
        ])
    report = args.work_dir / 'report.md'
    report.write_text(f'{text}\n{NEXT}\n')
    return report


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--quick', action='store_true', help='the path only, in 2 minutes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--work-dir', type=Path, help='default: work_dirs/demo*')
    parser.add_argument(
        '--data-root', type=Path, help='default: data/digit_scenes_96*')
    args = parser.parse_args(argv)
    kind = '_quick' if args.quick else ''
    seed = f'_seed{args.seed}' if args.seed else ''
    work_dir = args.work_dir or ROOT / 'work_dirs' / f'demo{kind}{seed}'
    data_root = args.data_root or ROOT / 'data' / f'digit_scenes_96{kind}'
    args.work_dir, args.data_root = work_dir.resolve(), data_root.resolve()
    return args


def demo(args: argparse.Namespace) -> None:
    """Draw scenes, train and report."""
    note = QUICK_NOTE if args.quick else f'Seed {args.seed}.'
    say(note)
    with locked(args.work_dir):
        say(f'Digit scenes in {short(args.data_root)}')
        scenes = dict(SCENES, **(QUICK if args.quick else {}))
        write_digit_scenes(args.data_root, **scenes)
        groups = [make_runs(task, args) for task in TASKS]
        runs = sum(groups, [])
        for run in runs:
            run.runs = runs
        failures = carry_out(runs)
        if failures:
            raise SystemExit('\n'.join(failures))
        # Libraries print a lot while a model is loaded.
        with open(args.work_dir / 'report.log', 'w') as log, \
                contextlib.redirect_stdout(log), \
                contextlib.redirect_stderr(log):
            report = write_report(groups, args, note)
    for runs in groups:
        say(f'\n{make_table(runs)}\n')
    say(f'{note} Curves and predictions: {short(report)}\n{NEXT}')


def main() -> None:
    end_like_ctrl_c()
    try:
        demo(parse_args())
    except KeyboardInterrupt:
        raise SystemExit('Interrupted; the same command goes on from here.')


if __name__ == '__main__':
    run_tool(main)
