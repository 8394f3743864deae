"""How far a student's class predictions are from a teacher's.

The paper speaks of a growing discrepancy between a student and a stronger
teacher (Huang et al., NeurIPS 2022, Section 3) without a measure of it. Here
are several, of what the taps compare, batch by batch: what both losses would
be, whether the classes are ranked alike, and who is right.
"""
import math
from collections import defaultdict
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor

from mmdist.engine.monitor import class_scores, classes_of
from mmdist.models.losses.functional import dist_terms, kd_terms, to_rows
from mmdist.models.losses.pearson import activate
from mmdist.models.taps import LogitPair
from mmdist.models.taps.labels import NONE
from .ranks import kendall, spearman

NUM_BINS = 10
# Areas of boxes in pixels, as COCO divides them.
SIZES = dict(small=(0, 32**2), medium=(32**2, 96**2), large=(96**2, math.inf))
# Pairs of classes that are compared at a time.
MOST_PAIRS = 2**23
# What a mean over rows is kept of.
MEASURES = ('kl', 'inter', 'intra', 'spearman', 'kendall', 'top-1 agreement')
# Facts about labelled rows.
JUDGEMENTS = ('accuracy', 'calibration')


class Discrepancy:
    """Collects what pairs of logits say, one batch after the other.

    Rows are in the groups 'all', 'foreground' and 'background' (with and
    without an object, where the ground truth says it), 'small', 'medium' and
    'large' (of boxes with an object, as COCO divides them, in pixels of the
    input), and that of their pair (a stage, a level or a head). A row's score
    for a class is, of several anchors, that of the best.

    One class has no ranks and no relation to others, and its only column is
    always the highest: its answer for a row, that it is there or not, comes
    from the threshold of the head, or from the background column beside it.
    Where there is neither, agreement, accuracy and calibration are left out.

    Args:
        tau (float): Temperature of the losses.
        num_ranked (int): Rows of a pair, drawn at random, whose classes are
            ranked; fewer of hundreds of classes.
        seed (int): Of this draw.
    """

    def __init__(self,
                 tau: float = 1.,
                 num_ranked: int = 256,
                 seed: int = 0) -> None:
        self.tau, self.num_ranked = tau, num_ranked
        self._rng = torch.Generator().manual_seed(seed)
        # by group and measure: the sum over rows, and the number of rows
        self._sums: Dict[str,
                         Dict[str,
                              float]] = defaultdict(lambda: defaultdict(float))
        self._rows: Dict[str,
                         Dict[str,
                              int]] = defaultdict(lambda: defaultdict(int))
        self._classes: Optional[Dict[str, Tensor]] = None

    @torch.no_grad()
    def update(self, pair: LogitPair) -> None:
        """Add a pair of logits."""
        rows = [to_rows(x) for x in (pair.student, pair.teacher)]
        labels = pair.labels()
        groups = {'all': slice(None), pair.name or 'head': slice(None)}
        if labels is not None:
            groups.update(_by_object(labels.flatten(), pair.areas()))
        # Tokens of a text have no classes.
        number = pair.num_classes or rows[0].shape[1]
        scores = answers = None
        if number > 1:
            scores = [class_scores(x, number) for x in rows]
        if number > 1 or pair.num_answers:
            thresholds = pair.thresholds or (None, None)
            answers = [
                classes_of(x, number, pair.background, threshold)
                for x, threshold in zip(rows, thresholds)
            ]
        for group, chosen in groups.items():
            self._add_group(
                group, pair, *(x[chosen] for x in rows),
                *(side and [x[chosen] for x in side]
                  for side in (scores, answers)))
        if pair.num_classes:
            self._add_classes(pair, rows, answers)

    def _add_group(self, group: str, pair: LogitPair, student: Tensor,
                   teacher: Tensor, scores: Optional[List[Tensor]],
                   answers: Optional[List[Tensor]]) -> None:
        number = len(student)
        if not number:
            return
        activations = pair.student_activation, pair.teacher_activation
        terms = {
            **kd_terms(student, teacher, self.tau, *activations),
            **dist_terms(student, teacher, self.tau, *activations)
        }
        values = {name: term / self.tau**2 for name, term in terms.items()}
        if pair.num_classes == 1:
            del values['inter']
        if answers:
            values['top-1 agreement'] = (
                answers[0] == answers[1]).float().mean()
        if scores:
            most = max(MOST_PAIRS // scores[0].shape[1]**2, 1)
            drawn = torch.randperm(
                number, generator=self._rng)[:min(self.num_ranked, most)]
            ranked = [x[drawn.to(x.device)] for x in scores]
            values['spearman'] = spearman(*ranked).mean()
            values['kendall'] = kendall(*ranked).mean()
        self._rows[group]['rows'] += number
        for name, value in values.items():
            self._sums[group][name] += number * float(value)
            self._rows[group][name] += number

    def _add_classes(self, pair: LogitPair, rows: List[Tensor],
                     answers: Optional[List[Tensor]]) -> None:
        number = pair.num_classes
        if self._classes is None:
            self._classes = _no_classes(number, pair.num_answers)
        found = self._classes
        if (len(found['products']),
                len(found['labelled'])) != (number, pair.num_answers):
            return  # another head, of other classes
        p, q = (_probabilities(x / self.tau, activation, pair).double()
                for x, activation in zip(rows, (pair.student_activation,
                                                pair.teacher_activation)))
        found['rows'] += len(p)
        parts = dict(
            sums=torch.stack([p.sum(0), q.sum(0)]),
            squares=torch.stack([p.square().sum(0),
                                 q.square().sum(0)]),
            products=p.T @ q)
        for name, part in parts.items():
            found[name] += part.cpu()
        truth = pair.truth() if answers else None
        if truth is not None and bool((truth >= 0).any()):
            self._add_labelled(truth.flatten(), p, q, answers)

    def _add_labelled(self, truth: Tensor, p: Tensor, q: Tensor,
                      answers: List[Tensor]) -> None:
        known = truth >= 0
        truth = truth[known].cpu()
        found = self._classes
        found['labelled'].index_add_(0, truth, torch.ones(len(truth)).double())
        said = [x[known].cpu() for x in answers]
        for side, (answer, table) in enumerate(zip(said, (p, q))):
            right = (answer == truth).double()
            found['right'][side].index_add_(0, truth, right)
            confidence = table[known].amax(1).clamp(0, 1).cpu()
            bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
            if p.shape[1] == 1:  # how often the class is where it is said
                right = (truth == 0).double()
            values = torch.ones_like(right), confidence, right
            for row, value in zip(found['reliability'][side], values):
                row.index_add_(0, bins, value)
        found['agree'].index_add_(0, truth, (said[0] == said[1]).double())

    def summary(self) -> Dict[str, Any]:
        """What was found, in lists and numbers.

        Returns:
            dict[str, Any]: ``groups``, by name the rows and each of
            ``MEASURES``; ``classes``, if there are any, by class the labelled
            rows, the accuracy of both and their agreement on them, and
            ``intra``, the Pearson distance of all rows (of one class, a
            second row is of the background); ``correlation``, of the
            student's column i and the teacher's column j; ``reliability`` of
            'student' and 'teacher', the rows, confidence and accuracy of bins
            of confidence, and the expected calibration error (of one class,
            its probability, and how often it is there); and ``left_out``,
            the names of what means nothing for these logits.
        """
        groups = {
            name:
            dict(
                rows=rows['rows'],
                **{
                    key: self._sums[name][key] / rows[key]
                    for key in MEASURES if key in rows
                })
            for name, rows in self._rows.items()
        }
        measured = {key for group in groups.values() for key in group}
        left_out = [key for key in MEASURES if groups and key not in measured]
        if self._classes is None:
            return dict(groups=groups, left_out=left_out)
        correlation = _correlation(self._classes)
        found = dict(
            groups=groups,
            classes=_by_class(self._classes, correlation),
            correlation=correlation.tolist())
        if not len(self._classes['labelled']):
            return dict(found, left_out=[*left_out, *JUDGEMENTS])
        return dict(
            found,
            reliability={
                side: _reliability(bins)
                for side, bins in zip((
                    'student', 'teacher'), self._classes['reliability'])
            },
            left_out=left_out)


def _probabilities(logits: Tensor, activation: str, pair: LogitPair) -> Tensor:
    """The probabilities of the classes, ``(R, num_classes)``."""
    table = activate(logits, activation)
    if pair.num_classes == 1 and pair.background:
        return table[:, :1]
    return class_scores(table, pair.num_classes)


def _by_object(labels: Tensor, areas: Optional[Tensor]) -> Dict[str, Tensor]:
    """Rows with and without an object, and those of objects by size."""
    groups = dict(foreground=labels >= 0, background=labels == NONE)
    if areas is not None:
        areas = areas.flatten()
        for size, (least, most) in SIZES.items():
            inside = (areas >= least) & (areas < most)
            groups[size] = groups['foreground'] & inside
    return groups


def _no_classes(number: int, answers: int) -> Dict[str, Tensor]:
    double = torch.float64
    return dict(
        rows=torch.zeros((), dtype=double),
        sums=torch.zeros(2, number, dtype=double),
        squares=torch.zeros(2, number, dtype=double),
        products=torch.zeros(number, number, dtype=double),
        labelled=torch.zeros(answers, dtype=double),
        right=torch.zeros(2, answers, dtype=double),
        agree=torch.zeros(answers, dtype=double),
        reliability=torch.zeros(2, 3, NUM_BINS, dtype=double))


def _correlation(found: Dict[str, Tensor]) -> Tensor:
    """Pearson correlation of the student's column i and the teacher's j."""
    means = found['sums'] / found['rows']
    variances = found['squares'] / found['rows'] - means**2
    covariance = (
        found['products'] / found['rows'] - means[0][:, None] * means[1])
    # what varies no more than rounding does not vary
    deviations = variances.clamp(min=0).sqrt()
    deviations = deviations.where(deviations > 1e-7 * means, torch.inf)
    return covariance / (deviations[0][:, None] * deviations[1])


def _by_class(found: Dict[str, Tensor],
              correlation: Tensor) -> List[Dict[str, float]]:
    intra = 1 - correlation.diagonal()
    if not len(found['labelled']):
        return [dict(intra=float(intra))]
    number = found['labelled'].clamp(min=1)
    columns = dict(
        labelled=found['labelled'],
        student=found['right'][0] / number,
        teacher=found['right'][1] / number,
        agreement=found['agree'] / number,
        # The background's probability is what is left of one class.
        intra=intra.expand(len(number)))
    return [
        dict(zip(columns, values))
        for values in zip(*(column.tolist() for column in columns.values()))
    ]


def _reliability(bins: Tensor) -> Dict[str, Any]:
    rows, confidence, right = bins
    number = rows.clamp(min=1)
    gaps = (confidence - right).abs().sum() / rows.sum().clamp(min=1)
    return dict(
        rows=rows.tolist(),
        confidence=(confidence / number).tolist(),
        accuracy=(right / number).tolist(),
        error=float(gaps))
