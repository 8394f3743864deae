"""Arguments and checkpoints of tools that compare students with teachers."""
import argparse
from pathlib import Path
from typing import Any, Iterator, Tuple

from torch import nn

from mmdist.models.teacher import load_strictly, read_checkpoint
from mmdist.utils import add_class_map


def parse_models(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse a student, any number of teachers, and a tool's own options."""
    parser.add_argument('student', help="the student's config")
    parser.add_argument('checkpoint', help="the student's weights")
    parser.add_argument(
        'teachers',
        nargs='+',
        help='config and weights of a teacher, and of others')
    add_class_map(parser)
    args = parser.parse_args()
    if len(args.teachers) % 2:
        parser.error('each teacher needs a config and a checkpoint')
    return args


def load_student(model: nn.Module, checkpoint: str) -> None:
    """Load weights as strictly as a teacher's."""
    content = read_checkpoint(checkpoint, field='CHECKPOINT')
    load_strictly(model, content, checkpoint, field='CHECKPOINT')


def is_annotated(dataset: Any) -> bool:
    """Whether a data set has annotations, as far as its fields say.

    Args:
        dataset (BaseDataset): One of MMDetection's, MMSegmentation's or
            MMPretrain's, or a wrapper of several.

    Returns:
        bool: False if no image has an object, a mask or a label.
    """
    if not hasattr(dataset, 'get_data_info'):  # one of the user's own
        return True
    first = dataset.get_data_info(0) if len(dataset) else {}
    if 'instances' in first:
        return any(
            dataset.get_data_info(i)['instances'] for i in range(len(dataset)))
    if 'reduce_zero_label' in first:
        return 'seg_map_path' in first
    return set(first) != {'img_path', 'sample_idx'}


def named_teachers(args: argparse.Namespace) -> Iterator[Tuple[str, str, str]]:
    """Name, config and checkpoint of each teacher."""
    stems = [Path(config).stem for config in args.teachers[::2]]
    for i, (stem, config, checkpoint) in enumerate(
            zip(stems, args.teachers[::2], args.teachers[1::2])):
        repeated = stems.count(stem) > 1
        yield f'{stem}_{i}' if repeated else stem, config, checkpoint
