"""Distillation of feature maps."""
from contextlib import ExitStack, contextmanager
from typing import (Any, Callable, Dict, Iterator, List, NamedTuple, Optional,
                    Sequence, Tuple)

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.errors import ConfigError
from ..taps import tensors_in, watch_method
from ..taps.probe import PROBE_SIZES, CannotSay, eval_mode, probe
from ..teacher import TeacherBatch

FIELD = 'model.feature_loss'
PLACES = ('neck', 'backbone', 'head')
# Some classifiers take images of one size only.
SIZES = (*PROBE_SIZES, 224, 32)


def first(arguments: Dict[str, Any]) -> Any:
    """The first of the arguments of a call."""
    return next(iter(arguments.values()))


class Extraction(NamedTuple):
    """One computation of feature maps.

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


@contextmanager
def watch_maps(model: nn.Module,
               where: str,
               see: Optional[Callable] = None) -> Iterator[List[Extraction]]:
    """Record the feature maps that a model computes.

    Args:
        model (nn.Module): A model with ``extract_feat``.
        where (str): One of :data:`PLACES`.
        see (Callable, optional): Gets the images before they are extracted.

    Yields:
        list[Extraction]: Grows with each computation.
    """
    extracted: List[Extraction] = []
    read: List[Extraction] = []
    inner: List[Any] = []

    def read_neck(arguments: dict, result: Any) -> Extraction:
        maps = inner[-1] if where == 'backbone' else result
        return Extraction(first(arguments), list(tensors_in(maps)))

    def read_head(arguments: dict, result: Any) -> Extraction:
        return Extraction(extracted[-1].images, [first(arguments)])

    with ExitStack() as stack:
        if where == 'backbone':
            stack.enter_context(
                watch_method(model.backbone, 'forward', inner,
                             lambda _, result: result))
        if where == 'head':
            head = classifying_head(model)
            stack.enter_context(watch_method(head, 'cls_seg', read, read_head))
        stack.enter_context(
            watch_method(model, 'extract_feat', extracted, read_neck, see
                         and (lambda arguments: see(first(arguments)))))
        yield read if where == 'head' else extracted


def classifying_head(model: nn.Module) -> Optional[nn.Module]:
    """The last decode head that classifies a feature map by ``cls_seg``."""
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    return head if hasattr(head, 'cls_seg') else None


class FeatureDistillation(nn.Module):
    """A loss between the feature maps of a student and of a teacher.

    Args:
        loss (nn.Module): Has ``terms(student_map, teacher_map, 'none')``.
        where (str): One of :data:`PLACES`.
        pairs (Sequence[tuple[int, int]]): Levels of the student and of the
            teacher.
        projections (Sequence[nn.Module]): Layers that a student's map goes
            through, one per pair.
    """

    def __init__(self, loss: nn.Module, where: str,
                 pairs: Sequence[Tuple[int, int]],
                 projections: Sequence[nn.Module]) -> None:
        super().__init__()
        self.loss, self.where, self.pairs = loss, where, list(pairs)
        self.projections = nn.ModuleList(projections)

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
    def watch(self, see: Optional[Callable] = None) -> Iterator[None]:
        """Record what both models compute.

        Args:
            see (Callable, optional): Gets the images before the student
                extracts them.
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
                f'its {self.where}', f'set {FIELD}.where, or leave it out')
        return [(own, self._answer(images, batch))
                for images, own in list(self._own)]

    def _answer(self, images: Tensor, batch: TeacherBatch) -> List[Tensor]:
        """The teacher's maps of some images, computed if they are not yet."""
        features = batch.features(images, self.owner)
        shown = batch.show(images)
        known = [e.maps for e in self._theirs if e.images is shown]
        if not known:
            with batch.computing():
                classifying_head(self._teacher)(features)
            known = [self._theirs[-1].maps]
        return known[0]


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
    _check_loss(loss)
    models = dict(student=student, teacher=teacher)
    inner = {}
    for name, model in models.items():
        paths = extractors(model)
        if not paths:
            raise ConfigError(
                FIELD, f'model.{name} is a {type(model).__name__}, which has '
                'no backbone whose feature maps could be read',
                'leave feature_loss out')
        path = paths[0] if name == 'student' else paths[-1]
        inner[name] = model.get_submodule(path)
    where = _check_place(where, inner)
    if project not in (None, True, False):
        raise ConfigError(f'{FIELD}.project', f'{project!r} is no choice',
                          'use True, False, or leave it out')
    shapes = _map_shapes(inner['student'], inner['teacher'], where)
    pairs = pair_levels(*shapes, layers)
    projections = []
    for i, j in pairs:
        own, theirs = shapes[0][i], shapes[1][j]
        if project is False and own[1] != theirs[1]:
            raise ConfigError(
                f'{FIELD}.project', f'level {i} of model.student has '
                f'{own[1]} channels, and level {j} of model.teacher '
                f'{theirs[1]}', 'leave project out')
        if own[1] == theirs[1] and not project:
            projections.append(nn.Identity())
        elif len(own) == 4:
            projections.append(nn.Conv2d(own[1], theirs[1], 1))
        else:
            projections.append(nn.Linear(own[1], theirs[1]))
    print_log(
        f'{FIELD}: outputs of the {where}, '
        f'{describe(pairs, projections, shapes)}',
        logger='current')
    return FeatureDistillation(loss, where, pairs, projections)


def describe(pairs: Sequence[Tuple[int,
                                   int]], projections: Sequence[nn.Module],
             shapes: Sequence[Sequence[torch.Size]]) -> str:
    """The pairs of levels, with their channels, for the log."""
    return ', '.join(
        f'{i} with {j} ({shapes[0][i][1]} to {shapes[1][j][1]} channels'
        f'{"" if isinstance(layer, nn.Identity) else ", projected"})'
        for (i, j), layer in zip(pairs, projections))


def _check_loss(loss: nn.Module) -> None:
    maps = torch.rand(2, 2, 3, 4, 4)
    try:
        loss.terms(*maps, 'none')
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f'{FIELD}.type', f'{type(loss).__name__} does not compare feature '
            f'maps ({error})',
            'choose mmdist.DISTLoss or mmdist.MimicLoss') from error


def _check_place(where: Optional[str], models: Dict[str, nn.Module]) -> str:
    """The place that is read, which both models must have."""
    without = [n for n, m in models.items() if not getattr(m, 'neck', None)]
    if where is None:
        return 'backbone' if without else 'neck'
    if where not in PLACES:
        raise ConfigError(f'{FIELD}.where', f'{where!r} is no place',
                          f'choose one of {", ".join(PLACES)}')
    if where == 'head':
        without = [n for n, m in models.items() if not classifying_head(m)]
    if without and where != 'backbone':
        part = 'decode head with cls_seg' if where == 'head' else 'neck'
        raise ConfigError(
            f'{FIELD}.where', f'{" and ".join(f"model.{n}" for n in without)} '
            f'has no {part}', "choose 'backbone', or leave it out")
    return where


def _map_shapes(student: nn.Module, teacher: nn.Module,
                where: str) -> List[List[torch.Size]]:
    """Shapes of the maps of both models, for one random image."""
    try:
        size = max(probe(model, SIZES).size for model in (student, teacher))
        shapes = []
        for model in (student, teacher):
            with watch_maps(model, where) as seen, eval_mode(model):
                features = probe(model, [size]).features
                if where == 'head':
                    with torch.no_grad():
                        classifying_head(model)(features)
            shapes.append(
                [level.shape for call in seen[-1:] for level in call.maps])
    except CannotSay as error:
        raise ConfigError(
            FIELD, 'no random image shows the feature maps of the models '
            f'({str(error.__cause__).splitlines()[0]})',
            'leave feature_loss out') from error
    for name, levels in zip(('student', 'teacher'), shapes):
        if not levels:
            raise ConfigError(f'{FIELD}.where',
                              f'model.{name} computes no map of its {where}',
                              f'choose another of {", ".join(PLACES)}')
        if any(len(shape) not in (2, 4) for shape in levels):
            raise ConfigError(
                f'{FIELD}.where', f'model.{name} gives tokens there, not maps '
                'of channels', f'choose another of {", ".join(PLACES)}')
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
                          f'{layers!r} are no levels of model.student',
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
