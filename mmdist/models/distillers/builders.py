"""Losses of a distilled model, built from its config."""
import inspect
from difflib import get_close_matches
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from mmengine.logging import print_log
from torch import nn

from mmdist.errors import ConfigError
from mmdist.registry import MODELS
from ..taps.probe import PROBE_SIZES, CannotSay, probe
from ..teacher import preserve_rng
from .features import (FIELD, PLACES, FeatureDistillation, classifying_head,
                       extractors, watch_maps)

# Some classifiers take images of one size only.
SIZES = (*PROBE_SIZES, 224, 32)


def build_loss(cfg: dict, field: str, base: type = nn.Module) -> nn.Module:
    """Build a loss, of mmdist or the user's own, which must be a ``base``."""
    if not isinstance(cfg, dict) or not cfg.get('type'):
        raise ConfigError(field,
                          f'it must be a dict with a `type`, but is {cfg!r}')
    name = str(getattr(cfg['type'], '__name__', cfg['type']))
    scope, _, name = name.rpartition('.')
    try:
        loss = MODELS.build(cfg)
    except ConfigError as error:
        raise ConfigError(f'{field}.{error.field}', error.problem,
                          error.remedy) from error
    except (KeyError, TypeError) as error:
        remedy, losses = '', MODELS.module_dict
        if isinstance(error, KeyError):
            spelt = {n.lower(): n for n in losses if n.endswith('Loss')}
            likely = get_close_matches(name.lower(), spelt, 1,
                                       0.6 if scope == 'mmdist' else 1)
            remedy = 'import the module of your own loss by custom_imports'
            if likely:
                remedy = f'write mmdist.{spelt[likely[0]]}'
        elif name in losses:
            known = ', '.join(inspect.signature(losses[name]).parameters)
            remedy = f'{name} takes {known}'
        raise ConfigError(field, ' '.join(map(str, error.args)),
                          remedy) from error
    if not isinstance(loss, base):
        raise ConfigError(
            field, f'{type(loss).__name__} is no loss on logits',
            'choose mmdist.DISTLoss or mmdist.KDLoss, or derive it from '
            'mmdist.models.losses.LogitLoss')
    return loss


def build_mimic(cfg: dict, student: nn.Module,
                teacher: nn.Module) -> nn.Module:
    """Build ``model.mimic_loss`` for the necks of two models."""
    field = 'model.mimic_loss'
    models = dict(student=student, teacher=teacher)
    for name, model in models.items():
        if not getattr(model, 'with_neck', False):
            raise ConfigError(
                field, 'it compares the outputs of necks, but '
                f'model.{name} has no neck')
    names = 'student_channels', 'teacher_channels'
    if isinstance(cfg, dict) and not set(names) <= cfg.keys():
        shapes = map_shapes(
            models, 'neck', field, 'list student_channels and '
            'teacher_channels there, a number for each level')
        own, theirs = ([list(shape[2:]) for shape in levels]
                       for levels in shapes)
        if [] in own + theirs:
            raise ConfigError(
                field, 'it compares feature maps, but a neck returns one '
                'vector for an image')
        if len(own) == len(theirs) and own != theirs:
            raise ConfigError(
                field, 'it compares features level by level, but for one '
                f'image model.student has the sizes {own} and model.teacher '
                f'{theirs}', 'give model.student.neck the strides of the '
                'teacher')
        channels = ([shape[1] for shape in levels] for levels in shapes)
        cfg = {**dict(zip(names, channels)), **cfg}
    with preserve_rng():  # the student of a seed stays the same
        return build_loss(cfg, field)


def build_features(cfg: dict, student: nn.Module,
                   teacher: nn.Module) -> FeatureDistillation:
    """Build ``model.feature_loss`` for two models.

    Beside a loss with ``terms(student_map, teacher_map, 'none')``, the config
    may say ``where``: 'neck', which is the default where both models have
    one, 'backbone', or 'head', the map before a decode head's last
    convolution; ``layers``, the student's levels, None for all that pair; and
    ``project``, whether the student's maps go through 1x1 convolutions, None
    for those whose channels differ.
    """
    fields = {}
    if isinstance(cfg, dict):
        cfg = dict(cfg)
        fields = {
            name: cfg.pop(name, None)
            for name in ('where', 'layers', 'project')
        }
    with preserve_rng():  # the student of a seed stays the same
        return _paired(build_loss(cfg, FIELD), student, teacher, **fields)


def _paired(loss: nn.Module, student: nn.Module, teacher: nn.Module,
            where: Optional[str], layers: Optional[Sequence[int]],
            project: Optional[bool]) -> FeatureDistillation:
    """A loss on the feature maps of two models, if these can be compared."""
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
    for name, model, i in ('student', student, 0), ('teacher', teacher, -1):
        paths = extractors(model)
        if not paths:
            raise ConfigError(
                FIELD, f'model.{name} is a {type(model).__name__}, which has '
                'no backbone whose feature maps could be read',
                'leave feature_loss out')
        models[name] = model.get_submodule(paths[i])
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
            f'{FIELD}.where', f'there is no {part} in '
            f'{" and ".join(f"model.{n}" for n in without)}',
            "choose 'backbone', or leave it out")
    return where


def map_shapes(
    models: Dict[str, nn.Module],
    where: str,
    field: str = FIELD,
    remedy: str = 'choose another place, or leave it out'
) -> List[List[torch.Size]]:
    """Shapes of the maps of both models by level, for one random image."""
    if where == 'head':  # one map; its size does not matter
        heads = [m.get_submodule(classifying_head(m)) for m in models.values()]
        return [[torch.Size((1, h.conv_seg.in_channels, 1, 1))] for h in heads]

    def maps_of(model: nn.Module, sizes: Sequence[int]) -> tuple:
        """The size of the image, and the shapes."""
        with watch_maps(model, where) as found:
            size = probe(model, sizes).size
        _, maps = list(found.values())[-1]
        return size, [level.shape for level in maps]

    try:
        probed = [maps_of(model, SIZES) for model in models.values()]
        largest = max(size for size, _ in probed)
        shapes = [
            levels if size == largest else maps_of(model, [largest])[1]
            for model, (size, levels) in zip(models.values(), probed)
        ]
    except CannotSay as error:
        raise ConfigError(
            field, 'a model does not run on a random image, which would show '
            f'its feature maps ({error.__cause__!r})', remedy) from error
    for name, levels in zip(models, shapes):
        if not levels or any(len(shape) not in (2, 4) for shape in levels):
            raise ConfigError(
                f'{FIELD}.where' if field == FIELD else field,
                f'the {where} of model.{name} gives no maps of channels, but '
                f'{"tokens" if levels else "nothing"}', remedy)
    return shapes


def pair_levels(student_shapes: Sequence[torch.Size],
                teacher_shapes: Sequence[torch.Size],
                layers: Optional[Sequence[int]]) -> List[Tuple[int, int]]:
    """Pair the levels of two models by the shapes of their maps.

    Levels of one size pair in order, beginning with the deepest. Where the
    two models have no size in common, all levels pair in that order.
    ``layers`` names the student's levels to take.
    """
    everything = range(len(student_shapes))
    listed = isinstance(layers, (list, tuple)) and set(layers)
    if layers is not None and not (listed and listed <= set(everything)):
        raise ConfigError(f'{FIELD}.layers',
                          f'{layers!r} does not list levels of model.student',
                          f'choose among {", ".join(map(str, everything))}')
    sizes = {tuple(shape[2:])
             for shape in student_shapes
             } & {tuple(shape[2:])
                  for shape in teacher_shapes}
    pairs = []
    for size in sizes or [None]:
        own, theirs = ([
            i for i, shape in enumerate(shapes)
            if size is None or tuple(shape[2:]) == size
        ] for shapes in (student_shapes, teacher_shapes))
        pairs += zip(own[::-1], theirs[::-1])
    chosen = sorted(p for p in pairs if layers is None or p[0] in layers)
    missing = set(layers or ()) - {i for i, _ in chosen}
    if missing:
        raise ConfigError(
            f'{FIELD}.layers', f'level {min(missing)} of model.student has '
            'a stride that model.teacher has not',
            f'choose among {", ".join(str(i) for i, _ in sorted(pairs))}')
    return chosen
