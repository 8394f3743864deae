"""What is found of a pair, against numpy and arithmetic by hand."""
import numpy as np
import pytest
import torch

from mmdist.analysis import Discrepancy
from mmdist.analysis.discrepancy import SIZES
from mmdist.models.losses import DISTLoss, KDLoss
from mmdist.models.taps import LogitPair

R, C = 60, 4


def pair(rows=R, activation='softmax', background=0, anchors=1, seed=0):
    """Two models that agree in part, and what is right."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, C, (rows, ), generator=rng)
    columns = anchors * C + background
    noise, student, teacher = torch.randn(3, rows, columns, generator=rng)
    known = labels.clamp(min=0)[:, None]
    right = torch.zeros(rows, columns).scatter_(1, known, 2.)
    right[labels < 0] = 0
    return LogitPair(
        noise + student + right,
        noise + teacher + 2 * right,
        activation,
        activation,
        name='level 0',
        num_classes=C,
        labels=lambda: labels)


def found(*pairs, **options):
    discrepancy = Discrepancy(**options)
    for each in pairs:
        discrepancy.update(each)
    return discrepancy.summary()


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('tau', [1., 4.])
def test_groups_are_what_the_losses_would_be(activation, tau):
    """Of each group of rows alone, without the factor of tau squared."""
    each = pair(activation=activation, background=1)
    summary = found(each, tau=tau)['groups']
    labels = each.labels()
    chosen = dict(all=labels >= -1, foreground=labels >= 0)
    chosen.update({'background': labels < 0, 'level 0': labels >= -1})
    assert summary.keys() == chosen.keys()
    for group, rows in chosen.items():
        logits = each.student[rows], each.teacher[rows]
        terms = {
            **KDLoss(tau=tau).terms(*logits, activation),
            **DISTLoss(tau=tau).terms(*logits, activation)
        }
        assert summary[group]['rows'] == int(rows.sum())
        for name, term in terms.items():
            assert summary[group][name] == pytest.approx(
                float(term) / tau**2, rel=1e-5)


def test_objects_are_grouped_by_the_size_of_their_boxes():
    """At 32 and 96 pixels; rows without an object have no size."""
    each = pair(8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1, -1])
    areas = torch.tensor([0, 1023, 1024, 9215, 9216, 10**6, 5, 5000])
    each.labels, each.areas = lambda: labels, lambda: areas
    groups = found(each)['groups']
    rows = {name: groups[name]['rows'] for name in SIZES}
    assert rows == dict(small=2, medium=2, large=2)
    agree = each.student[2:4].argmax(1) == each.teacher[2:4].argmax(1)
    assert groups['medium']['top-1 agreement'] == agree.float().mean()


def test_batches_are_weighted_by_their_rows():
    one, other = pair(20), pair(40, seed=1)
    both = found(one, other)['groups']['all']
    apart = [found(each)['groups']['all'] for each in (one, other)]
    for name in ('kl', 'inter', 'intra', 'top-1 agreement'):
        mean = (20 * apart[0][name] + 40 * apart[1][name]) / 60
        assert both[name] == pytest.approx(mean)


def test_classes_are_numpys():
    """Accuracy, agreement and correlations, over two batches."""
    pairs = pair(40), pair(30, seed=1)
    summary = found(*pairs)
    labels = np.concatenate([p.labels().numpy() for p in pairs])
    logits = [
        np.concatenate([getattr(p, side).numpy() for p in pairs])
        for side in ('student', 'teacher')
    ]
    p, q = (torch.from_numpy(x).softmax(1).double().numpy() for x in logits)
    expected = np.corrcoef(p.T, q.T)[:C, C:]
    np.testing.assert_allclose(summary['correlation'], expected, atol=1e-5)
    for label, row in enumerate(summary['classes']):
        chosen = labels == label
        said = [x[chosen].argmax(1) for x in logits]
        assert row['labelled'] == chosen.sum()
        assert row['student'] == pytest.approx(np.mean(said[0] == label))
        assert row['teacher'] == pytest.approx(np.mean(said[1] == label))
        assert row['agreement'] == pytest.approx(np.mean(said[0] == said[1]))
        assert row['intra'] == pytest.approx(
            1 - expected[label, label], abs=1e-5)


def test_reliability_by_hand():
    """Three rows of two classes: confidences 0.95, 0.95 and 0.55."""
    p = torch.tensor([[0.95, 0.05], [0.05, 0.95], [0.55, 0.45]])
    labels = torch.tensor([0, 0, 0])
    each = LogitPair(p.log(), p.log(), num_classes=2, labels=lambda: labels)
    student = found(each)['reliability']['student']
    assert student['rows'] == [0, 0, 0, 0, 0, 1, 0, 0, 0, 2]
    assert student['confidence'][9] == pytest.approx(0.95)
    assert student['accuracy'][9] == 0.5 and student['accuracy'][5] == 1
    assert student['error'] == pytest.approx(
        (abs(1.9 - 1) + abs(0.55 - 1)) / 3)


def test_an_identical_teacher_is_at_no_distance():
    each = pair()
    summary = found(
        LogitPair(
            each.student, each.student, num_classes=C, labels=each.labels))
    whole = summary['groups']['all']
    for name in ('kl', 'inter', 'intra'):
        assert whole[name] == pytest.approx(0, abs=1e-6)
    for name in ('spearman', 'kendall', 'top-1 agreement'):
        assert whole[name] == pytest.approx(1)


def test_the_best_of_several_anchors_speaks():
    each = pair(anchors=3, activation='sigmoid')
    best = [x.view(R, 3, C).amax(1) for x in (each.student, each.teacher)]
    agreement = (best[0].argmax(1) == best[1].argmax(1)).float().mean()
    summary = found(each)
    assert summary['groups']['all']['top-1 agreement'] == pytest.approx(
        float(agreement))
    assert len(summary['classes']) == C


def test_what_has_no_labels_or_rows_is_counted_too():
    nothing = LogitPair(torch.zeros(0, C), torch.zeros(0, C), num_classes=C)
    summary = found(
        nothing,
        LogitPair(torch.randn(5, C), torch.randn(5, C), num_classes=C))
    assert summary['groups']['all']['rows'] == 5
    assert 'foreground' not in summary['groups']
    assert all(row['labelled'] == 0 for row in summary['classes'])


ONE_CLASS = torch.tensor([[0.93, 0.2], [0.42, 0.7], [0.55, 0.45], [0.12, 0.95],
                          [0.99, 0.99]])


def one_class(background=False, thresholds=(0.3, 0.6)):
    """Five rows: two with the class, two without, and one unknown."""
    logits = ONE_CLASS.logit()[..., None]
    if background:  # a softmax of the same probabilities
        logits = torch.cat([logits, torch.zeros_like(logits)], -1)
    activation = 'softmax' if background else 'sigmoid'
    labels = torch.tensor([0, 0, -1, -1, -2])
    return LogitPair(
        logits[:, 0],
        logits[:, 1],
        activation,
        activation,
        num_classes=1,
        labels=lambda: labels,
        background=background,
        thresholds=thresholds)


@pytest.mark.parametrize('background, agreement, expected', [
    (False, 0.4, [(1, 0.5, 0.5), (0.5, 0.5, 0)]),
    (True, 0.2, [(0.5, 0.5, 0), (0.5, 0.5, 0)]),
])
def test_one_class_is_there_or_not(background, agreement, expected):
    """By each head's threshold, or by the background's column."""
    summary = found(one_class(background))
    groups = summary['groups']
    assert {
        name: group['rows']
        for name, group in groups.items()
    } == {
        'all': 5,
        'head': 5,
        'foreground': 2,
        'background': 2
    }
    assert groups['all']['top-1 agreement'] == pytest.approx(agreement)
    rows = [(row['student'], row['teacher'], row['agreement'])
            for row in summary['classes']]
    assert rows == expected
    assert [row['labelled'] for row in summary['classes']] == [2, 2]
    student, teacher = ONE_CLASS.double().T
    assert summary['correlation'][0][0] == pytest.approx(
        np.corrcoef(student, teacher)[0, 1], abs=1e-5)
    reliability = summary['reliability']['student']
    assert reliability['rows'] == [0, 1, 0, 0, 1, 1, 0, 0, 0, 1]
    assert reliability['error'] == pytest.approx(
        (0.07 + 0.58 + 0.55 + 0.12) / 4, abs=1e-5)


def test_what_means_nothing_for_one_class_is_named():
    """Ranks and relations of one class; more without a threshold."""
    summary = found(one_class())
    assert summary['left_out'] == ['inter', 'spearman', 'kendall']
    assert summary['groups']['all'].keys() == {
        'rows', 'kl', 'intra', 'top-1 agreement'
    }
    summary = found(one_class(thresholds=None))
    assert summary['left_out'] == [
        'inter', 'spearman', 'kendall', 'top-1 agreement', 'accuracy',
        'calibration'
    ]
    assert 'reliability' not in summary
    row, = summary['classes']
    assert row == dict(
        intra=pytest.approx(1 - summary['correlation'][0][0], abs=1e-9))
    assert found(pair())['left_out'] == []


def test_a_row_of_several_anchors_has_one_class_if_one_says_it():
    """The best anchor of a location."""
    logits = torch.tensor([[-3., 2.], [-3., -2.]])
    summary = found(
        LogitPair(
            logits,
            logits.flip(0),
            'sigmoid',
            'sigmoid',
            num_classes=1,
            labels=lambda: torch.tensor([0, -1]),
            thresholds=(0.5, 0.5)))
    assert [(row['student'], row['teacher'])
            for row in summary['classes']] == [(1, 0), (1, 0)]
