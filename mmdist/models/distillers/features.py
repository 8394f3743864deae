"""Distillation of feature maps."""
from contextlib import contextmanager
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple)

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.errors import ConfigError
from ..taps import tensors_in, watch_method
from ..taps.probe import PROBE_SIZES, CannotSay, probe
from ..teacher import TeacherBatch

FIELD = 'model.feature_loss'
PLACES = ('neck', 'backbone', 'head')
# Some classifiers take images of one size only.
SIZES = (*PROBE_SIZES, 224, 32)


class Extraction(NamedTuple):
    """The feature maps of one batch of images.

    Attributes:
        images (Tensor): The images, as the model was given them.
        maps (list[Tensor]): ``(N, C, H, W)`` or ``(N, C)`` per level.
    """
    images: Tensor
    maps: List[Tensor]


def extractors(model: nn.Module) -> List[str]:
    """Paths of the models that extract features.

    They are ``['']`` but for models of models: trackers, whose detector
    does, and semi-supervised detectors, with a student and a teacher.
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
    """Record the feature maps that a model computes.

    Args:
        model (nn.Module): A model with ``extract_feat``.
        where (str): One of :data:`PLACES`.
        see (Callable): Gets the images before they are extracted.

    Yields:
        dict[int, Extraction]: The last maps of each batch of images, by the
        ``id`` of the images.
    """
    images: List[Tensor] = []
    found: Dict[int, Extraction] = {}

    def begin(arguments: dict) -> None:
        images.append(next(iter(arguments.values())))
        see(images[-1])

    def keep(arguments: dict, result: Any) -> None:
        maps = next(iter(arguments.values())) if where == 'head' else result
        found[id(images[-1])] = Extraction(images[-1], list(tensors_in(maps)))

    owner, method = model, 'extract_feat'
    if where == 'backbone':
        owner, method = model.backbone, 'forward'
    elif where == 'head':
        path = classifying_head(model)
        owner, method = model.get_submodule(path), 'cls_seg'
    with watch_method(owner, method, [],
                      keep), watch_method(model, 'extract_feat', [],
                                          lambda *_: None, begin):
        yield found


class FeatureDistillation(nn.Module):
    """A loss between the feature maps of a student and of a teacher.

    Args:
        loss (nn.Module): Has ``terms(student_map, teacher_map, 'none')``.
        where (str): One of :data:`PLACES`.
        pairs (Sequence[tuple[int, int]]): Levels of the student and of the
            teacher.
        projections (Sequence[nn.Module]): Layers that a student's map goes
            through, one per pair.
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

        Args:
            student_maps (Sequence[Tensor]): ``(N, C, H, W)`` or ``(N, C)``
                per level of the student.
            teacher_maps (Sequence[Tensor]): The teacher's; get no gradient,
                and are resized to the student's height and width.

        Returns:
            dict[str, Tensor]: Scalars in float32.
        """
        if len(student_maps) != len(self.channels):
            # DDRNet and PIDNet return further maps in training.
            student_maps = [
                level for level in student_maps
                if level.shape[1] in self.channels
            ]
        sums: Dict[str, Any] = {}
        for (i, j), project in zip(self.pairs, self.projections):
            own, theirs = project(student_maps[i]), teacher_maps[j].detach()
            if own.shape[2:] != theirs.shape[2:]:
                theirs = F.interpolate(theirs, own.shape[2:], mode='bilinear')
            for name, term in self.loss.terms(own, theirs, 'none').items():
                name = f'feature_{name}'
                sums[name] = sums[name] + term if name in sums else term
        return sums


class FeatureReader:
    """Feature maps of a student and of a teacher in one step.

    Args:
        student (nn.Module): The student.
        teacher (nn.Module): The teacher's model.
        where (str): One of :data:`PLACES`.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module,
                 where: str) -> None:
        self.where = where
        self._student = student.get_submodule(extractors(student)[0])
        self.owner = extractors(teacher)[-1]  # the EMA of a pair of models
        self._teacher = teacher.get_submodule(self.owner)

    @contextmanager
    def watch(self, see: Callable[[Tensor], None]) -> Iterator[None]:
        """Record what both models compute.

        Args:
            see (Callable): Gets the images before the student extracts them.
        """
        with watch_maps(self._student,
                        self.where, see) as self._own, watch_maps(
                            self._teacher, self.where) as self._theirs:
            yield

    def maps(self, batch: TeacherBatch) -> List[Tuple[list, list]]:
        """The maps of both models for each batch that the student extracted,
        to be asked for while both are watched.

        Args:
            batch (TeacherBatch): The teacher's batch of the step.

        Raises:
            ConfigError: If the student extracted none.
        """
        if not self._own:
            raise ConfigError(
                FIELD, 'model.student computes its losses without the maps of '
                f'its {self.where}',
                f'change {FIELD}.where, or remove {FIELD}')
        pairs = []
        for images, own in list(self._own.values()):
            batch.features(images, self.owner)
            shown = id(batch.show(images))
            if shown not in self._theirs:  # nobody asked its heads yet
                head = classifying_head(self._teacher).split('.')
                several = isinstance(self._teacher.decode_head, nn.ModuleList)
                batch.head_outputs(['.'.join(head[:2 if several else 1])])
            pairs.append((own, self._theirs[shown].maps))
        return pairs


def distil_features(loss: nn.Module,
                    student: nn.Module,
                    teacher: nn.Module,
                    where: Optional[str] = None,
                    layers: Optional[Sequence[int]] = None,
                    project: Optional[bool] = None) -> FeatureDistillation:
    """Pair the feature maps of two models.

    Args:
        loss (nn.Module): Has ``terms(student_map, teacher_map, 'none')``.
        student (nn.Module): The student.
        teacher (nn.Module): The teacher's model.
        where (str, optional): 'neck', which is the default where both models
            have one, 'backbone', or 'head', the map before a decode head's
            last convolution.
        layers (Sequence[int], optional): The student's levels. None takes all
            that pair.
        project (bool, optional): Whether the student's maps go through 1x1
            convolutions. None lets those whose channels differ.

    Raises:
        ConfigError: If the maps of the two models cannot be compared.
    """
    try:
        loss.terms(*torch.rand(2, 2, 3, 4, 4), 'none')
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{FIELD}.type', f'{type(loss).__name__} does not compare feature '
            f'maps ({error})',
            'choose mmdist.DISTLoss or mmdist.MimicLoss') from error
    if project not in (None, True, False):
        raise ConfigError(f'{FIELD}.project', f'{project!r} is no choice',
                          'use True, False, or leave it out')
    models = {}
    for name, model in dict(student=student, teacher=teacher).items():
        paths = extractors(model)
        if not paths:
            raise ConfigError(
                FIELD, f'model.{name} is a {type(model).__name__}, which has '
                'no backbone whose feature maps could be read',
                'leave feature_loss out')
        path = paths[0] if name == 'student' else paths[-1]
        models[name] = model.get_submodule(path)
    where = _checked_place(where, models)
    own, theirs = map_shapes(models, where)
    pairs = pair_levels(own, theirs, layers)
    projections, texts = [], []
    for i, j in pairs:
        channels = own[i][1], theirs[j][1]
        texts.append(f'{i} with {j} ({channels[0]} to {channels[1]} channels')
        if channels[0] == channels[1] and not project:
            projections.append(nn.Identity())
        elif project is False:
            raise ConfigError(
                f'{FIELD}.project', f'level {i} of model.student has '
                f'{channels[0]} channels, and level {j} of model.teacher '
                f'{channels[1]}', 'leave project out')
        else:
            texts[-1] += ', projected'
            projections.append(
                nn.Conv2d(*channels, 1) if len(own[i]) == 4 else nn.Linear(
                    *channels))
    print_log(
        f'{FIELD}: outputs of the {where}, {"), ".join(texts)})',
        logger='current')
    return FeatureDistillation(loss, where, pairs, projections,
                               [shape[1] for shape in own])


def _checked_place(where: Optional[str], models: Dict[str, nn.Module]) -> str:
    """The place that is read, which both models must have."""
    without = [n for n, m in models.items() if not getattr(m, 'neck', None)]
    if where is None:
        return 'backbone' if without else 'neck'
    if where not in PLACES:
        raise ConfigError(f'{FIELD}.where',
                          f'{where!r} is not a place that can be read',
                          f'choose one of {", ".join(PLACES)}')
    if where == 'head':
        without = [n for n, m in models.items() if not classifying_head(m)]
    if without and where != 'backbone':
        part = 'decode head with conv_seg' if where == 'head' else 'neck'
        raise ConfigError(
            f'{FIELD}.where', f'{" and ".join(f"model.{n}" for n in without)} '
            f'has no {part}', "choose 'backbone', or leave it out")
    return where


def map_shapes(models: Dict[str, nn.Module],
               where: str) -> List[List[torch.Size]]:
    """Shapes of the maps of both models by level, for one random image."""
    if where == 'head':  # one map; its size does not matter
        heads = [m.get_submodule(classifying_head(m)) for m in models.values()]
        return [[torch.Size((1, h.conv_seg.in_channels, 1, 1))] for h in heads]
    shapes = []
    try:
        size = max(probe(model, SIZES).size for model in models.values())
        for model in models.values():
            with watch_maps(model, where) as found:
                probe(model, [size])
            maps = list(found.values())[-1].maps
            shapes.append([level.shape for level in maps])
    except CannotSay as error:
        raise ConfigError(
            FIELD, 'no random image shows the feature maps of the models '
            f'({str(error.__cause__).splitlines()[0]})',
            'leave feature_loss out') from error
    for name, levels in zip(models, shapes):
        if not levels or any(len(shape) not in (2, 4) for shape in levels):
            raise ConfigError(
                f'{FIELD}.where', f'model.{name} gives no maps of channels '
                f'there, but {"tokens" if levels else "nothing"}',
                f'choose another of {", ".join(PLACES)}')
    return shapes


def pair_levels(student: Sequence[torch.Size], teacher: Sequence[torch.Size],
                layers: Optional[Sequence[int]]) -> List[Tuple[int, int]]:
    """Pair the levels of two models by their strides.

    Levels of one size pair in order, beginning with the deepest. Where the
    two models have no size in common, all levels pair in that order.

    Args:
        student (Sequence[torch.Size]): Shapes of the student's maps for an
            image, e.g. ``(1, C, H, W)``.
        teacher (Sequence[torch.Size]): The teacher's, for the same image.
        layers (Sequence[int], optional): The student's levels to take.

    Returns:
        list[tuple[int, int]]: Indices into both.

    Raises:
        ConfigError: If ``layers`` names a level that does not exist or that
            pairs with none.
    """
    everything = range(len(student))
    if layers is not None and not (layers and set(layers) <= set(everything)):
        raise ConfigError(f'{FIELD}.layers',
                          f'{layers!r} does not list levels of model.student',
                          f'choose among {", ".join(map(str, everything))}')
    sizes = {tuple(shape[2:])
             for shape in student} & {tuple(shape[2:])
                                      for shape in teacher}
    pairs = []
    for size in sizes or [None]:
        own, theirs = ([
            i for i, shape in enumerate(shapes)
            if size is None or tuple(shape[2:]) == size
        ] for shapes in (student, teacher))
        pairs += zip(own[::-1], theirs[::-1])
    chosen = sorted(p for p in pairs if layers is None or p[0] in layers)
    missing = set(layers or ()) - {i for i, _ in chosen}
    if missing:
        raise ConfigError(
            f'{FIELD}.layers', f'level {min(missing)} of model.student has '
            'a stride that model.teacher has not',
            f'choose among {", ".join(str(i) for i, _ in sorted(pairs))}')
    return chosen
