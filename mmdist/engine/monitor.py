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

from mmdist.errors import ConfigError

# Fewer labelled instances say nothing about a teacher.
LEAST_INSTANCES = 30
# An accuracy this near to chance (of the way from chance to 1) is chance.
MARGIN = 0.1
# The logarithm of a ratio of variances: std of 1 for 58 is beyond 8, images
# of another place or time of day are not.
LARGEST_SCALE = math.log(30)
# Gradients of half precision's logits would be 0 without a factor.
SCALE = 2.**12
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
    logs what it sees and the scalar ``kd_grad_ratio`` (the norm of the
    gradient of all terms of distillation by that of the student's own losses,
    on the tapped logits), and warns

    - if the teacher's class predictions for labelled instances, in the mean
      over classes, are not better than chance, worse than the student's, or
      worse than if red and blue of the images were exchanged;
    - if the teacher's first batch norm sees another variance than it did in
      training;
    - if the teacher predicts inf or nan;
    - if a term of distillation that has a gradient stays the same, or if no
      term has one.

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
        self._last: Dict[str, Tensor] = {}
        self._unchanged: Dict[str, Tensor] = {}
        self._without_gradient = 0

    @contextmanager
    def listening(self, teacher: nn.Module) -> Iterator[None]:
        """Look at the input of the first batch norm of a backbone.

        Args:
            teacher (nn.Module): In eval mode.
        """
        # Norms of a head may see one number per channel, or what a
        # transformer has normalised.
        trunk = getattr(teacher, 'backbone', teacher)
        norm = next((m for m in trunk.modules()
                     if isinstance(m, _BatchNorm) and m.track_running_stats),
                    None)
        if self.judged or norm is None:
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

        handle = norm.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

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
        self._look_at_terms(logits, terms, losses)

    def wants_swapped(self, images: Any, pairs: Sequence[Any]) -> bool:
        """Whether the teacher is to be asked a second time, with red for blue.

        Args:
            images (Tensor | dict): The images of the batch.
            pairs (Sequence[LogitPair]): The logits of the batch.
        """
        shape = getattr(images, 'shape', ())
        if self.judged or self._swaps == MOST_SWAPS or shape[-3:-2] != (3, ):
            return False
        labels = [pair.truth() for pair in pairs if pair.num_answers]
        return any(
            each is not None and bool((each >= 0).any()) for each in labels)

    @torch.no_grad()
    def _count(self, pairs: Sequence[Any], swapped: Sequence[Any]) -> None:
        self._swaps += bool(swapped)
        for i, pair in enumerate(pairs):
            self._one_class = pair.num_classes == 1
            labels = pair.truth() if pair.num_answers else None
            if labels is None:
                continue
            known = (labels >= 0) & (labels < pair.num_answers)
            truth = labels[known]
            student, teacher = pair.thresholds or (None, None)
            logits = [pair.student, pair.teacher]
            logits += [other.teacher for other in swapped[i:i + 1]]
            rows = [each.movedim(1, -1)[known] for each in logits]
            right = [
                classes_of(table, pair.num_classes, pair.background,
                           threshold) == truth
                for table, threshold in zip(rows, (student, teacher, teacher))
            ]
            every = torch.ones_like(right[0])
            facts = [every, ~rows[1].isfinite().all(1), *right[:2]]
            facts += [every, *right[1:]] if swapped else 3 * [~every]
            counts = torch.stack([
                truth[fact].bincount(minlength=pair.num_answers)
                for fact in facts
            ])
            self._counts = counts + (0
                                     if self._counts is None else self._counts)

    def _judge(self) -> None:
        """Say how good the teacher is, once enough instances were seen, and
        warn of the first thing that is wrong."""
        number, counts = 0, self._counts
        if counts is None:
            reason = ('its one class has no threshold (score_thr of test_cfg),'
                      ' nor a background beside it' if self._one_class else
                      'no labels are known for what it is compared on')
        else:
            # The same on all processes, so that they stop together.
            counts = counts.double()
            all_reduce(counts)
            # The background beside one class is not rare.
            number = int(counts[0, 0] if self._one_class else counts[0].sum())
            if number < LEAST_INSTANCES and self.iteration < 10 * self.iters:
                return
            reason = (f'none of {self.iteration} iterations had a labelled '
                      'instance')
        self.judged = True
        scale = torch.stack(self._scales or [torch.zeros(())]).mean()
        if self._scales:
            all_reduce(scale, 'mean')
        if number:
            no_number, student, teacher = _shares(counts[1:4], counts[0])
            seen, swapped = _shares(counts[5:], counts[4])
            luck = 1.5 / max(float(counts[4].sum()), 1)**0.5
            present = int((counts[0] > 0).sum())
            chance = 1 / max(present, 2)
            classes = ('one class and the background'
                       if self._one_class else f'{present} classes')
            print_log(
                f'On {number} labelled instances of {classes}, the teacher is '
                f'right about {teacher:.3f} and the student about '
                f'{student:.3f} in the mean over classes (chance: '
                f'{chance:.3f})',
                logger='current')
        else:
            print_log(f'The teacher is not judged: {reason}', logger='current')
        if scale.abs() > LARGEST_SCALE:  # which would explain the rest
            self._warn(
                'model.teacher.config', "the teacher's first batch norm sees "
                f'{float(scale.exp()):.3g} times the variance that it was '
                'trained on', 'correct mean and std of data_preprocessor')
        elif not number:
            return
        elif no_number:
            self._warn('model.teacher.checkpoint',
                       'the teacher predicts what is no number (inf or nan)',
                       'choose another one, or a larger model.teacher.dtype')
        elif swapped > max(
                _clearly_above(seen), _clearly_above(chance), seen + luck):
            # Wrong channels alone leave a teacher at chance; below it, names
            # are exchanged, or each class has the colour of another.
            other = ('; if that is right, its classes are in another order '
                     '(model.teacher.class_map)' if seen < chance / 2 else '')
            self._warn(
                'model.teacher.config',
                f'the teacher is right about {seen:.3f}, but about '
                f'{swapped:.3f} if red and blue are exchanged',
                f'correct bgr_to_rgb of data_preprocessor{other}')
        elif teacher < _clearly_above(chance):
            self._warn(
                'model.teacher', f'the teacher is right about {teacher:.3f}, '
                f'which is chance ({chance:.3f})', CAUSES)
        elif student > _clearly_above(teacher) and not self._resumed:
            self._warn(
                'model.teacher', f'the teacher ({teacher:.3f}) is worse than '
                f'the student ({student:.3f})',
                f'{CAUSES}; or the student is better already')

    def _look_at_terms(self, logits: List[Tensor], terms: Dict[str, Tensor],
                       losses: Dict[str, Any]) -> None:
        """Warn of terms that stay the same or have no gradient."""
        for name, term in terms.items():
            # One that cannot have a gradient (of weight 0, or constant by
            # design) teaches nothing on purpose.
            if term.requires_grad:
                value = term.detach()
                same = value == self._last.get(name, math.nan)
                self._unchanged[name] = (self._unchanged.get(name, 0) +
                                         1) * same
                self._last[name] = value
        seldom = self.iteration % self.interval == 0
        # Reading a value makes a GPU wait, so seldom.
        if self.iteration == self.iters or seldom:
            for name, count in self._unchanged.items():
                if count >= self.iters - 1:
                    self._warn(
                        'model.distill_loss',
                        f'{name} has been {float(self._last[name]):g} for '
                        f'{int(count) + 1} iterations, so the student learns '
                        'nothing from it', 'check the loss and the teacher')
        logits = [part for part in logits if part.requires_grad]
        if not (logits and torch.is_grad_enabled() and
                (self.iteration <= self.iters or seldom)):
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
            self._warn(
                'model.distill_loss', 'no term of distillation has had a '
                f'gradient in {self.iters} of the iterations that were looked '
                'at', 'check its weights; constant predictions of the teacher '
                'have no gradient either')

    def _warn(self, field: str, problem: str, remedy: str) -> None:
        if self.strict:
            raise ConfigError(
                field, f'{problem} (a warning without strict_teacher=True)',
                remedy)
        print_log(
            str(ConfigError(field, problem, remedy)),
            logger='current',
            level=WARNING)


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
    """The class that each row of ``(R, C)`` logits predicts, ``(R, )``.

    One class is 0 where it is there and 1 where it is not: where a second
    column, the background, is higher, or where its probability is at most the
    threshold.
    """
    if num_classes > 1:
        return class_scores(logits, num_classes).argmax(1)
    if background:
        return logits.argmax(1)
    return (logits.amax(1).sigmoid() <= threshold).long()


def class_scores(logits: Tensor, num_classes: int) -> Tensor:
    """The best score of all anchors for each class, ``(R, num_classes)``."""
    if logits.shape[1] % num_classes:  # a background
        logits = logits[:, :num_classes]
    return logits.unflatten(1, (-1, num_classes)).amax(1)


def gradient_norm(losses: Sequence[Tensor], logits: List[Tensor]) -> float:
    """The norm of the gradient of the sum of losses (or of their means) with
    respect to logits; 0 if no loss depends on these."""
    losses = [loss.float().mean() for loss in losses if loss.requires_grad]
    if not losses:
        return 0.
    gradients = torch.autograd.grad(
        SCALE * sum(losses), logits, retain_graph=True, allow_unused=True)
    squares = [g.float().square().sum() for g in gradients if g is not None]
    return float(sum(squares))**0.5 / SCALE
