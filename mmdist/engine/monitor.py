"""Watches whether a teacher has something to teach, and whether it arrives."""
import math
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .terms import TermMonitor, warn

# Fewer labelled instances say nothing about a teacher.
LEAST_INSTANCES = 30
# An accuracy this near to chance (of the way from chance to 1) is chance.
MARGIN = 0.1
# The logarithm of a ratio of variances: std of 1 for 58 is beyond 8, images
# of another place or time of day are not.
LARGEST_SCALE = math.log(30)
# Iterations in which the teacher also sees red as blue.
MOST_SWAPS = 3
CAUSES = (
    "either the teacher's mean, std or channel order are not those of its "
    'training (data_preprocessor in model.teacher.config), its classes '
    'are others or in another order (model.teacher.class_map), or '
    'model.teacher.checkpoint was not trained')


class TeacherMonitor:
    """Judges the teacher in the first iterations, and the loss all along.

    MMEngine has hooks for this, but a hook is a line in every config; the
    distilled model owns a monitor instead, so that none is without one. It
    logs how good the teacher is, and warns

    - if the teacher's class predictions for labelled instances, in the mean
      over classes, are not better than chance, worse than the student's, or
      worse than if red and blue of the images were exchanged;
    - if the teacher's first batch norm sees another variance than it did in
      training;
    - if the teacher predicts inf or nan;
    - for the reasons of :class:`mmdist.engine.terms.TermMonitor`.

    Args:
        strict (bool): Raise :class:`ConfigError` instead of warning.
        iters (int): Iterations in which the teacher is judged; ten times as
            many if few instances are labelled. Also the iterations that a
            term may stay the same.
        interval (int): Iterations between two looks at the gradients, after
            the first ``iters``.
    """

    def __init__(self,
                 strict: bool = False,
                 iters: int = 10,
                 interval: int = 500) -> None:
        self.strict, self.iters, self.interval = strict, iters, interval
        self.iteration = 0
        self.judged = False
        self._resumed = False
        # Per class: the instances, those for which the teacher predicts nan,
        # and those that student and teacher know; then, where the teacher
        # also saw red as blue: the instances, those that it knows, and those
        # that it knows with red for blue.
        self._counts: Optional[Tensor] = None
        # Whether the class is told from a background, the last of the counts.
        self._one_class = False
        self._swaps = 0
        self._scales: List[Tensor] = []
        self._terms = TermMonitor(strict, iters, interval)

    @contextmanager
    def listening(self, teacher: nn.Module) -> Iterator[None]:
        """Look at the input of the first batch norm of the teacher's backbone.

        Norms of a head may see one number per channel, or what a transformer
        has normalised.
        """
        parts = getattr(teacher, 'backbone', teacher).modules()
        norm = None if self.judged else next(
            (part for part in parts
             if isinstance(part, _BatchNorm) and part.track_running_stats),
            None)
        if norm is None:
            yield
            return

        def look(_: nn.Module, arguments: tuple) -> None:
            """Note the log ratio of variances, in the median over channels."""
            inputs, = arguments
            if inputs.numel() > inputs.shape[1]:  # one number has no variance
                table = inputs.detach().float().transpose(0, 1).flatten(1)
                trained = norm.running_var.float() + norm.eps
                ratio = (table.var(1) + norm.eps) / trained
                self._scales.append(ratio.log().median())

        with norm.register_forward_pre_hook(look):
            yield

    def watch(self,
              pairs: Sequence[Any],
              logits: List[Tensor],
              terms: Dict[str, Tensor],
              losses: Dict[str, Any],
              swapped: Sequence[Any] = ()) -> None:
        """Look at one iteration.

        Args:
            pairs (Sequence[LogitPair]): The pairs that were compared.
            logits (list[Tensor]): The student's, as its head gave them to its
                own loss.
            terms (dict[str, Tensor]): The terms of distillation by name.
            losses (dict[str, Any]): The student's own.
            swapped (Sequence[LogitPair]): As ``pairs``, of a teacher that
                sees red as blue; see :meth:`wants_swapped`.

        Raises:
            ConfigError: If there is a reason to warn, and ``strict``.
        """
        if not self.iteration:  # then a student may well be the better one
            self._resumed = bool(MessageHub.get_current_instance().get_info(
                'iter', 0))
        self.iteration += 1
        if not self.judged:
            self._count(pairs, swapped)
            if self.iteration % self.iters == 0:
                self._judge()
        self._terms.watch(self.iteration, logits, terms, losses)

    def wants_swapped(self, images: Any, pairs: Sequence[Any]) -> bool:
        """Whether the teacher is to be asked a second time, with red for blue:
        in the first batches of RGB images with a label."""
        shape = getattr(images, 'shape', ())
        if self.judged or self._swaps == MOST_SWAPS or shape[-3:-2] != (3, ):
            return False
        return any(
            labels is not None and bool((labels >= 0).any())
            for labels in (pair.truth() for pair in pairs))

    @torch.no_grad()
    def _count(self, pairs: Sequence[Any], swapped: Sequence[Any]) -> None:
        self._swaps += bool(swapped)
        for i, pair in enumerate(pairs):
            self._one_class = pair.num_classes == 1
            labels = pair.truth()
            if labels is None:
                continue
            known = (labels >= 0) & (labels < pair.num_answers)
            answers = pair.answers()
            answers += [other.answers()[1] for other in swapped[i:i + 1]]
            right = [(answer == labels)[known] for answer in answers]
            truth, every = labels[known], torch.ones_like(right[0])
            no_number = ~pair.teacher.isfinite().all(1)[known]
            facts = [every, no_number, *right[:2]]
            facts += [every, *right[1:]] if swapped else 3 * [~every]
            counts = torch.stack([
                truth[fact].bincount(minlength=pair.num_answers)
                for fact in facts
            ])
            if self._counts is not None:
                counts += self._counts
            self._counts = counts

    def _judge(self) -> None:
        """Say how good the teacher is, once enough instances were seen, and
        warn of the first thing that is wrong."""
        number, counts = 0, self._counts
        if counts is not None:
            # The same on all processes, so that they stop together.
            counts = counts.double()
            all_reduce(counts)
            # The background beside one class is not rare.
            number = int(counts[0, 0] if self._one_class else counts[0].sum())
            if number < LEAST_INSTANCES and self.iteration < 10 * self.iters:
                return
        self.judged = True
        scale = torch.zeros(())
        if self._scales:
            scale = torch.stack(self._scales).mean()
            all_reduce(scale, 'mean')
        if number:
            no_number, student_right, teacher_right = _shares(
                counts[1:4], counts[0])
            seen, swapped = _shares(counts[5:], counts[4])
            luck = 1.5 / max(float(counts[4].sum()), 1)**0.5
            present = int((counts[0] > 0).sum())
            chance = 1 / max(present, 2)
            classes = ('one class and the background'
                       if self._one_class else f'{present} classes')
            print_log(
                f'On {number} labelled instances of {classes}, the teacher is '
                f'right about {teacher_right:.3f} and the student about '
                f'{student_right:.3f} in the mean over classes (chance: '
                f'{chance:.3f})',
                logger='current')
        else:
            reason = ('its one class has no threshold (score_thr of test_cfg),'
                      ' nor a background beside it'
                      if self._one_class and counts is None else
                      'no label is known for what it is compared on')
            print_log(f'The teacher is not judged: {reason}', logger='current')
        if scale.abs() > LARGEST_SCALE:  # which would explain the rest
            warn(
                self.strict, 'model.teacher.config',
                "the teacher's first batch norm sees "
                f'{float(scale.exp()):.3g} times the variance that it was '
                'trained on', 'correct mean and std of data_preprocessor')
        elif not number:
            return
        elif no_number:
            warn(self.strict, 'model.teacher.checkpoint',
                 'the teacher predicts what is no number (inf or nan)',
                 'choose another one, or a larger model.teacher.dtype')
        elif swapped > max(
                _clearly_above(seen), _clearly_above(chance), seen + luck):
            # Wrong channels alone leave a teacher at chance; below it, names
            # are exchanged, or each class has the colour of another.
            other = ('; if that is right, its classes are in another order '
                     '(model.teacher.class_map)' if seen < chance / 2 else '')
            warn(
                self.strict, 'model.teacher.config',
                f'the teacher is right about {seen:.3f}, but about '
                f'{swapped:.3f} if red and blue are exchanged',
                f'correct bgr_to_rgb of data_preprocessor{other}')
        elif teacher_right < _clearly_above(chance):
            warn(
                self.strict, 'model.teacher',
                f'the teacher is right about {teacher_right:.3f}, '
                f'which is chance ({chance:.3f})', CAUSES)
        elif student_right > _clearly_above(
                teacher_right) and not self._resumed:
            warn(
                self.strict, 'model.teacher',
                f'the teacher ({teacher_right:.3f}) is worse than '
                f'the student ({student_right:.3f})',
                f'{CAUSES}; or the student is better already')


def _shares(rows: Tensor, totals: Tensor) -> List[float]:
    """The share of each row in the totals, in the mean over classes."""
    present = totals > 0
    if not present.any():
        return [0.] * len(rows)
    return (rows[:, present] / totals[present]).mean(1).tolist()


def _clearly_above(accuracy: float) -> float:
    return accuracy + MARGIN * (1 - accuracy)
