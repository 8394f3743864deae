"""Distillation of a teacher into a student, one step at a time."""
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set

import torch
from torch import Tensor, nn

from mmdist.engine import TeacherMonitor
from mmdist.errors import ConfigError
from mmdist.utils import DataClasses, classes_in_training
from ..class_mapping import check_masks, class_map_in_training
from ..losses.base import LogitLoss
from ..taps import (Call, LogitPair, LogitTap, owner_of, pair_logits,
                    reads_text, tensors_in, watch_heads)
from ..teacher import Teacher, TeacherBatch
from .features import FeatureDistillation, watch_both


class Distillation:
    """Distillation of one teacher into a student, and one step of it.

    A plain object beside the student's modules, ``model.distillation``. It
    never refers to the student, so that a copy of the model (EMA) has a
    distillation of its own with the same teacher.

    Args:
        teacher (Teacher): The teacher.
        tap (LogitTap, optional): Where class logits are read; connected.
        loss (LogitLoss, optional): The loss on class logits.
        alpha (float): Factor of the student's classification losses.
        strict (bool): See :class:`mmdist.engine.TeacherMonitor`.
        features (FeatureDistillation, optional): The loss on feature maps.

    Attributes:
        scale (float): Factor of all terms, set by DistillScheduleHook. At 0
            the teacher does not compute.
    """

    def __init__(self,
                 teacher: Teacher,
                 tap: Optional[LogitTap],
                 loss: Optional[LogitLoss],
                 alpha: float,
                 strict: bool,
                 features: Optional[FeatureDistillation] = None) -> None:
        self.teacher, self.tap, self.loss = teacher, tap, loss
        self.features = features
        self.alpha, self.scale = alpha, 1.
        self.monitor = TeacherMonitor(strict)
        self._saw_classes = False
        self._logged: Set[str] = set()

    def losses(self, student: nn.Module, own_losses: Callable, inputs: Any,
               samples: Any) -> Dict[str, Any]:
        """One step: the student's own losses and the terms of distillation.

        The teacher computes its features right before the student does, so
        that its activations are gone when the student's are kept, and its
        heads answer when it is known what they are asked.

        Args:
            student (nn.Module): The student.
            own_losses (Callable): Its own ``loss``.
            inputs (Tensor | dict): ``(N, C, H, W)``, or what else it takes.
            samples (Sequence | dict): The data samples.
        """
        if self.tap and not self._saw_classes:
            self.compare_classes(student, classes_in_training(), samples)
            self._saw_classes = True
        if not self.scale:
            losses = own_losses(inputs, samples)
            return {**self._scaled(losses), **self._idle(student, losses)}
        batch = self.teacher.batch(inputs, samples)
        pairs: List[LogitPair] = []
        swapped: List[LogitPair] = []
        with self._watching(student, batch) as (seen, readers):
            losses = own_losses(inputs, samples)
            calls = list(seen)
            with self._asking(inputs):
                if self.tap:
                    pairs = pair_logits(self.tap, calls, batch)
                maps = {where: read(batch) for where, read in readers.items()}
        if self.monitor.wants_swapped(batch.images, pairs):
            with self._asking(inputs):
                swapped = pair_logits(
                    self.tap, calls,
                    self.teacher.batch(batch.images, samples, swapped=True))
        losses = self._scaled(losses)
        terms = self._terms(student, pairs, maps)
        logits = [part for call in calls for part in call.logits]
        self.monitor.watch(pairs, logits, terms, losses, swapped)
        return {**losses, **terms}

    @torch.no_grad()
    def pairs(self, student: nn.Module, own_losses: Callable, inputs: Any,
              samples: Any) -> List[LogitPair]:
        """The class logits of both models, as :meth:`losses` pairs them."""
        batch = self.teacher.batch(inputs, samples)
        with self._watching(student, batch) as (calls, _):
            own_losses(inputs, samples)
        return pair_logits(self.tap, calls, batch) if self.tap else []

    @contextmanager
    def _watching(self, student: nn.Module,
                  batch: TeacherBatch) -> Iterator[tuple]:
        """Watch the heads of the student, and the maps of both models.

        Yields:
            tuple: The calls of the heads, and for each place that is read
            what :func:`watch_both` yields.
        """

        def see(owner: str, images: Any) -> None:
            with self._asking(images):
                batch.extract(images, owner)

        model = self.teacher.model
        places = dict.fromkeys(p.where for p in self._feature_parts(student))
        with ExitStack() as stack:
            readers = {
                where:
                stack.enter_context(watch_both(student, model, where, see))
                for where in places
            }
            calls: List[Call] = []
            if self.tap:
                twin = next(filter(None, self.tap.heads.values()), '')
                calls = stack.enter_context(
                    watch_heads(self.tap, student,
                                partial(see,
                                        owner_of(model, twin) or '')))
            yield calls, readers

    def _feature_parts(self, student: nn.Module) -> List[Any]:
        """The losses on feature maps; those with parameters stand in the
        student's tree."""
        parts = {'feature': self.features, **getattr(student, 'distiller', {})}
        return [
            parts[name] for name in ('mimic', 'feature') if parts.get(name)
        ]

    @contextmanager
    def _asking(self, inputs: Any) -> Iterator[None]:
        """Keep random numbers as they were while the teacher computes: some
        draw even in eval mode (LightHamHead)."""
        device = next(tensors_in(inputs)).device
        devices = [device] if device.type == 'cuda' else []
        with torch.random.fork_rng(devices=devices), self.monitor.listening(
                self.teacher.model):
            yield

    def compare_classes(self,
                        student: nn.Module,
                        data: DataClasses,
                        samples: Any = None) -> None:
        """Compare the teacher's classes with those of the training set, and
        the labels of masks with those that the student predicts.

        Raises:
            ConfigError: If student, teacher and data do not fit, or
                `class_map` is impossible.
        """
        if reads_text(student):  # the text names the classes
            return
        head = student.get_submodule(next(iter(self.tap.heads)))
        number = getattr(head, 'num_classes', None)
        if getattr(student, 'with_semantic_head', False):
            number = None  # panoptic: another head predicts what is no thing
        elif getattr(head, 'out_channels', None) == 1:
            number = 2  # one column tells two classes apart
        check_masks(samples, number, getattr(head, 'ignore_index', None))
        teacher = self.teacher
        class_map = class_map_in_training(teacher.class_map, teacher.classes,
                                          data, number)
        if class_map is not None:
            self.tap.connect(student, teacher.model, class_map)

    def _scaled(self, losses: Dict[str, Any]) -> Dict[str, Any]:
        """The student's losses, those of classification times alpha."""
        if self.alpha == 1:
            return dict(losses)
        scaled = {}
        for name, loss in losses.items():
            if self.tap.is_classification_loss(name):
                by_level = isinstance(loss, (list, tuple))
                scaled[name] = [self.alpha * level for level in loss
                                ] if by_level else self.alpha * loss
        if not scaled:
            raise ConfigError(
                'model.alpha', f'{self.alpha} has nothing to scale: none of '
                f'the losses {", ".join(losses)} of model.student is a '
                'classification loss', 'leave alpha at 1')
        return {**losses, **scaled}

    def _terms(self, student: nn.Module, pairs: Sequence[LogitPair],
               maps: Dict[str, Sequence]) -> Dict[str, Tensor]:
        """The terms of all losses, summed over pairs, by their log names."""
        if self.tap and not pairs:
            raise ConfigError(
                'model.student', f'{type(self.tap).__name__} found nothing in '
                'its losses that pairs with model.teacher',
                'choose another head, or distil feature maps: '
                'model.feature_loss without model.distill_loss')
        sums: Dict[str, Any] = defaultdict(float)
        for pair in pairs:
            for name, term in self.loss.pair_terms(pair).items():
                sums[f'loss_kd_{name}'] += self.scale * pair.weight * term
        for part in self._feature_parts(student):
            for student_maps, teacher_maps in maps[part.where]:
                terms = part.terms(student_maps, teacher_maps)
                for name, term in terms.items():
                    sums[f'loss_kd_{name}'] += self.scale * term
        self._logged.update(sums)
        return dict(sums)

    def _idle(self, student: nn.Module,
              losses: Dict[str, Any]) -> Dict[str, Tensor]:
        """Zero terms for a step without distillation. They keep projections in
        the graph, as DDP needs, and end the curves in the log."""
        zero = next(tensors_in(losses)).new_zeros(())
        terms = dict.fromkeys(self._logged, zero)
        if hasattr(student, 'distiller'):
            parts = [p.sum() * 0 for p in student.distiller.parameters()]
            name = next(iter(student.distiller))
            terms[min(terms, default=f'loss_kd_{name}')] = sum(parts, zero)
        return terms
