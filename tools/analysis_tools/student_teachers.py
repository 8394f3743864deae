"""What tools that look at a student and at teachers have in common."""
import argparse
from pathlib import Path
from typing import Iterator, Tuple

from torch import nn

from mmdist.models.teacher import load_strictly, read_checkpoint, weights_in


def add_models(parser: argparse.ArgumentParser) -> None:
    """The student, and any number of teachers."""
    parser.add_argument('student', help="the student's config")
    parser.add_argument('checkpoint', help="the student's weights")
    parser.add_argument(
        'teachers',
        nargs='+',
        help='config and weights of a teacher, and of others')


def parse_models(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, and refuse a teacher without weights."""
    args = parser.parse_args()
    if len(args.teachers) % 2:
        parser.error('each teacher needs a config and a checkpoint')
    return args


def load_student(model: nn.Module, checkpoint: str) -> None:
    """Load weights as strictly as a teacher's."""
    try:
        weights = weights_in(read_checkpoint(checkpoint), checkpoint)
        load_strictly(model, weights, checkpoint)
    except (ValueError, FileNotFoundError) as error:
        text = str(error).replace('model.teacher.checkpoint', 'CHECKPOINT')
        text = text.replace('model.teacher.config', 'STUDENT')
        raise type(error)(text) from error


def named_teachers(args: argparse.Namespace) -> Iterator[Tuple[str, str, str]]:
    """Name, config and checkpoint of each teacher."""
    stems = [Path(config).stem for config in args.teachers[::2]]
    for i, (stem, config, checkpoint) in enumerate(
            zip(stems, args.teachers[::2], args.teachers[1::2])):
        again = stems.count(stem) > 1
        yield f'{stem}_{i}' if again else stem, config, checkpoint
