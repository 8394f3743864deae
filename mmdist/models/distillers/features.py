"""Distillation of feature maps."""
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from typing import (Any, Callable, Dict, Iterator, List, Optional, Sequence,
                    Tuple)

import torch.nn.functional as F
from torch import Tensor, nn

from mmdist.errors import ConfigError
from ..taps import tensors_in, watch_method
from ..teacher import TeacherBatch

FIELD = 'model.feature_loss'
PLACES = ('neck', 'backbone', 'head')
# Images that a model was given, and their maps per level, ``(N, C, H, W)`` or
# ``(N, C)``.
Extraction = Tuple[Tensor, List[Tensor]]


def extractors(model: nn.Module) -> List[str]:
    """Paths of the models that extract features.

    ``['']`` for a plain model. A tracker has its detector's path, a
    semi-supervised detector those of its student and teacher.
    """
    return [
        path for path, part in model.named_modules()
        if hasattr(part, 'extract_feat') and hasattr(part, 'backbone')
    ]


def classifying_head(model: nn.Module) -> Optional[str]:
    """Path of the last decode head with a ``conv_seg``, which may stand within
    another (K-Net)."""
    paths = [
        path for path, part in model.named_modules()
        if path.startswith('decode_head') and hasattr(part, 'conv_seg')
    ]
    return paths[-1] if paths else None


@contextmanager
def watch_maps(
    model: nn.Module,
    where: str,
    see: Callable[[Tensor], None] = lambda images: None
) -> Iterator[Dict[int, Extraction]]:
    """Record the feature maps that a model computes at one of ``PLACES``.

    Yields the last maps of each batch of images, by the ``id`` of the images,
    which ``see`` gets before they are extracted.
    """
    images: List[Tensor] = []
    found: Dict[int, Extraction] = {}

    def begin(arguments: dict) -> None:
        images.append(next(iter(arguments.values())))
        see(images[-1])

    def keep(arguments: dict, result: Any) -> None:
        maps = next(iter(arguments.values())) if where == 'head' else result
        found[id(images[-1])] = images[-1], list(tensors_in(maps))

    owner, method = model, 'extract_feat'
    if where == 'backbone':
        owner, method = model.backbone, 'forward'
    elif where == 'head':
        owner = model.get_submodule(classifying_head(model))
        method = 'cls_seg'
    with watch_method(owner, method, keep), watch_method(
            model, 'extract_feat', before=begin):
        yield found


class FeatureDistillation(nn.Module):
    """A loss between the feature maps of a student and of a teacher.

    Args:
        loss (nn.Module): Has ``terms(student_map, teacher_map, 'none')``.
        where (str): One of :data:`PLACES`.
        pairs (Sequence[tuple[int, int]]): Levels of student and teacher.
        projections (Sequence[nn.Module]): The layer that the student's map of
            each pair goes through.
        channels (Sequence[int]): Channels of all levels of the student.
    """

    def __init__(self, loss: nn.Module, where: str,
                 pairs: Sequence[Tuple[int,
                                       int]], projections: Sequence[nn.Module],
                 channels: Sequence[int]) -> None:
        super().__init__()
        self.loss, self.where, self.pairs = loss, where, list(pairs)
        self.projections = nn.ModuleList(projections)
        self.channels = list(channels)

    def terms(self, student_maps: Sequence[Tensor],
              teacher_maps: Sequence[Tensor]) -> Dict[str, Tensor]:
        """The terms of the loss as ``feature_<term>``, summed over levels.

        The maps are ``(N, C, H, W)`` or ``(N, C)`` per level. The teacher's
        get no gradient, and are resized to the student's height and width.
        """
        if len(student_maps) != len(self.channels):
            # DDRNet and PIDNet return further maps in training.
            student_maps = [
                level for level in student_maps
                if level.shape[1] in self.channels
            ]
        sums: Dict[str, Any] = defaultdict(float)
        for (i, j), project in zip(self.pairs, self.projections):
            own, theirs = project(student_maps[i]), teacher_maps[j].detach()
            if own.shape[2:] != theirs.shape[2:]:
                theirs = F.interpolate(theirs, own.shape[2:], mode='bilinear')
            for name, term in self.loss.terms(own, theirs, 'none').items():
                sums[f'feature_{name}'] += term
        return dict(sums)


@contextmanager
def watch_both(
    student: nn.Module, teacher: nn.Module, where: str,
    see: Callable[[str, Tensor], None]
) -> Iterator[Callable[[TeacherBatch], List[Tuple[list, list]]]]:
    """Record the feature maps of a student and of a teacher in one step.

    ``see`` gets the path of the teacher's extractor, and the images before
    the student extracts them. Yields a function that takes the teacher's
    batch and returns the maps of both for each batch that the student
    extracted, to be called while both are watched.
    """
    path = extractors(teacher)[-1]  # the EMA of a pair of models
    extractor = teacher.get_submodule(path)

    def maps(batch: TeacherBatch) -> List[Tuple[list, list]]:
        if not own:
            raise ConfigError(
                FIELD, 'model.student computes its losses without the maps of '
                f'its {where}', f'change {FIELD}.where, or remove {FIELD}')
        pairs = []
        for images, levels in list(own.values()):
            batch.features(images, path)
            shown = id(batch.renormalised(images))
            if shown not in theirs:  # nobody asked its heads yet
                head = classifying_head(extractor).split('.')
                several = isinstance(extractor.decode_head, nn.ModuleList)
                batch.head_outputs(['.'.join(head[:2 if several else 1])])
            pairs.append((levels, theirs[shown][1]))
        return pairs

    with watch_maps(
            student.get_submodule(extractors(student)[0]), where,
            partial(see, path)) as own, watch_maps(extractor, where) as theirs:
        yield maps
