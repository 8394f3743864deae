"""Measure how far a student's class predictions are from those of teachers.

Both models see the images of a data set as a training would, and the taps
of mmdist compare their class logits for the same instances.
"""
import argparse
import copy
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from rich.progress import track
from student_teachers import (is_annotated, load_student, named_teachers,
                              parse_models)

from mmdist.analysis import Discrepancy
from mmdist.errors import ConfigError
from mmdist.models.distillers import BaseDistiller
from mmdist.utils import (class_names_of, data_classes_of, data_sets_in,
                          load_config, markdown_table, run_tool, scope_of,
                          wrapper_for)

try:
    import pandas as pd
except ModuleNotFoundError:
    sys.exit("Error: pandas is not installed; pip install 'mmdist[analysis]'")

# More classes than a figure can name.
MOST_NAMES = 40


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--split',
        choices=['train', 'val', 'test'],
        default='val',
        help='of the data of the student (default: %(default)s); images go '
        'through the training pipeline, which loads annotations')
    parser.add_argument(
        '--batches', type=int, default=50, help='how many (default: 50)')
    parser.add_argument(
        '--tau', type=float, default=1., help='temperature of the losses')
    parser.add_argument(
        '--align', choices=['boxes'], help='for a teacher of another family')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--out-dir', type=Path, default=Path('work_dirs/discrepancy'))
    return parse_models(parser)


def loader_of(cfg: Config, split: str, seed: int) -> Any:
    """Batches of a split, through the pipeline of the training."""
    loader = copy.deepcopy(cfg.train_dataloader)
    if split != 'train':
        part = cfg.get(f'{split}_dataloader')
        if part is None:
            raise ConfigError('STUDENT', f'it has no {split}_dataloader',
                              'choose another --split')
        own = loader['dataset']
        while 'dataset' in own:  # RepeatDataset, MultiImageMixDataset …
            own = own['dataset']
        other = copy.deepcopy(part['dataset'])
        pipeline = data_sets_in(own)[0].get('pipeline')
        for leaf in data_sets_in(other):
            leaf.update(pipeline=pipeline, test_mode=False)
        own.clear()
        own.update(other)
    loader['sampler'] = dict(type='DefaultSampler', shuffle=True)
    loader.pop('batch_sampler', None)
    built = Runner.build_dataloader(loader, seed=seed)
    if not is_annotated(built.dataset):
        raise ConfigError(
            'STUDENT', f'its {split}_dataloader.dataset has no annotations, '
            'which its losses need', 'choose another --split')
    return built


def distiller_of(args: argparse.Namespace, cfg: Config, config: str,
                 checkpoint: str) -> BaseDistiller:
    """A wrapper around both models, which trains nothing here."""
    try:
        wrapper = MODELS.build(
            dict(
                type=wrapper_for(cfg, 'STUDENT'),
                student=cfg.model,
                teacher=dict(
                    config=config,
                    checkpoint=checkpoint,
                    class_map=args.class_map),
                distill_loss=dict(type='mmdist.DISTLoss', tau=args.tau),
                tap=dict(align=args.align) if args.align else None,
                data_preprocessor=cfg.get('data_preprocessor')))
        wrapper.distillation.compare_classes(wrapper, data_classes_of(cfg))
    except ConfigError as error:
        if error.field != 'model.teacher.class_map':
            raise
        raise ConfigError('--class-map', error.problem,
                          error.remedy) from error
    load_student(wrapper, args.checkpoint)
    return wrapper.to(args.device).eval()


def measure(args: argparse.Namespace, cfg: Config, config: str,
            checkpoint: str) -> Dict[str, Any]:
    """Measure the :class:`Discrepancy` of one teacher."""
    wrapper = distiller_of(args, cfg, config, checkpoint)
    found = Discrepancy(args.tau, seed=args.seed)
    set_random_seed(args.seed)
    loader = loader_of(cfg, args.split, args.seed)
    number = min(args.batches, len(loader))
    batches = zip(range(number), loader)
    # models and their preprocessors ask how far a training is
    hub = MessageHub.get_current_instance()
    hub.update_info('epoch', 0)
    for i, data in track(batches, Path(config).stem, total=number):
        hub.update_info('iter', i)
        data = wrapper.data_preprocessor(data, True)
        for pair in wrapper.kd_pairs(data['inputs'], data['data_samples']):
            found.update(pair)
    return found.summary()


def report(results: Dict[str, Dict[str, Any]],
           names: List[str]) -> Tuple[str, str]:
    """The table of all teachers with what it leaves out, and the tables of
    each one, in Markdown."""
    parts = [
        markdown_table([
            dict(teacher=teacher, group=group, **values)
            for teacher, found in results.items()
            for group, values in found['groups'].items()
        ])
    ]
    parts += [
        f'Left out for {teacher}, since it means nothing for its class '
        f'logits: {", ".join(found["left_out"])}'
        for teacher, found in results.items() if found['left_out']
    ]
    more = []
    for teacher, found in results.items():
        if 'classes' in found:
            rows = [{
                'class': name,
                **row
            } for name, row in zip(names_of(found, names), found['classes'])]
            more += [f'## Classes, {teacher}', markdown_table(rows)]
        if 'reliability' in found:
            errors = ', '.join(
                f'{side} {found["reliability"][side]["error"]:.3f}'
                for side in ('student', 'teacher'))
            more.append(f'Expected calibration error: {errors}')
    return '\n\n'.join(parts), '\n\n'.join(more)


def names_of(found: Dict[str, Any], names: List[str]) -> List[str]:
    """The names of what each row of a teacher's `classes` is about.

    One class, which segmentation calls the second of two, has the background
    beside it.
    """
    number = len(found['classes'])
    if len(found['correlation']) == 1:
        return [*(names[-1:] or ['0']), 'background'][:number]
    return names or [str(i) for i in range(number)]


@contextmanager
def figure_at(path: Path) -> Iterator[Axes]:
    """Axes of a figure, which is written when they are drawn."""
    figure = Figure((8, 6), layout='constrained')
    yield figure.subplots()
    figure.savefig(path)


def draw(results: Dict[str, Dict[str, Any]], names: List[str],
         folder: Path) -> None:
    """Write the figures of teachers that predict one set of classes."""
    judged = {k: v for k, v in results.items() if 'reliability' in v}
    if judged:
        first = next(iter(judged.values()))
        bars = {'student': [row['student'] for row in first['classes']]}
        curves = {'student': first['reliability']['student']}
        for teacher, found in judged.items():
            bars[teacher] = [row['teacher'] for row in found['classes']]
            curves[teacher] = found['reliability']['teacher']
        with figure_at(folder / 'classes.png') as axes:
            table = pd.DataFrame(bars, index=names_of(first, names))
            table.plot.bar(ax=axes, width=0.8, rot=60, legend=False)
            if len(table) > MOST_NAMES:
                axes.set_xticks([])
            axes.set_ylabel('accuracy on labelled rows')
            axes.figure.legend(loc='outside upper center')
        with figure_at(folder / 'reliability.png') as axes:
            # a calibrated model is on the diagonal
            axes.plot([0, 1], [0, 1], color='grey', linewidth=0.8)
            for name, curve in curves.items():
                points = pd.DataFrame(curve).query('rows > 0')
                axes.plot(points.confidence, points.accuracy, 'o-', label=name)
            axes.set(xlabel='confidence', ylabel='accuracy')
            axes.legend()
    for teacher, found in results.items():
        if 'classes' not in found:
            continue
        columns = names_of(found, names)[:len(found['correlation'])]
        with figure_at(folder / f'correlation_{teacher}.png') as axes:
            image = axes.imshow(
                found['correlation'], vmin=-1, vmax=1, cmap='RdBu_r')
            axes.figure.colorbar(image, label='Pearson correlation')
            axes.set(
                xlabel='class of the teacher', ylabel='class of the student')
            if len(columns) <= MOST_NAMES:
                axes.set_xticks(range(len(columns)), columns, rotation=90)
                axes.set_yticks(range(len(columns)), columns)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.student, 'STUDENT')
    init_default_scope(scope_of(cfg))
    results = {
        name: measure(args, cfg, config, checkpoint)
        for name, config, checkpoint in named_teachers(args)
    }
    names = list(class_names_of(cfg) or [])
    args.out_dir.mkdir(parents=True, exist_ok=True)
    (args.out_dir / 'discrepancy.json').write_text(
        json.dumps(results, indent=1))
    table, more = report(results, names)
    (args.out_dir /
     'discrepancy.md').write_text(f'# Discrepancy\n\n{table}\n\n{more}\n')
    draw(results, names, args.out_dir)
    print(table)
    print(f'Tables and figures are in {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
