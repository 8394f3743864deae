"""Columns of the teacher beside those of the student."""
import pytest
import torch

from mmdist.models.taps.columns import (Columns, as_columns_of, class_log_odds,
                                        class_probabilities)

SIGMOID = Columns(3, 'sigmoid', False)
SIGMOID_AND_NOTHING = Columns(3, 'sigmoid', True)
SOFTMAX = Columns(3, 'softmax', True)
PIXELS = Columns(3, 'softmax', False)
ALL = (SIGMOID, SIGMOID_AND_NOTHING, SOFTMAX, PIXELS)


def logits(columns, scale=2.):
    """Random logits of five rows, in float64."""
    rng = torch.Generator().manual_seed(0)
    shape = (5, columns.number)
    return scale * torch.randn(shape, generator=rng, dtype=torch.float64)


def activate(table, activation):
    """Probabilities, written out."""
    if activation == 'sigmoid':
        return 1 / (1 + (-table).exp())
    return table.exp() / table.exp().sum(1, keepdim=True)


@pytest.mark.parametrize('student', ALL)
@pytest.mark.parametrize('teacher', ALL)
def test_any_columns_beside_any_others(student, teacher):
    """Class probabilities are the teacher's, normalised beside a softmax."""
    table = logits(teacher)
    ours, activation = as_columns_of(student, teacher, table)
    assert ours.shape == (5, student.number)
    p = activate(table, teacher.activation)
    probabilities = activate(ours.double(), activation)
    if student.background == teacher.background:
        torch.testing.assert_close(probabilities, p)
        return
    classes = p[:, :3]
    if student.background:
        classes = torch.cat([classes, 1 - classes.amax(1, keepdim=True)], 1)
    if activation == 'softmax':
        classes = classes / classes.sum(1, keepdim=True)
    # 1e-6 keeps the logarithms finite
    torch.testing.assert_close(probabilities, classes, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize('student', ALL)
@pytest.mark.parametrize('teacher', ALL)
def test_certain_teachers_stay_finite(student, teacher):
    """Probabilities of 0 and 1 have no infinite logit."""
    for extreme in (logits(teacher, 1e4), torch.zeros(5, teacher.number)):
        ours, activation = as_columns_of(student, teacher, extreme.float())
        assert activate(ours.clamp(-80, 80), activation).isfinite().all()
        assert ours.isfinite().all()


@pytest.mark.parametrize('student', [
    Columns(2, 'softmax', True),
    Columns(2, 'sigmoid', False),
])
def test_other_classes_belong_to_the_background(student):
    """Two of three classes in another order keep their probabilities."""
    table = logits(SOFTMAX, 4.)
    ours, activation = as_columns_of(student, SOFTMAX, table, [2, 0])
    p = activate(table, 'softmax')
    expected = torch.stack([p[:, 2], p[:, 0], p[:, 1] + p[:, 3]], dim=1)
    torch.testing.assert_close(
        activate(ours.double(), activation),
        expected[:, :student.number],
        rtol=1e-5,
        atol=2e-6)


def test_chosen_classes_are_renormalised_without_a_background():
    """Every pixel has a class."""
    student = Columns(2, 'softmax', False)
    ours, activation = as_columns_of(student, PIXELS, logits(PIXELS), [2, 0])
    p = activate(logits(PIXELS), 'softmax')[:, [2, 0]]
    torch.testing.assert_close(
        activate(ours, activation), p / p.sum(1, keepdim=True))


def test_sigmoids_of_chosen_classes_are_the_teachers():
    """Independent classes need no normalisation."""
    ours, activation = as_columns_of(
        Columns(2, 'sigmoid', False), SIGMOID, logits(SIGMOID), [1, 2])
    assert torch.equal(ours, logits(SIGMOID)[:, 1:])
    assert activation == 'sigmoid'


@pytest.mark.parametrize('columns', ALL)
def test_class_log_odds_carry_the_gradient(columns):
    """Their sigmoid is the probability; the student learns through them."""
    table = logits(columns).requires_grad_()
    odds = class_log_odds(table, columns)
    assert odds.shape == (5, 3)
    p = activate(table, columns.activation)[:, :3]
    torch.testing.assert_close(
        odds.sigmoid().double(), p, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(
        class_probabilities(table, columns).double(), p, rtol=1e-5, atol=1e-6)
    odds.sum().backward()
    assert (table.grad[:, :3] != 0).all()
