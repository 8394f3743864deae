"""Losses of a distilled model, built from its config."""
import inspect

from torch import nn

from mmdist.errors import ConfigError
from mmdist.registry import MODELS
from ..taps.probe import neck_channels
from ..teacher import preserve_rng
from .features import FeatureDistillation, distil_features


def build_loss(cfg: dict, field: str, base: type = nn.Module) -> nn.Module:
    """Build a loss, of mmdist or the user's own, which must be a ``base``."""
    if not isinstance(cfg, dict) or not cfg.get('type'):
        raise ConfigError(field,
                          f'it must be a dict with a `type`, but is {cfg!r}')
    kind = cfg['type']
    name = kind if isinstance(kind, str) else getattr(kind, '__name__', '')
    kind = own = MODELS.module_dict.get(name.rpartition('.')[2])
    if own is None or issubclass(own, base):
        try:
            loss = MODELS.build(cfg)
        except ConfigError as error:
            raise ConfigError(f'{field}.{error.field}', error.problem,
                              error.remedy) from error
        except (KeyError, TypeError) as error:
            remedy = ''
            if own and isinstance(error, KeyError):
                remedy = f'write mmdist.{own.__name__}'
            elif own:
                known = ', '.join(inspect.signature(own).parameters)
                remedy = f'{own.__name__} takes {known}'
            raise ConfigError(field, str(error), remedy) from error
        if isinstance(loss, base):
            return loss
        kind = type(loss)
    raise ConfigError(
        field, f'{kind.__name__} is no loss on logits',
        'choose mmdist.DISTLoss or mmdist.KDLoss, or derive it from '
        'mmdist.models.losses.LogitLoss')


def build_mimic(cfg: dict, student: nn.Module,
                teacher: nn.Module) -> nn.Module:
    """Build ``model.mimic_loss`` for the necks of two models."""
    field = 'model.mimic_loss'
    for model, owner in ((student, 'model.student'), (teacher,
                                                      'model.teacher.config')):
        if not getattr(model, 'with_neck', False):
            raise ConfigError(
                field,
                f'it compares the outputs of necks, but {owner} has no neck')
    names = 'student_channels', 'teacher_channels'
    if isinstance(cfg, dict) and not set(names) <= cfg.keys():
        cfg = {**dict(zip(names, neck_channels(student, teacher))), **cfg}
    with preserve_rng():  # the student of a seed stays the same
        return build_loss(cfg, field)


def build_features(cfg: dict, student: nn.Module,
                   teacher: nn.Module) -> FeatureDistillation:
    """Build ``model.feature_loss`` for two models."""
    fields = {}
    if isinstance(cfg, dict):
        cfg = dict(cfg)
        fields = {
            name: cfg.pop(name)
            for name in ('where', 'layers', 'project') if name in cfg
        }
    with preserve_rng():  # the student of a seed stays the same
        loss = build_loss(cfg, 'model.feature_loss')
        return distil_features(loss, student, teacher, **fields)
