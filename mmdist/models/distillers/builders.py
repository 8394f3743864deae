"""The parts of a distilled model, built from its config."""
import inspect
from typing import Any, Dict, Optional

from torch import nn

from mmdist.registry import MODELS
from ..losses.base import LogitLoss
from ..taps.probe import neck_channels
from ..teacher import Teacher, preserve_rng
from .features import FeatureDistillation, build_feature_distillation


def refuse_unknown(fields: Dict[str, Any], name: str) -> None:
    """Raise ValueError for fields that no distilled model has."""
    if fields:
        raise ValueError(
            f'{name} has no field {", ".join(map(repr, fields))} but student, '
            'teacher, distill_loss, feature_loss, alpha, mimic_loss, tap and '
            'strict_teacher; correct the spelling, put what is the '
            "student's into model.student, or write _delete_=True in `model` "
            'if a base config has the others')


def refuse_missing(fields: Dict[str, Any]) -> None:
    """Raise ValueError for required fields without a value."""
    missing = [f'model.{name}' for name, value in fields.items() if not value]
    if missing:
        raise ValueError(f'{" and ".join(missing)} must be given: a config, a '
                         'dict(config=…, checkpoint=…) and a loss')


def build_teacher(cfg: dict, student: nn.Module) -> Teacher:
    """Build ``model.teacher``; see :class:`Teacher` for its fields."""
    optional = {'class_map', 'dtype', 'trust_checkpoint'}
    if not isinstance(cfg, dict) or set(cfg) - optional != {
            'config', 'checkpoint'
    }:
        keys = f'has {", ".join(sorted(cfg))}' if isinstance(
            cfg, dict) else f'is a {type(cfg).__name__}'
        raise ValueError('model.teacher must be dict(config=…, checkpoint=…), '
                         f'besides only {", ".join(sorted(optional))}, but '
                         f'{keys}')
    return Teacher(**cfg, student_preprocessor=student.data_preprocessor)


def build_mimic(cfg: dict, student: nn.Module,
                teacher: nn.Module) -> nn.Module:
    """Build ``model.mimic_loss`` for the necks of two models."""
    for model, field in ((student, 'model.student'), (teacher,
                                                      'model.teacher.config')):
        if not getattr(model, 'with_neck', False):
            raise ValueError('model.mimic_loss compares the outputs of necks, '
                             f'but {field} has no neck')
    names = 'student_channels', 'teacher_channels'
    if isinstance(cfg, dict) and not set(names) <= cfg.keys():
        cfg = {**dict(zip(names, neck_channels(student, teacher))), **cfg}
    with preserve_rng():  # the student of a seed stays the same
        return _build_loss(cfg, 'mimic_loss')


def _build_loss(cfg: dict, field: str) -> nn.Module:
    if not isinstance(cfg, dict) or not cfg.get('type'):
        raise ValueError(
            f'model.{field}: it must be a dict with a `type`, but is '
            f'{cfg!r}')
    try:
        return MODELS.build(cfg)
    except (KeyError, TypeError) as error:
        loss = _own_loss(cfg)
        if loss is None:
            advice = ''
        elif isinstance(error, KeyError):
            advice = f'; write mmdist.{loss.__name__}'
        else:
            known = ', '.join(inspect.signature(loss).parameters)
            advice = f'; {loss.__name__} takes {known}'
        raise ValueError(f'model.{field}: {error}{advice}') from error


def _own_loss(cfg: dict) -> Optional[type]:
    """The loss of mmdist that a config names, in whatever way."""
    kind = cfg['type']
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    return MODELS.module_dict.get(name.rpartition('.')[2])


def build_features(cfg: dict, student: nn.Module,
                   teacher: nn.Module) -> FeatureDistillation:
    """Build ``model.feature_loss``; see :mod:`.features` for its fields."""
    own = {}
    if isinstance(cfg, dict):
        own = {k: cfg[k] for k in ('where', 'layers', 'project') if k in cfg}
        cfg = {k: value for k, value in cfg.items() if k not in own}
    with preserve_rng():  # the student of a seed stays the same
        loss = _build_loss(cfg, 'feature_loss')
        return build_feature_distillation(own, loss, student, teacher)


def build_logit_loss(cfg: dict) -> LogitLoss:
    """Build ``model.distill_loss``."""
    kind = _own_loss(cfg) if isinstance(cfg, dict) and 'type' in cfg else None
    if kind is None or issubclass(kind, LogitLoss):
        loss = _build_loss(cfg, 'distill_loss')
        if isinstance(loss, LogitLoss):
            return loss
        kind = type(loss)
    raise ValueError(f'model.distill_loss is a {kind.__name__}, which is no '
                     'loss on logits; choose mmdist.DISTLoss or '
                     'mmdist.KDLoss')
