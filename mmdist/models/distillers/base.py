"""The wrapper: a student that also learns from a teacher."""
import inspect
from collections import defaultdict
from contextlib import ExitStack
from typing import (Any, ContextManager, Dict, List, Optional, Sequence, Set,
                    Tuple, Type, Union)

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdist.engine import TeacherMonitor
from mmdist.registry import MODELS
from mmdist.utils import DataClasses, classes_in_training, is_resuming
from ..class_names import (check_all_named, check_all_predicted,
                           check_class_names, check_enough_names,
                           check_named_map, check_names_fit_labels,
                           class_map_of)
from ..losses.base import LogitLoss, check_weight
from ..taps import (LogitPair, TeacherBatch, build_tap, reads_text, tensors_in,
                    watch_method)
from ..taps.probe import check_image_channels, neck_channels
from ..teacher import Teacher, build_model, preserve_rng


class BaseDistiller(BaseModel):
    """Trains a student with its own losses and with a teacher's logits.

    In the module tree the wrapper *is* the student: both share their tables
    of submodules, parameters and buffers. So parameters have the student's
    names (``paramwise_cfg``, layer-wise learning rates, freezing), checkpoints
    are plain student checkpoints both ways, and every other attribute and
    mode is the student's. What distillation trains besides (the projections
    of mimic) stands under ``distiller``.

    Args:
        student (str | dict): A model dict, a config path or
            ``'package::path'``. A config that distils stands for its own
            student; its teacher and losses are left out.
        teacher (dict): ``config`` (as for the student) and ``checkpoint`` (a
            path or URL), both required; ``class_map`` ('names', or a list of
            the teacher's classes) where the student has some of its classes
            or another order; ``dtype`` ('bfloat16', 'float16', 'float32'), see
            :class:`Teacher`.
        distill_loss (dict): A loss on logits, e.g. ``mmdist.DISTLoss``.
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
        FileNotFoundError: If a config or the checkpoint does not exist.
        ValueError: If student, teacher and losses do not fit; the message
            names the field to change.
    """

    def __init__(self,
                 student: Union[str, dict, None] = None,
                 teacher: Optional[dict] = None,
                 distill_loss: Optional[dict] = None,
                 alpha: float = 1.0,
                 mimic_loss: Optional[dict] = None,
                 tap: Optional[dict] = None,
                 strict_teacher: bool = False,
                 data_preprocessor: Optional[dict] = None,
                 **unknown: Any) -> None:
        _refuse_unknown(unknown, type(self).__name__)
        _refuse_missing(
            dict(student=student, teacher=teacher, distill_loss=distill_loss))
        model = build_model(student, 'model.student', data_preprocessor)[0]
        self._check_kind(model, 'model.student')
        super().__init__(data_preprocessor=model.data_preprocessor)
        self._adopt(model)
        self._saw_classes = self._heads_answered = False
        # What DistillScheduleHook multiplies all terms by.
        self.kd_scale = 1.
        self._logged: Set[str] = set()
        self.alpha = check_weight('alpha', alpha, 'model')
        self._keep('teacher', _build_teacher(teacher, model))
        self._check_kind(self.kd_teacher.model, 'model.teacher.config')
        check_image_channels(model, self.kd_teacher.model)
        self.tap = build_tap(model, **(tap or {}))
        self._connect_tap(self._class_map_now())
        self._check_names_of_teacher()
        self.distill_loss = _build_logit_loss(distill_loss)
        if mimic_loss is not None:
            self.distiller = nn.ModuleDict(
                dict(mimic=self._build_mimic(mimic_loss)))
        if not isinstance(strict_teacher, bool):
            raise ValueError('model.strict_teacher must be True or False, '
                             f'but is {strict_teacher!r}')
        self.monitor = TeacherMonitor(strict_teacher)
        self._announce()

    @property
    def model_classes(self) -> Tuple[Type[nn.Module], ...]:
        """The base classes of the models that this wrapper can train."""
        raise TypeError(f'{type(self).__name__} must say what it distils')

    def _check_kind(self, model: nn.Module, field: str) -> None:
        if not isinstance(model, self.model_classes):
            kinds = [kind.__name__ for kind in self.model_classes]
            package = self.model_classes[0].__module__.partition('.')[0]
            raise ValueError(
                f'{field} is a {type(model).__name__}, but '
                f'{type(self).__name__} distils {package} models that '
                f'inherit {" or ".join(kinds)}')

    def _adopt(self, model: nn.Module) -> None:
        """Become the student in the module tree."""
        # Its hooks, too: some rename the keys of their checkpoints (timm's).
        # Those before loading run in _load_from_state_dict.
        for table in ('_modules', '_parameters', '_buffers',
                      '_non_persistent_buffers_set', '_state_dict_hooks',
                      '_state_dict_pre_hooks', '_load_state_dict_post_hooks'):
            self.__dict__[table] = model.__dict__[table]
        # Plain assignment would register the student as a submodule and
        # prefix every name with `student.`.
        self._keep('student', model)

    def _class_map_now(self) -> Optional[List[int]]:
        """The map of classes; names are looked up in the first iteration."""
        spec, names = self.kd_teacher.class_map, self.kd_teacher.class_names
        if spec == 'names':
            head = self.kd_student.get_submodule(self.tap.heads[0])
            # A head without layers (MMPretrain's ClsHead) does not say.
            number = getattr(head, 'num_classes', None) or len(names or ())
            check_enough_names(names, number)
            return list(range(number))
        return None if spec is None else class_map_of(spec, names, None)

    def _keep(self, name: str, value: Any) -> None:
        """Hold a model outside the module tree, as ``kd_<name>``.

        It is ``name``, too, unless the student has a submodule of that name
        (Soft Teacher's ``teacher``), which its hooks expect there.
        """
        self.__dict__[f'kd_{name}'] = value
        if name not in self._modules:
            self.__dict__[name] = value

    def _build_mimic(self, cfg: dict) -> nn.Module:
        models = self.kd_student, self.kd_teacher.model
        for model, field in zip(models,
                                ('model.student', 'model.teacher.config')):
            if not getattr(model, 'with_neck', False):
                raise ValueError('model.mimic_loss compares the outputs of '
                                 f'necks, but {field} has no neck')
        names = 'student_channels', 'teacher_channels'
        if isinstance(cfg, dict) and not set(names) <= cfg.keys():
            cfg = {**dict(zip(names, neck_channels(*models))), **cfg}
        with preserve_rng():  # the student of a seed stays the same
            return _build_loss(cfg, 'mimic_loss')

    def _announce(self) -> None:
        teacher = self.kd_teacher
        print_log(
            f'{type(self).__name__}: teacher {type(teacher.model).__name__} '
            f'from {teacher.checkpoint}; {type(self.tap).__name__} pairs '
            f'{self.tap.describe(self.kd_student, teacher.model)}',
            logger='current')

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if 'kd_student' not in self.__dict__:  # while it is being copied
                raise
            return getattr(self.kd_student, name)

    def train(self, mode: bool = True) -> 'BaseDistiller':
        """Set the mode of the student; the teacher stays in eval mode."""
        self.training = mode
        self.kd_student.train(mode)
        return self

    def init_weights(self) -> None:
        """Initialise the student as it would alone."""
        self.kd_student.init_weights()

    def _load_from_state_dict(self, state_dict: Dict[str, Tensor], prefix: str,
                              *args, **kwargs) -> None:
        self._check_resumed_projections(state_dict, prefix)
        # Some students rename the keys of old checkpoints here.
        self.kd_student._load_from_state_dict(state_dict, prefix, *args,
                                              **kwargs)

    def _check_resumed_projections(self, state_dict: Dict[str, Tensor],
                                   prefix: str) -> None:
        """Say so before the optimizer refuses another number of parameters."""
        saved = any(
            key.startswith(f'{prefix}distiller.') for key in state_dict)
        wanted = 'distiller' in self._modules
        if saved != wanted and is_resuming():
            with_, without = ('the checkpoint',
                              'this config')[::1 if saved else -1]
            raise ValueError(
                f'resume: {with_} has projections of model.mimic_loss but '
                f'{without} has not, so the state of the optimizer does not '
                'fit; keep model.mimic_loss as it was, or train on from the '
                'weights alone: load_from=<checkpoint> without resume')

    def forward(self,
                inputs: Tensor,
                data_samples: Optional[Sequence] = None,
                mode: str = 'tensor') -> Any:
        """The student's forward; with ``mode='loss'`` also distils."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        return self.kd_student(inputs, data_samples, mode=mode)

    def val_step(self, data: Any) -> list:
        """The student's."""
        return self.kd_student.val_step(data)

    def test_step(self, data: Any) -> list:
        """The student's."""
        return self.kd_student.test_step(data)

    def loss(self, inputs: Tensor, data_samples: Sequence) -> Dict[str, Any]:
        """The student's losses and those of distillation.

        Args:
            inputs (Tensor): ``(N, 3, H, W)``, normalised for the student.
            data_samples (Sequence): The annotations, one a picture.

        Returns:
            dict[str, Tensor]: The student's own losses under their names, and
            each term of distillation under ``loss_kd_<term>``.

        Raises:
            ValueError: If the training set's classes are not the teacher's.
        """
        if not self._saw_classes:
            self.compare_classes(classes_in_training())
            self._saw_classes = True
        if not self.kd_scale:
            losses = self.kd_student.loss(inputs, data_samples)
            return {**self._scale_classification(losses), **self._idle(losses)}
        batch, *swapped = self._teacher_batches(inputs, data_samples)
        teacher = self.kd_teacher.model
        with _fork_rng(inputs), self.monitor.listening(teacher):
            for each in (batch, *swapped):
                self.tap.foresee(self.kd_student, each, inputs)
        losses, calls, extracted = self._student_losses(inputs, data_samples)
        with _fork_rng(inputs), self.monitor.listening(teacher):
            self.tap.check_batch(calls, inputs)
            pairs, *others = [
                self.tap.pairs(calls, self.kd_student, each)
                for each in (batch, *swapped)
            ]
            imitated = [(features, batch.features(images))
                        for images, features in extracted]
        losses = self._scale_classification(losses)
        terms = {**self._distill(pairs), **self._imitate(imitated)}
        logits = [part for call in calls for part in self.tap.logits_in(call)]
        self.monitor.watch(pairs, logits, terms, losses, *others)
        return {**losses, **terms}

    @torch.no_grad()
    def pairs(self, inputs: Tensor, data_samples: Sequence) -> List[LogitPair]:
        """The class logits of both models for the same instances.

        Args:
            inputs (Tensor): ``(N, 3, H, W)``, normalised for the student.
            data_samples (Sequence): The annotations, one a picture.

        Returns:
            list[LogitPair]: As a training compares them.
        """
        _, calls, _ = self._student_losses(inputs, data_samples)
        batch = self.kd_teacher.batch(inputs, data_samples)
        return self.tap.pairs(calls, self.kd_student, batch)

    def _teacher_batches(self, inputs: Any,
                         data_samples: Any) -> List[TeacherBatch]:
        """The batch, and until the teacher is judged one of red for blue."""
        coloured = next(tensors_in(inputs)).shape[-3] == 3
        ways = [False, True
                ] if coloured and not self.monitor.judged else [False]
        return [
            self.kd_teacher.batch(inputs, data_samples, swapped)
            for swapped in ways
        ]

    def _student_losses(self, inputs: Tensor,
                        data_samples: Sequence) -> Tuple[dict, list, list]:
        """The student's losses, the calls of its heads, and the pictures and
        features that mimic compares."""
        extracted: List[Any] = []
        with ExitStack() as stack:
            calls = stack.enter_context(self.tap.watch(self.kd_student))
            if 'distiller' in self._modules:
                stack.enter_context(
                    watch_method(
                        self.kd_student, 'extract_feat', extracted,
                        lambda arguments, features:
                        (next(iter(arguments.values())), features)))
            losses = self.kd_student.loss(inputs, data_samples)
        if not self._heads_answered:
            self.tap.check_answered(calls, self.kd_student)
            self._heads_answered = True
        return losses, calls, extracted

    def compare_classes(self, data: DataClasses) -> None:
        """Compare the teacher's classes with those of the training set.

        Args:
            data (DataClasses): The classes of the training set.

        Raises:
            ValueError: If student and teacher predict other classes, or
                `class_map` is impossible.
        """
        if reads_text(self.kd_student):  # the text names the classes
            return
        teacher = self.kd_teacher
        spec, names_t = teacher.class_map, teacher.class_names
        names_s = data.in_label_order
        check_all_predicted(self._num_labels(), names_s)
        if not (spec and all(isinstance(item, int) for item in spec)):
            check_names_fit_labels(teacher.classes, data)
        if spec is None:
            check_class_names(names_t, names_s)
        elif spec == 'names':
            self._connect_tap(class_map_of('names', names_t, names_s))
        else:
            check_named_map(spec, names_t, names_s)

    def _num_labels(self) -> Optional[int]:
        """How many labels the student's head can predict, if it says so."""
        head = self.kd_student.get_submodule(self.tap.heads[0])
        number = getattr(head, 'num_classes', None)
        if getattr(self.kd_student, 'with_semantic_head', False):
            return None  # panoptic: another head predicts what is no thing
        one_column = getattr(head, 'out_channels', None) == 1
        return 2 if one_column else number

    def _check_names_of_teacher(self) -> None:
        """A map by names needs the names of all that the teacher predicts."""
        spec, names = self.kd_teacher.class_map, self.kd_teacher.class_names
        head = self.kd_teacher.model.get_submodule(self.tap.teacher_heads[-1])
        number = getattr(head, 'num_classes', None)
        if spec is not None and not all(isinstance(x, int) for x in spec):
            check_all_named(names, number)

    def _connect_tap(self, class_map: Optional[List[int]]) -> None:
        self.tap.connect(self.kd_student, self.kd_teacher.model, class_map)

    def _scale_classification(self, losses: Dict[str, Any]) -> Dict[str, Any]:
        if self.alpha == 1:
            return dict(losses)
        scaled = {
            name: _times(loss, self.alpha)
            for name, loss in losses.items()
            if self.tap.is_classification_loss(name)
        }
        if not scaled:
            raise ValueError(
                f'model.alpha={self.alpha} has nothing to scale: none of '
                f'the losses {", ".join(losses)} of model.student is one of '
                'classification; leave alpha at 1')
        return {**losses, **scaled}

    def _distill(self, pairs: Sequence[LogitPair]) -> Dict[str, Tensor]:
        if not pairs:
            raise RuntimeError(
                f'{type(self.tap).__name__} found nothing in the losses of '
                'model.student that pairs with model.teacher')
        sums: Dict[str, Any] = defaultdict(float)
        for pair in pairs:
            terms = self.distill_loss.terms(pair.student, pair.teacher,
                                            pair.student_activation,
                                            pair.teacher_activation)
            for name, term in terms.items():
                sums[name] = sums[name] + pair.weight * term
        return self._named(sums)

    def _imitate(self, features: Sequence[Sequence]) -> Dict[str, Tensor]:
        """The terms of mimic, summed over pairs of features."""
        sums: Dict[str, Any] = defaultdict(float)
        for own, theirs in features:
            terms = self.distiller['mimic'].terms(own, theirs)
            for name, term in terms.items():
                sums[name] = sums[name] + term
        return self._named(sums)

    def _idle(self, losses: Dict[str, Any]) -> Dict[str, Tensor]:
        """Zeros, which keep what only distillation trains in the graph, as
        DDP wants, and end the curves in the log."""
        zero = next(tensors_in(losses)).new_zeros(())
        terms = dict.fromkeys(self._logged, zero)
        if 'distiller' in self._modules:
            parts = [p.sum() * 0 for p in self.distiller.parameters()]
            terms['loss_kd_mimic'] = sum(parts, zero)
        return terms

    def _named(self, terms: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Terms under their names in the log, as far as they are due."""
        self._logged.update(f'loss_kd_{name}' for name in terms)
        return {
            f'loss_kd_{name}':
            term if self.kd_scale == 1 else self.kd_scale * term
            for name, term in terms.items()
        }


def _fork_rng(inputs: Any) -> ContextManager:
    """Some teachers draw random numbers even in eval mode (LightHamHead)."""
    device = next(tensors_in(inputs)).device
    return torch.random.fork_rng(
        devices=[device] if device.type == 'cuda' else [])


def _times(loss: Any, alpha: float) -> Any:
    if isinstance(loss, (list, tuple)):
        return [alpha * level for level in loss]
    return alpha * loss


def _refuse_unknown(fields: Dict[str, Any], name: str) -> None:
    if fields:
        raise ValueError(
            f'{name} has no field {", ".join(map(repr, fields))} but student, '
            'teacher, distill_loss, alpha, mimic_loss, tap and '
            'strict_teacher; correct the spelling, put what is the '
            "student's into model.student, or write _delete_=True in `model` "
            'if a base config has the others')


def _refuse_missing(fields: Dict[str, Any]) -> None:
    missing = [f'model.{name}' for name, value in fields.items() if not value]
    if missing:
        raise ValueError(f'{" and ".join(missing)} must be given: a config, a '
                         'dict(config=…, checkpoint=…) and a loss')


def _build_teacher(cfg: dict, student: nn.Module) -> Teacher:
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


def _build_logit_loss(cfg: dict) -> LogitLoss:
    kind = _own_loss(cfg) if isinstance(cfg, dict) and 'type' in cfg else None
    if kind is None or issubclass(kind, LogitLoss):
        loss = _build_loss(cfg, 'distill_loss')
        if isinstance(loss, LogitLoss):
            return loss
        kind = type(loss)
    raise ValueError(f'model.distill_loss is a {kind.__name__}, which is no '
                     'loss on logits; choose mmdist.DISTLoss or '
                     'mmdist.KDLoss')
