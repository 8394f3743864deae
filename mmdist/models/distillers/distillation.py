"""Distillation of a teacher into a student, one step at a time."""
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Dict, Iterator, List, Sequence, Set

import torch
from torch import Tensor, nn

from mmdist.engine import TeacherMonitor
from mmdist.errors import ConfigError
from mmdist.utils import DataClasses, classes_in_training
from ..class_mapping import class_map_in_training
from ..losses.base import LogitLoss
from ..taps import (LogitPair, LogitTap, owner_of, pair_logits, reads_text,
                    tensors_in, watch_heads, watch_method)
from ..teacher import Teacher


class Distillation:
    """Distillation of one teacher into a student, and one step of it.

    A plain object beside the student's modules, as
    ``model.distillation``. It never refers to the student, so that a copy of
    the model (EMA) has a distillation of its own with the same teacher.

    Args:
        teacher (Teacher): The teacher.
        tap (LogitTap): Where class logits are read; connected.
        loss (LogitLoss): The loss on class logits.
        alpha (float): Factor of the student's classification losses.
        strict (bool): See :class:`mmdist.engine.TeacherMonitor`.

    Attributes:
        scale (float): Factor of all terms, set by DistillScheduleHook. At 0
            the teacher does not compute.
    """

    def __init__(self, teacher: Teacher, tap: LogitTap, loss: LogitLoss,
                 alpha: float, strict: bool) -> None:
        self.teacher, self.tap, self.loss = teacher, tap, loss
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
        if not self._saw_classes:
            self.compare_classes(student, classes_in_training())
            self._saw_classes = True
        if not self.scale:
            losses = own_losses(inputs, samples)
            return {**self._scaled(losses), **self._idle(student, losses)}
        losses, calls, features, batch = self._watched(student, own_losses,
                                                       inputs, samples)
        with self._asking(inputs):
            pairs = pair_logits(self.tap, calls, batch)
            imitated = [(own, batch.features(images))
                        for images, own in features]
        swapped: List[LogitPair] = []
        if self.monitor.wants_swapped(batch.images, pairs):
            with self._asking(inputs):
                swapped = pair_logits(
                    self.tap, calls,
                    self.teacher.batch(batch.images, samples, swapped=True))
        losses = self._scaled(losses)
        terms = self._terms(student, pairs, imitated)
        logits = [part for call in calls for part in call.logits]
        self.monitor.watch(pairs, logits, terms, losses, swapped)
        return {**losses, **terms}

    @torch.no_grad()
    def pairs(self, student: nn.Module, own_losses: Callable, inputs: Any,
              samples: Any) -> List[LogitPair]:
        """The class logits of both models, as :meth:`losses` pairs them."""
        _, calls, _, batch = self._watched(student, own_losses, inputs,
                                           samples)
        return pair_logits(self.tap, calls, batch)

    def _watched(self, student: nn.Module, own_losses: Callable, inputs: Any,
                 samples: Any) -> tuple:
        """The student's losses, the calls of its heads, the images and
        features that mimic compares, and the teacher's batch."""
        batch = self.teacher.batch(inputs, samples)
        twin = next(filter(None, self.tap.heads.values()), '')
        owner = owner_of(self.teacher.model, twin) or ''
        features: List[Any] = []
        with ExitStack() as stack:
            if hasattr(student, 'distiller') and 'mimic' in student.distiller:
                stack.enter_context(
                    watch_method(
                        student, 'extract_feat', features,
                        lambda arguments, result:
                        (next(iter(arguments.values())), result)))

            def see(images: Any) -> None:
                with self._asking(images):
                    batch.see(images, owner)

            calls = stack.enter_context(watch_heads(self.tap, student, see))
            losses = own_losses(inputs, samples)
        return losses, calls, features, batch

    @contextmanager
    def _asking(self, inputs: Any) -> Iterator[None]:
        """While the teacher computes: some draw random numbers even in eval
        mode (LightHamHead)."""
        device = next(tensors_in(inputs)).device
        devices = [device] if device.type == 'cuda' else []
        with torch.random.fork_rng(devices=devices), self.monitor.listening(
                self.teacher.model):
            yield

    def compare_classes(self, student: nn.Module, data: DataClasses) -> None:
        """Compare the teacher's classes with those of the training set.

        Args:
            student (nn.Module): The student.
            data (DataClasses): The classes of the training set.

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
        teacher = self.teacher
        class_map = class_map_in_training(teacher.class_map, teacher.classes,
                                          data, number)
        if class_map is not None:
            self.tap.connect(student, teacher.model, class_map)

    def _scaled(self, losses: Dict[str, Any]) -> Dict[str, Any]:
        """The student's losses, those of classification times alpha."""
        if self.alpha == 1:
            return dict(losses)
        scaled = {
            name:
            [self.alpha * level
             for level in loss] if isinstance(loss,
                                              (list, tuple)) else self.alpha *
            loss
            for name, loss in losses.items()
            if self.tap.is_classification_loss(name)
        }
        if not scaled:
            raise ConfigError(
                'model.alpha', f'{self.alpha} has nothing to scale: none of '
                f'the losses {", ".join(losses)} of model.student is one of '
                'classification', 'leave alpha at 1')
        return {**losses, **scaled}

    def _terms(self, student: nn.Module, pairs: Sequence[LogitPair],
               features: Sequence[Sequence]) -> Dict[str, Tensor]:
        """The terms of all losses, summed over pairs, by their log names."""
        if not pairs:
            raise RuntimeError(
                f'{type(self.tap).__name__} found nothing in the losses of '
                'model.student that pairs with model.teacher')
        sums: Dict[str, Any] = defaultdict(float)
        for pair in pairs:
            terms = self.loss.pair_terms(pair)
            for name, term in terms.items():
                sums[f'loss_kd_{name}'] += self.scale * pair.weight * term
        for own, theirs in features:
            for name, term in student.distiller['mimic'].terms(own,
                                                               theirs).items():
                sums[f'loss_kd_{name}'] += self.scale * term
        self._logged.update(sums)
        return dict(sums)

    def _idle(self, student: nn.Module,
              losses: Dict[str, Any]) -> Dict[str, Tensor]:
        """Zeros, which keep what only distillation trains in the graph, as
        DDP wants, and end the curves in the log."""
        zero = next(tensors_in(losses)).new_zeros(())
        terms = dict.fromkeys(self._logged, zero)
        if hasattr(student, 'distiller'):
            parts = [p.sum() * 0 for p in student.distiller.parameters()]
            terms['loss_kd_mimic'] = sum(parts, zero)
        return terms
