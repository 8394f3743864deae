"""Show what a student and its teacher predict for the same pictures.

A row of three: the ground truth, the student and the teacher, drawn by the
visualizer of the student's config.
"""
import argparse
import copy
from pathlib import Path
from typing import Any, List

import matplotlib
import mmcv
import numpy as np
import torch
from analyze_discrepancy import load_student
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from mmengine.visualization import Visualizer
from rich.progress import track
from torch import nn

from mmdist.models.teacher import Teacher, build_model
from mmdist.utils import load_config, run_tool, scope_of, student_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('student', help="the student's config")
    parser.add_argument('checkpoint', help="the student's weights")
    parser.add_argument('teacher', help="the teacher's config")
    parser.add_argument('teacher_checkpoint', help="the teacher's weights")
    parser.add_argument(
        '--split', choices=['val', 'test'], default='val', help='of the data')
    parser.add_argument(
        '--number', type=int, default=8, help='of pictures (default: 8)')
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='of the boxes that are drawn (default: 0.3)')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--out-dir', type=Path, default=Path('work_dirs/predictions'))
    return parser.parse_args()


def models_of(args: argparse.Namespace, cfg: Config) -> List[nn.Module]:
    """The student and the teacher, with their weights."""
    student = build_model(
        student_of(cfg.model), 'STUDENT', cfg.get('data_preprocessor'))[0]
    load_student(student, args.checkpoint)
    teacher = Teacher(args.teacher, args.teacher_checkpoint).model
    return [model.to(args.device).eval() for model in (student, teacher)]


def drawn(visualizer: Visualizer, sample: BaseDataElement, what: str,
          options: dict) -> np.ndarray:
    """A picture with the truth ('gt') or the predictions ('pred')."""
    picture = mmcv.imread(sample.img_path, channel_order='rgb')
    other = dict(draw_gt=what == 'gt', draw_pred=what == 'pred')
    visualizer.add_datasample('', picture, sample, **other, **options)
    return visualizer.get_image()


def save_row(pictures: List[np.ndarray], path: Path) -> None:
    """Write the pictures of a row beside each other."""
    from matplotlib.figure import Figure
    height, width = pictures[0].shape[:2]
    figure = Figure(
        figsize=(15, 5 * height / width + 0.4), layout='constrained')
    titles = ('ground truth', 'student', 'teacher')
    for axes, picture, title in zip(figure.subplots(1, 3), pictures, titles):
        axes.imshow(picture)
        axes.set_title(title)
        axes.axis('off')
    figure.savefig(path, dpi=100)


@torch.no_grad()
def browse(args: argparse.Namespace, cfg: Config, loader: Any,
           models: List[nn.Module]) -> int:
    """Write the rows; how many they are."""
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, vis_backends=[]))
    # The visualizer of detectors asks which boxes to draw.
    options = dict(
        pred_score_thr=args.score_thr) if scope_of(cfg) == 'mmdet' else {}
    visualizer.dataset_meta = loader.dataset.metainfo
    written = 0
    for data in track(loader, 'Pictures'):
        # models write what they predict into the samples
        samples = [model.test_step(copy.deepcopy(data)) for model in models]
        for student, teacher in zip(*samples):
            if written == args.number:
                return written
            row = [
                drawn(visualizer, sample, what, options)
                for sample, what in ((student, 'gt'), (student, 'pred'),
                                     (teacher, 'pred'))
            ]
            name = Path(student.img_path).stem
            save_row(row, args.out_dir / f'{name}.png')
            written += 1
    return written


def main() -> None:
    args = parse_args()
    matplotlib.use('Agg')
    cfg = load_config(args.student, 'STUDENT')
    init_default_scope(scope_of(cfg))
    loader = Runner.build_dataloader(cfg[f'{args.split}_dataloader'])
    models = models_of(args, cfg)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    number = browse(args, cfg, loader, models)
    print(f'{number} pictures are in {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
