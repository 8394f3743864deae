"""Measures of how far a student's class predictions are from a teacher's.

The paper speaks of a growing discrepancy between a student and a stronger
teacher (Huang et al., NeurIPS 2022, Section 3) without a measure of it. Here
are several, on the pairs of logits that the taps compare, batch by batch:
the values of both losses, whether the classes are ranked alike, and who is
right.
"""
import math
from collections import defaultdict
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from mmdist.models.losses.formula import activate
from mmdist.models.losses.functional import dist_terms, kd_terms, to_rows
from mmdist.models.taps import LogitPair
from mmdist.models.taps.columns import class_scores
from mmdist.models.taps.labels import NONE
from .ranks import kendall, spearman

NUM_BINS = 10
# Areas of boxes in pixels, as COCO divides them.
SIZES = dict(small=(0, 32**2), medium=(32**2, 96**2), large=(96**2, math.inf))
# Pairs of classes that are compared at a time.
MOST_PAIRS = 2**23
# Means over rows.
MEASURES = ('kl', 'inter', 'intra', 'spearman', 'kendall', 'top-1 agreement')
# Facts about labelled rows.
JUDGEMENTS = ('accuracy', 'calibration')


class Discrepancy:
    """Collects measures of pairs of logits, one batch after the other.

    Rows are in the groups 'all', 'foreground' and 'background' (with and
    without an object, where the ground truth says it), 'small', 'medium' and
    'large' (of boxes with an object, as COCO divides them, in pixels of the
    input), and that of their pair (a stage, a level or a head). A row's score
    for a class is the best of all anchors.

    One class has no ranks and no relation to others, and its only column is
    always the highest: its answer for a row, that it is there or not, comes
    from the threshold of the head, or from the background column beside it.
    Where there is neither, agreement, accuracy and calibration are left out.

    Args:
        tau (float): Temperature of the losses.
        num_ranked (int): Rows of a pair, drawn at random, whose classes are
            ranked; fewer of hundreds of classes.
        seed (int): Seed of this draw.
    """

    def __init__(self,
                 tau: float = 1.,
                 num_ranked: int = 256,
                 seed: int = 0) -> None:
        self.tau, self.num_ranked = tau, num_ranked
        self._rng = torch.Generator().manual_seed(seed)
        # by group: the number of rows; by group and measure: the sum over
        # rows, and their number
        self._rows: Dict[str, int] = defaultdict(int)
        self._sums: Dict[str, Dict[str, Tensor]] = defaultdict(dict)
        # sums over rows with so many classes and answers
        self._classes: Dict[str, Tensor] = {}
        self._sizes: Optional[Tuple[int, int]] = None

    @torch.no_grad()
    def update(self, pair: LogitPair) -> None:
        """Add a pair of logits."""
        rows = [to_rows(logits) for logits in (pair.student, pair.teacher)]
        groups = {'all': slice(None), pair.name or 'head': slice(None)}
        labels = pair.labels()
        if labels is not None:
            labels, areas = labels.flatten(), pair.areas()
            groups.update(foreground=labels >= 0, background=labels == NONE)
            for size, (least, most) in SIZES.items():
                if areas is not None:
                    inside = (areas >= least) & (areas < most)
                    groups[size] = (labels >= 0) & inside.flatten()
        # Tokens of a text have no classes.
        number = pair.num_classes or rows[0].shape[1]
        scores = [class_scores(logits, number)
                  for logits in rows] if number > 1 else []
        answers = [answer.flatten() for answer in pair.answers()]
        for group, chosen in groups.items():
            self._add_group(
                group, pair,
                *([table[chosen] for table in tables]
                  for tables in (rows, scores, answers)))
        if pair.num_classes:
            self._add_classes(pair, rows, answers)

    def _add_group(self, group: str, pair: LogitPair, rows: List[Tensor],
                   scores: List[Tensor], answers: List[Tensor]) -> None:
        number = len(rows[0])
        if not number:
            return
        activations = pair.student_activation, pair.teacher_activation
        terms = {
            **kd_terms(*rows, self.tau, *activations),
            **dist_terms(*rows, self.tau, *activations)
        }
        values = {name: term / self.tau**2 for name, term in terms.items()}
        if pair.num_classes == 1:
            del values['inter']
        if answers:
            agree = answers[0] == answers[1]
            values['top-1 agreement'] = agree.float().mean()
        if scores:
            most = max(MOST_PAIRS // scores[0].shape[1]**2, 1)
            drawn = torch.randperm(
                number, generator=self._rng)[:min(self.num_ranked, most)]
            ranked = [table[drawn.to(table.device)] for table in scores]
            values['spearman'] = spearman(*ranked).mean()
            values['kendall'] = kendall(*ranked).mean()
        self._rows[group] += number
        sums = self._sums[group]
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + number * torch.tensor(
                [float(value), 1.], dtype=torch.float64)

    def _add_classes(self, pair: LogitPair, rows: List[Tensor],
                     answers: List[Tensor]) -> None:
        number = pair.num_answers
        self._sizes = self._sizes or (pair.num_classes, number)
        if self._sizes != (pair.num_classes, number):
            return  # another head, of other classes
        activations = pair.student_activation, pair.teacher_activation
        tables = [
            activate(logits / self.tau, activation)
            for logits, activation in zip(rows, activations)
        ]
        if pair.num_classes == 1 and pair.background:
            p, q = (table[:, :1].double() for table in tables)
        else:
            p, q = (
                class_scores(table, pair.num_classes).double()
                for table in tables)
        truth = pair.truth()
        if truth is None:
            truth = torch.full((len(p), ), NONE, device=p.device)
        known = truth.flatten() >= 0
        truth = truth.flatten()[known]
        answers = [answer[known] for answer in answers] or [truth, truth]
        right = [answer == truth for answer in answers]
        found = dict(
            rows=torch.tensor(len(p)),
            sums=torch.stack([p.sum(0), q.sum(0)]),
            squares=torch.stack([p.square().sum(0),
                                 q.square().sum(0)]),
            products=p.T @ q,
            labelled=truth.bincount(minlength=number),
            agree=truth[answers[0] == answers[1]].bincount(minlength=number),
            right=torch.stack(
                [truth[each].bincount(minlength=number) for each in right]),
            reliability=torch.stack([
                # how often one class is where it is predicted
                _bins(table[known].amax(1),
                      truth == 0 if pair.num_classes == 1 else each)
                for table, each in zip((p, q), right)
            ]))
        for name, value in found.items():
            before = self._classes.get(name, 0)
            self._classes[name] = before + value.double().cpu()

    def summary(self) -> Dict[str, Any]:
        """All measures, in lists and numbers.

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
            group:
            dict(
                rows=rows,
                **{
                    key:
                    float(self._sums[group][key][0] /
                          self._sums[group][key][1])
                    for key in MEASURES if key in self._sums[group]
                })
            for group, rows in self._rows.items()
        }
        measured = {key for group in groups.values() for key in group}
        left_out = [key for key in MEASURES if groups and key not in measured]
        found = self._classes
        if not found:
            return dict(groups=groups, left_out=left_out)
        correlation = _correlation(found)
        intra = 1 - correlation.diagonal()
        summary = dict(groups=groups, correlation=correlation.tolist())
        if not len(found['labelled']):
            return dict(
                summary,
                classes=[dict(intra=float(intra))],
                left_out=[*left_out, *JUDGEMENTS])
        number = found['labelled'].clamp(min=1)
        columns = dict(
            labelled=found['labelled'],
            student=found['right'][0] / number,
            teacher=found['right'][1] / number,
            agreement=found['agree'] / number,
            # The background's probability is what is left of one class.
            intra=intra.expand(len(number)))
        return dict(
            summary,
            classes=[
                dict(zip(columns, values))
                for values in zip(*(column.tolist()
                                    for column in columns.values()))
            ],
            reliability={
                model: _reliability(bins)
                for model, bins in zip(('student',
                                        'teacher'), found['reliability'])
            },
            left_out=left_out)


def _correlation(found: Dict[str, Tensor]) -> Tensor:
    """Pearson correlation of the student's column i and the teacher's j."""
    means = found['sums'] / found['rows']
    variances = found['squares'] / found['rows'] - means**2
    covariance = (
        found['products'] / found['rows'] - means[0][:, None] * means[1])
    # A deviation within rounding counts as none.
    deviations = variances.clamp(min=0).sqrt()
    deviations = deviations.where(deviations > 1e-7 * means, torch.inf)
    return covariance / (deviations[0][:, None] * deviations[1])


def _bins(confidence: Tensor, right: Tensor) -> Tensor:
    """Rows, summed confidences and right rows of each confidence bin."""
    confidence = confidence.clamp(0, 1)
    bins = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    return torch.stack([
        bins.bincount(weights, minlength=NUM_BINS)
        for weights in (torch.ones_like(confidence), confidence,
                        right.double())
    ])


def _reliability(bins: Tensor) -> Dict[str, Any]:
    rows, confidence, right = bins
    number = rows.clamp(min=1)
    gaps = (confidence - right).abs().sum() / rows.sum().clamp(min=1)
    return dict(
        rows=rows.tolist(),
        confidence=(confidence / number).tolist(),
        accuracy=(right / number).tolist(),
        error=float(gaps))
