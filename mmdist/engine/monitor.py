"""Watches whether a teacher has something to teach, and whether it arrives."""
import math
from contextlib import contextmanager
from logging import WARNING
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.logging import MessageHub, print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# Fewer labelled instances say nothing about a teacher.
LEAST_INSTANCES = 30
# What lies within so much of chance (of the way from chance to 1) is chance.
MARGIN = 0.1
# The logarithm of a ratio of variances: std of 1 for 58 is beyond 8, pictures
# of another place or time of day are not.
LARGEST_SCALE = math.log(30)
# Gradients of half precision's logits would be 0 without a factor.
SCALE = 2.**12
# Iterations in which the teacher also sees red as blue.
MOST_SWAPS = 3
CAUSES = ("the teacher's mean, std or channel order are not those that it was "
          'trained with (data_preprocessor in model.teacher.config), its '
          "classes are others or in another order (model.teacher.class_map), "
          'or model.teacher.checkpoint was not trained')


class TeacherMonitor:
    """Judges the teacher in the first iterations, and the loss all along.

    MMEngine has hooks for this, but a hook is a line in every config; the
    wrapper owns a monitor instead, so that none is without one. It says what
    it sees in the log, in the scalar ``kd_grad_ratio`` (the norm of the
    gradient of all terms of distillation by that of the student's own losses,
    on the tapped logits), and warns

    - if the teacher's class predictions for labelled instances, in the mean
      over classes, are not better than chance, worse than the student's, or
      worse than if red and blue of the pictures were exchanged;
    - if the teacher's first batch norm sees another variance than it did in
      training;
    - if the teacher says what is no number;
    - if a term of distillation that has a gradient stays the same, or if no
      term has one.

    Args:
        strict (bool): Stop instead of warning.
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
        # For each class the instances, those for which the teacher says no
        # number, and those that student and teacher know; and where the
        # teacher also saw red as blue: the instances, those that it knows, and
        # those that it knows then.
        self._counts: Optional[Tensor] = None
        # Whether the class is told from a background, the last of the counts.
        self._one_class = False
        self._swaps = 0
        self._scales: List[Tensor] = []
        self._last: Dict[str, Tensor] = {}
        self._unchanged: Dict[str, Tensor] = {}
        self._without_gradient = 0

    @contextmanager
    def listening(self, teacher: nn.Module) -> Iterator[None]:
        """Look at what the first batch norm of a backbone is given within.

        Args:
            teacher (nn.Module): In eval mode.
        """
        # Those of a head may see one number a channel, or what a transformer
        # has normalised.
        trunk = getattr(teacher, 'backbone', teacher)
        norm = next((m for m in trunk.modules()
                     if isinstance(m, _BatchNorm) and m.track_running_stats),
                    None)
        if self.judged or norm is None:
            yield
            return
        handle = norm.register_forward_pre_hook(
            lambda _, inputs: self._look_at_scale(norm, inputs[0]))
        try:
            yield
        finally:
            handle.remove()

    def _look_at_scale(self, norm: nn.Module, inputs: Tensor) -> None:
        if inputs.numel() > inputs.shape[1]:  # one number has no variance
            self._scales.append(scale_of(norm, inputs))

    def watch(self,
              pairs: Sequence[Any],
              logits: List[Tensor],
              terms: Dict[str, Tensor],
              losses: Dict[str, Any],
              swapped: Sequence[Any] = ()) -> None:
        """Look at one iteration.

        Args:
            pairs (Sequence[LogitPair]): What was compared.
            logits (list[Tensor]): The student's, as its head gave them to its
                own loss.
            terms (dict[str, Tensor]): Of distillation, by name.
            losses (dict[str, Any]): The student's own.
            swapped (Sequence[LogitPair]): As ``pairs``, of a teacher that
                sees red as blue; see :meth:`wants_swapped`.

        Raises:
            RuntimeError: If there is a reason to warn, and ``strict``.
        """
        if not self.iteration:  # then a student may well be the better one
            self._resumed = bool(MessageHub.get_current_instance().get_info(
                'iter', 0))
        self.iteration += 1
        early = self.iteration <= self.iters
        if not self.judged:
            self._count(pairs, swapped)
            if self.iteration % self.iters == 0:
                self._judge()
        self._compare(terms)
        if torch.is_grad_enabled() and (early or self.iteration % self.interval
                                        == 0):
            self._look_at_gradients(logits, terms, losses)

    def wants_swapped(self, images: Any, pairs: Sequence[Any]) -> bool:
        """Whether the teacher is to be asked again, with red for blue.

        Args:
            images (Tensor | dict): The images of the batch.
            pairs (Sequence[LogitPair]): The logits of the batch.
        """
        shape = getattr(images, 'shape', ())
        if self.judged or self._swaps == MOST_SWAPS or shape[-3:-2] != (3, ):
            return False
        labels = [pair.truth() for pair in pairs if pair.num_answers]
        return any(
            bool((each >= 0).any()) for each in labels if each is not None)

    @torch.no_grad()
    def _count(self, pairs: Sequence[Any], swapped: Sequence[Any]) -> None:
        self._swaps += bool(swapped)
        for i, pair in enumerate(pairs):
            self._one_class = pair.num_classes == 1
            labels = pair.truth() if pair.num_answers else None
            if labels is None:
                continue
            counts = pair.student.new_zeros(
                7, pair.num_answers, dtype=torch.float64)
            known = (labels >= 0) & (labels < pair.num_answers)
            truth = labels[known]
            rows = [
                side.movedim(1, -1)[known]
                for side in (pair.student, pair.teacher,
                             *(other.teacher for other in swapped[i:i + 1]))
            ]
            student, teacher = pair.thresholds or (None, None)
            right = [
                classes_of(r, pair.num_classes, pair.background,
                           threshold) == truth
                for r, threshold in zip(rows, (student, teacher, teacher))
            ]
            no_number = ~rows[1].isfinite().all(1)
            every = torch.ones_like(no_number)
            facts = [every, no_number, *right[:2]]
            if swapped:
                facts += [every, *right[1:]]
            for row, fact in zip(counts, facts):
                row.index_add_(0, truth, fact.double())
            self._counts = counts if self._counts is None else (self._counts +
                                                                counts)

    def _judge(self) -> None:
        """Say how good the teacher is, once enough instances were seen."""
        if self._counts is None:
            self.judged = True
            self._doubt_scale()
            why = ('its one class has no threshold (score_thr of test_cfg), '
                   'nor a background beside it' if self._one_class else
                   'no labels are known for what it is compared on')
            print_log(f'The teacher is not judged: {why}', logger='current')
            return
        # The same on all processes, so that they stop together.
        counts = self._counts.clone()
        all_reduce(counts)
        # The background beside one class is not rare.
        number = int(counts[0, 0] if self._one_class else counts[0].sum())
        if number < LEAST_INSTANCES and self.iteration < 10 * self.iters:
            return
        self.judged = True
        if not number:
            self._doubt_scale()
            print_log(
                f'The teacher is not judged: none of {self.iteration} '
                'iterations had a labelled instance',
                logger='current')
            return
        no_number, student, teacher = _shares(counts[1:4], counts[0])
        present = int((counts[0] > 0).sum())
        chance = 1 / max(present, 2)
        classes = ('one class and the background'
                   if self._one_class else f'{present} classes')
        print_log(
            f'On {number} labelled instances of {classes}, the teacher is '
            f'right about {teacher:.3f} and the student about {student:.3f} '
            f'in the mean over classes (chance: {chance:.3f})',
            logger='current')
        if not self._doubt_scale():  # which would explain the rest
            self._doubt(student, teacher, no_number, chance, counts[4:])

    def _doubt_scale(self) -> bool:
        if not self._scales:
            return False
        scale = torch.stack(self._scales).mean()
        self._scales.clear()
        all_reduce(scale, 'mean')
        wrong = bool(scale.abs() > LARGEST_SCALE)
        if wrong:
            ratio = float(scale.exp())
            self._warn(
                f"The teacher's first batch norm sees {ratio:.3g} "
                'times the variance that it was trained on: correct mean and '
                'std of data_preprocessor in model.teacher.config')
        return wrong

    def _doubt(self, student: float, teacher: float, no_number: float,
               chance: float, swaps: Tensor) -> None:
        """Warn of the first thing that is wrong."""
        seen, swapped = _shares(swaps[1:], swaps[0])
        luck = 1.5 / max(float(swaps[0].sum()), 1)**0.5
        if no_number:
            self._warn(
                'The teacher predicts what is no number (inf or nan): '
                'its weights are broken, or its dtype is too small; '
                'check model.teacher.checkpoint and model.teacher.dtype')
        elif swapped > max(
                _clearly_above(seen), _clearly_above(chance), seen + luck):
            # Wrong channels alone leave a teacher at chance; below it, names
            # are exchanged, or each class has the colour of another.
            below = seen < chance / 2
            other = ('; if that is right, its classes are in another order '
                     '(model.teacher.class_map)' if below else '')
            self._warn(
                f'The teacher is right about {seen:.3f}, but about '
                f'{swapped:.3f} if red and blue are exchanged: correct '
                'bgr_to_rgb of data_preprocessor in model.teacher.config'
                f'{other}')
        elif teacher < _clearly_above(chance):
            self._warn(f'The teacher is right about {teacher:.3f}, which is '
                       f'chance ({chance:.3f}). Either {CAUSES}')
        elif student > _clearly_above(teacher) and not self._resumed:
            self._warn(f'The teacher ({teacher:.3f}) is worse than the '
                       f'student ({student:.3f}). Either {CAUSES}; or the '
                       'student is better already')

    def _compare(self, terms: Dict[str, Tensor]) -> None:
        """Count in how many iterations a term was the same, on the device.

        Terms that cannot have a gradient (of weight 0, or constant by design)
        teach nothing on purpose.
        """
        for name, term in terms.items():
            if not term.requires_grad:
                continue
            value = term.detach()
            if name in self._last:
                same = value == self._last[name]
                self._unchanged[name] = (self._unchanged.get(name, 0) +
                                         1) * same
            self._last[name] = value
        # Reading a value makes a GPU wait, so seldom.
        if (self.iteration == self.iters
                or self.iteration % self.interval == 0):
            for name, count in self._unchanged.items():
                if count >= self.iters - 1:
                    self._warn(f'{name} has been {float(self._last[name]):g} '
                               f'for {int(count) + 1} iterations, so the '
                               'student learns nothing from it: check '
                               'model.distill_loss and the teacher')

    def _look_at_gradients(self, logits: List[Tensor], terms: Dict[str,
                                                                   Tensor],
                           losses: Dict[str, Any]) -> None:
        logits = [part for part in logits if part.requires_grad]
        if not logits:
            return
        kd = gradient_norm(list(terms.values()), logits)
        own = gradient_norm([
            part for name, loss in losses.items() if 'loss' in name
            for part in (loss if isinstance(loss, (list, tuple)) else [loss])
        ], logits)
        if own:  # with alpha=0 it may have none
            MessageHub.get_current_instance().update_scalar(
                'train/kd_grad_ratio', kd / own)
        self._without_gradient = 0 if kd else self._without_gradient + 1
        if self._without_gradient == self.iters:
            self._warn('No term of distillation has had a gradient in '
                       f'{self.iters} of the iterations that were looked at: '
                       'check the weights of model.distill_loss; constant '
                       'predictions of the teacher have none either')

    def _warn(self, message: str) -> None:
        if self.strict:
            raise RuntimeError(
                f'{message} (a warning, were it not for strict_teacher=True)')
        print_log(message, logger='current', level=WARNING)


@torch.no_grad()
def scale_of(norm: nn.Module, inputs: Tensor) -> Tensor:
    """The variance of a batch norm's input by that of its training.

    Args:
        norm (nn.Module): A batch norm with running statistics.
        inputs (Tensor): ``(N, C, *)``.

    Returns:
        Tensor: A scalar, the logarithm of the ratio, in the median over
        channels.
    """
    variance = inputs.float().transpose(0, 1).flatten(1).var(1)
    trained = norm.running_var.float()
    return ((variance + norm.eps) / (trained + norm.eps)).log().median()


def _shares(rows: Tensor, totals: Tensor) -> List[float]:
    """The share of each row in the totals, in the mean over classes."""
    present = totals > 0
    if not present.any():
        return [0.] * len(rows)
    return (rows[:, present] / totals[present]).mean(1).tolist()


def _clearly_above(accuracy: float) -> float:
    return accuracy + MARGIN * (1 - accuracy)


def classes_of(logits: Tensor,
               num_classes: int,
               background: bool = False,
               threshold: Optional[float] = None) -> Tensor:
    """The class that each row of logits says.

    Args:
        logits (Tensor): ``(R, C)``, of classes and perhaps a background, or
            of the classes of several anchors.
        num_classes (int): Classes.
        background (bool): Whether one class has a background in the second
            column.
        threshold (float, optional): The probability above which one class
            without a background is said to be there.

    Returns:
        Tensor: ``(R, )``, int64: the class with the highest score; of one
        class, 0 where it is and 1 where it is not.
    """
    if num_classes > 1:
        return class_scores(logits, num_classes).argmax(1)
    if background:
        return logits.argmax(1)
    return (logits.amax(1).sigmoid() <= threshold).long()


def class_scores(logits: Tensor, num_classes: int) -> Tensor:
    """Those of :func:`classes_of`: no background, the best of anchors.

    Returns:
        Tensor: ``(R, num_classes)``.
    """
    if logits.shape[1] % num_classes:
        logits = logits[:, :num_classes]
    return logits.unflatten(1, (-1, num_classes)).amax(1)


def gradient_norm(losses: Sequence[Tensor], logits: List[Tensor]) -> float:
    """The norm of the gradient of a sum of losses with respect to logits.

    Args:
        losses (Sequence[Tensor]): Scalars, or tensors whose mean is meant.
        logits (list[Tensor]): Of the graph of the losses.

    Returns:
        float: 0 if no loss depends on the logits.
    """
    losses = [loss.float().mean() for loss in losses if loss.requires_grad]
    if not losses:
        return 0.
    gradients = torch.autograd.grad(
        SCALE * sum(losses), logits, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(sum(squares))**0.5 / SCALE
