"""Show what a student and its teacher predict for the same images.

A row of three: the ground truth, the student and the teacher, drawn by the
visualizer of the student's config.
"""
import argparse
import copy
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence

import matplotlib
import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from rich.progress import track
from student_teachers import is_annotated, load_student
from torch import nn

from mmdist.errors import ConfigError
from mmdist.models.teacher import Teacher, build_model
from mmdist.utils import (data_sets_in, library_of, load_config, run_tool,
                          scope_of, wrapper_for)

TITLES = ('ground truth', 'student', 'teacher')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('student', help="the student's config")
    parser.add_argument('checkpoint', help="the student's weights")
    parser.add_argument('teacher', help="the teacher's config")
    parser.add_argument('teacher_checkpoint', help="the teacher's weights")
    parser.add_argument(
        '--split', choices=['val', 'test'], default='val', help='of the data')
    parser.add_argument(
        '--number', type=int, default=8, help='of images (default: 8)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='of the boxes that are drawn (default: 0.3)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--out-dir', type=Path, default=Path('work_dirs/predictions'))
    return parser.parse_args()


def draw(library: str, visualizer: Visualizer, image: np.ndarray,
         sample: BaseDataElement, truth: bool, score_thr: float) -> np.ndarray:
    """The image with its truth or with what a model predicts."""
    visualizer.set_image(image)  # nothing is drawn without a truth
    which = dict(draw_gt=truth, draw_pred=not truth)
    if library == 'mmpretrain':
        classes = visualizer.dataset_meta['classes']
        visualizer.visualize_cls(
            image, sample, classes=classes, resize=300, **which)
    else:
        if library == 'mmdet':
            which['pred_score_thr'] = score_thr
        visualizer.add_datasample('', image, sample, **which)
    return visualizer.get_image()


def visualizer_of(cfg: Config, name: str, metainfo: dict,
                  classes: Optional[Sequence[str]]) -> Visualizer:
    """A visualizer like the config's, with the names of its classes."""
    # MMEngine has one of a name.
    visualizer = VISUALIZERS.build(
        dict(cfg.visualizer, vis_backends=[], name=name))
    visualizer.dataset_meta = metainfo
    if classes and len(classes) != len(metainfo['classes']):
        colours = np.random.default_rng(0).integers(
            256, size=(len(classes), 3))
        visualizer.dataset_meta = dict(
            classes=tuple(classes), palette=[*map(tuple, colours.tolist())])
    return visualizer


def save_row(images: List[np.ndarray], path: Path) -> None:
    """Write the images of a row beside each other."""
    height, width = images[0].shape[:2]
    figure = Figure(
        figsize=(15, 5 * height / width + 0.4), layout='constrained')
    for axes, image, title in zip(figure.subplots(1, 3), images, TITLES):
        axes.imshow(image)
        axes.set_title(title)
        axes.axis('off')
    figure.savefig(path, dpi=100)


@torch.no_grad()
def predictions(loader: Any, models: List[nn.Module],
                number: int) -> Iterator[List[BaseDataElement]]:
    """Predictions of each model for the first images."""
    for data in loader:
        # models write what they predict into the samples
        both = [model.test_step(copy.deepcopy(data)) for model in models]
        for samples in zip(*both):
            yield samples
            number -= 1
            if not number:
                return


def loader_of(cfg: Config, split: str) -> Any:
    """Images of a split; those without masks are not asked for them.

    The test pipelines of MMSegmentation load masks for its metrics. (Boxes
    and labels may be missing: nothing fails then.)
    """
    loader = copy.deepcopy(cfg[f'{split}_dataloader'])
    built = Runner.build_dataloader(loader)
    if library_of(cfg) != 'mmseg' or is_annotated(built.dataset):
        return built
    for data_set in data_sets_in(loader['dataset']):
        names = [
            getattr(step['type'], '__name__', step['type'])
            for step in data_set['pipeline']
        ]
        data_set['pipeline'] = [
            step for step, name in zip(data_set['pipeline'], names)
            if not name.endswith('LoadAnnotations')
        ]
    return Runner.build_dataloader(loader)


def main() -> None:
    args = parse_args()
    matplotlib.use('Agg')
    cfg = load_config(args.student, 'STUDENT')
    wrapper_for(cfg, 'STUDENT')  # refuses other libraries
    init_default_scope(scope_of(cfg))
    for field in (f'{args.split}_dataloader', 'visualizer'):
        if not cfg.get(field):
            raise ConfigError('STUDENT', f'it has no {field}',
                              'choose another --split, or add it')
    loader = loader_of(cfg, args.split)
    student = build_model(cfg.model, 'STUDENT',
                          cfg.get('data_preprocessor'))[0]
    load_student(student, args.checkpoint)
    teacher = Teacher(args.teacher, args.teacher_checkpoint, field='TEACHER')
    models = [m.to(args.device).eval() for m in (student, teacher.model)]
    visualizers = [
        visualizer_of(cfg, title, loader.dataset.metainfo, classes)
        for title, classes in zip(TITLES, (None, None, teacher.class_names))
    ]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    found = predictions(loader, models, args.number)
    total = min(args.number, len(loader.dataset))
    for i, (ours, theirs) in enumerate(track(found, 'Images', total)):
        image = mmcv.imread(ours.img_path, channel_order='rgb')
        row = [
            draw(
                library_of(cfg), visualizer, image, sample, truth,
                args.score_thr)
            for visualizer, sample, truth in zip(visualizers, (
                ours, ours, theirs), (True, False, False))
        ]
        save_row(row, args.out_dir / f'{i:03d}_{Path(ours.img_path).stem}.png')
    print(f'{total} images are in {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
