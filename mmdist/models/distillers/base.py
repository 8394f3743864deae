"""Distilled models: a student whose class also learns from a teacher."""
import warnings
from abc import ABCMeta
from functools import lru_cache
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.utils import running_config
from ..class_mapping import check_all_named, class_map_to_build
from ..losses.base import LogitLoss, check_weight
from ..taps import LogitPair, LogitTap, build_tap
from ..taps.probe import check_image_channels
from ..teacher import Teacher, build_model
from .builders import build_features, build_loss, build_mimic
from .distillation import Distillation


class DistillerMeta(ABCMeta):
    """Lets a call of a wrapper's class return a student that distils."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if issubclass(cls, nn.Module):  # the class of a distilled student
            return super().__call__(*args, **kwargs)
        return distil(cls, *args, **kwargs)


class BaseDistiller(metaclass=DistillerMeta):
    """A student that also learns from a teacher.

    ``DistillDetector(student=…, teacher=…, distill_loss=…)`` builds the
    student and gives it a class made of the wrapper's and its own. So the
    model *is* the student: parameters have its names (``paramwise_cfg``,
    freezing), checkpoints are plain student checkpoints both ways, and every
    method, attribute and mode is the student's. Only ``loss`` is overridden.
    What distillation needs stands in ``model.distillation``; modules that it
    trains (the projections of mimic) stand under ``distiller``.

    Args:
        student (str | dict): A model dict, a config path or
            ``'package::path'``. A config that distils stands for its own
            student; its teacher and losses are left out.
        teacher (dict): ``config`` (as for the student) and ``checkpoint`` (a
            path or URL), both required; ``class_map`` ('names', or a list of
            the teacher's classes) where the student has some of its classes
            or another order; ``dtype`` ('bfloat16', 'float16', 'float32') and
            ``trust_checkpoint`` (True lets a file of your own run code), see
            :class:`Teacher`.
        distill_loss (dict, optional): A loss on logits, e.g.
            ``mmdist.DISTLoss``; required unless ``feature_loss`` is given.
        feature_loss (dict, optional): A loss on feature maps,
            ``mmdist.DISTLoss`` or ``mmdist.MimicLoss``; ``where`` ('neck',
            'backbone' or 'head'), ``layers`` and ``project`` stand beside
            the loss's own fields, see
            :func:`.builders.build_features`.
        alpha (float): Multiplies the student's classification losses; 0 is
            the paper's "without classification loss". Box, mask and proposal
            losses are left alone.
        mimic_loss (dict, optional): ``mmdist.MimicLoss`` on the outputs of
            the necks; its channels are found by a forward of both models.
        tap (dict, optional): Options of the tap, e.g.
            ``dict(anchors_as_rows=True)``.
        strict_teacher (bool): Stop where the monitor of the teacher would
            warn, see :class:`mmdist.engine.TeacherMonitor`.
        data_preprocessor (dict, optional): For a student that names none.
            MMEngine's runner gives every model that of the config's top
            level, where MMSegmentation's configs have one.
        **unknown: Refused, by name.

    Raises:
        ConfigError: If a config or the checkpoint does not exist, or student,
            teacher and losses do not fit.
    """
    distillation: Distillation

    @classmethod
    def model_classes(cls) -> Tuple[Type[nn.Module], ...]:
        """The base classes of the models that this wrapper can train."""
        raise NotImplementedError

    # Not for torch.compile: heads are watched and released in each step.
    @torch.compiler.disable
    def loss(self, inputs: Any, data_samples: Any) -> Dict[str, Any]:
        """The student's losses and the terms of distillation.

        Args:
            inputs (Tensor | dict): ``(N, C, H, W)``, normalised for the
                student.
            data_samples (Sequence | dict): The annotations of each image.

        Returns:
            dict[str, Tensor]: The student's own losses under their names, and
            each term of distillation under ``loss_kd_<term>``.

        Raises:
            ConfigError: If the training set's classes are not the teacher's.
        """
        return self.distillation.losses(self,
                                        super().loss, inputs, data_samples)

    def kd_pairs(self, inputs: Any, data_samples: Any) -> List[LogitPair]:
        """The pairs of logits that :meth:`loss`, which takes the same
        arguments, compares."""
        return self.distillation.pairs(self,
                                       super().loss, inputs, data_samples)

    @property
    def kd_scale(self) -> float:
        """Deprecated name of ``distillation.scale``."""
        _warn_of('kd_scale', 'model.distillation.scale')
        return self.distillation.scale

    @kd_scale.setter
    def kd_scale(self, value: float) -> None:
        _warn_of('kd_scale', 'model.distillation.scale')
        self.distillation.scale = value

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in RENAMED or 'distillation' not in self.__dict__:
                raise
        _warn_of(name, RENAMED[name])
        return attrgetter(RENAMED[name])(SimpleNamespace(model=self))

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str,
                              *args: Any) -> None:
        saved = any(
            key.startswith(f'{prefix}distiller.') for key in state_dict)
        if saved != hasattr(self,
                            'distiller') and running_config().get('resume'):
            # Before the optimizer refuses another number of parameters.
            parts = ['the checkpoint', 'this config']
            having, lacking = parts if saved else parts[::-1]
            raise ConfigError(
                'resume', f'{having} has projections of model.mimic_loss or '
                'model.feature_loss but '
                f'{lacking} has not, so the state of the optimizer does not '
                'fit', 'keep both as they were, or train on from the '
                'weights alone: load_from=<checkpoint> without resume')
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: int) -> tuple:
        _, _, *state = super().__reduce_ex__(protocol)
        wrapper, student = type(self).__bases__
        return (_empty, (wrapper, student), *state)


# Names of the first edition, for what no student has under them.
RENAMED = dict(
    student='model',
    kd_student='model',
    teacher='model.distillation.teacher',
    kd_teacher='model.distillation.teacher',
    tap='model.distillation.tap',
    monitor='model.distillation.monitor',
    distill_loss='model.distillation.loss',
    alpha='model.distillation.alpha',
    pairs='model.kd_pairs')


def _warn_of(name: str, new: str) -> None:
    warnings.warn(f'model.{name} is deprecated; use {new}', FutureWarning, 3)


@lru_cache(maxsize=None)
def distilled_class(wrapper: type, student: type) -> type:
    """The class of a wrapper and of a student in one."""
    meta = DistillerMeta
    if not issubclass(meta, type(student)):
        meta = type('DistillerMeta', (DistillerMeta, type(student)), {})
    return meta(f'Distilled{student.__name__}', (wrapper, student),
                dict(__module__=wrapper.__module__, __doc__=student.__doc__))


def _empty(wrapper: type, student: type) -> nn.Module:
    """A distilled student without state, for copies and pickles."""
    kind = distilled_class(wrapper, student)
    return kind.__new__(kind)


def distil(wrapper: Type[BaseDistiller],
           student: Any = None,
           teacher: Optional[dict] = None,
           distill_loss: Optional[dict] = None,
           feature_loss: Optional[dict] = None,
           alpha: float = 1.0,
           mimic_loss: Optional[dict] = None,
           tap: Optional[dict] = None,
           strict_teacher: bool = False,
           data_preprocessor: Optional[dict] = None,
           **unknown: Any) -> nn.Module:
    """Build a student that distils; see :class:`BaseDistiller`."""
    if unknown:
        raise ConfigError(
            f'model.{next(iter(unknown))}', f'{wrapper.__name__} has no field '
            f'{", ".join(map(repr, unknown))} (it has student, teacher, '
            'distill_loss, feature_loss, alpha, mimic_loss, tap, '
            'strict_teacher and data_preprocessor)',
            "correct the spelling, put what is the student's into "
            'model.student, or write _delete_=True in `model` if a base '
            'config has the others')
    required = dict(
        student=student,
        teacher=teacher,
        distill_loss=distill_loss or feature_loss)
    for name, value in required.items():
        if not value:
            raise ConfigError(
                f'model.{name}', 'it must be given',
                'model.feature_loss may be given instead'
                if name == 'distill_loss' else '')
    if not isinstance(tap or {}, dict):
        raise ConfigError('model.tap',
                          f'it must be a dict of options, but is {tap!r}')
    if not isinstance(strict_teacher, bool):
        raise ConfigError(
            'model.strict_teacher',
            f'it must be True or False, but is {strict_teacher!r}')
    model = build_model(student, 'model.student', data_preprocessor)[0]
    _check_kind(wrapper, model, 'model.student')
    alpha = check_weight('model.alpha', alpha)
    optional = {'class_map', 'dtype', 'trust_checkpoint'}
    fields = isinstance(teacher, dict) and set(teacher) - optional
    if fields != {'config', 'checkpoint'}:
        given = list(teacher) if isinstance(teacher, dict) else teacher
        raise ConfigError(
            'model.teacher', 'it must be dict(config=…, checkpoint=…) and '
            f'may have {", ".join(sorted(optional))}, but got {given!r}')
    built = Teacher(**teacher, student_preprocessor=model.data_preprocessor)
    _check_kind(wrapper, built.model, 'model.teacher.config')
    check_image_channels(model, built.model)
    reader = loss = features = None
    if distill_loss:
        reader = _connected_tap(model, built, tap or {})
        loss = build_loss(distill_loss, 'model.distill_loss', LogitLoss)
    elif tap or alpha != 1:
        raise ConfigError('model.tap' if tap else 'model.alpha',
                          'without distill_loss no class logits are read',
                          'leave it out')
    trained = {}
    if feature_loss is not None:
        features = build_features(feature_loss, model, built.model)
        if list(features.parameters()):
            trained['feature'] = features
    if mimic_loss is not None:
        trained['mimic'] = build_mimic(mimic_loss, model, built.model)
    if loss and (list(loss.parameters()) or list(loss.buffers())):
        trained['logits'] = loss  # moved, optimised and resumed with the model
    if trained:
        model.distiller = nn.ModuleDict(trained)
    model.__class__ = distilled_class(wrapper, type(model))
    model.distillation = Distillation(built, reader, loss, alpha,
                                      strict_teacher, features)
    summary = reader and (f'{type(reader).__name__} pairs '
                          f'{reader.describe(model, built.model)}')
    print_log(
        f'{wrapper.__name__}: teacher {type(built.model).__name__} from '
        f'{built.checkpoint}; {summary or "feature maps alone"}',
        logger='current')
    return model


def _connected_tap(model: nn.Module, teacher: Teacher,
                   options: dict) -> LogitTap:
    """The tap of a student, connected to the teacher's heads and classes."""

    def number(owner: nn.Module, path: str) -> Optional[int]:
        # A head without layers (MMPretrain's ClsHead) has no num_classes.
        return getattr(owner.get_submodule(path), 'num_classes', None)

    tap = build_tap(model, **options)
    spec, names = teacher.class_map, teacher.class_names
    class_map = class_map_to_build(spec, names,
                                   number(model, next(iter(tap.heads))))
    tap.connect(model, teacher.model, class_map)
    # '' is a model that is its own head.
    twin = [path for path in tap.heads.values() if path is not None][-1]
    check_all_named(spec, names, number(teacher.model, twin))
    return tap


def _check_kind(wrapper: Type[BaseDistiller], model: nn.Module,
                field: str) -> None:
    classes = wrapper.model_classes()
    if not isinstance(model, classes):
        kinds = [kind.__name__ for kind in classes]
        package = classes[0].__module__.partition('.')[0]
        raise ConfigError(
            field, f'it is a {type(model).__name__}, but {wrapper.__name__} '
            f'distils {package} models that inherit {" or ".join(kinds)}')
