"""Logits of any shape, dtype and magnitude, against NumPy in float64."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, log_expit, log_softmax, softmax

from mmdist.models.losses.functional import dist_terms, kd_terms, to_rows
from mmdist.models.losses.rule import activate

ACTIVATIONS = st.sampled_from(['softmax', 'sigmoid'])
DTYPES = st.sampled_from(
    [torch.float64, torch.float32, torch.float16, torch.bfloat16])
# No row, one row, one class, and pictures; ties, saturation and extremes.
SHAPES = st.one_of(
    st.tuples(st.integers(0, 12), st.integers(1, 9)),
    st.tuples(
        st.integers(0, 3), st.integers(1, 6), st.integers(0, 4),
        st.integers(1, 4)))
VALUES = st.one_of(
    st.sampled_from([0., 1., -1., 30., -30., 1e4, -1e4]),
    st.integers(-64, 64).map(lambda number: number / 8))
# The fixture sets the same way for every example.
settings.register_profile(
    'mmdist',
    deadline=None,
    derandomize=True,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile('mmdist')


@st.composite
def logits(draw):
    """Logits of student and teacher, of one shape and dtype."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    return [
        torch.from_numpy(draw(arrays(np.float64, shape,
                                     elements=VALUES))).to(dtype)
        for _ in range(2)
    ]


def table(tensor):
    """``(R, C)`` in float64."""
    rows = tensor.double().movedim(1, -1)
    return rows.reshape(-1, tensor.shape[1]).numpy()


def distance(x, y):
    """The mean over rows of one minus their correlation (paper, Eq. 5)."""
    x, y = (z - z.mean(1, keepdims=True) for z in (x, y))
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (1 - (x * y).sum(1) / (norms + 1e-8)).mean()


def divergence(student, teacher, activation):
    """The mean over rows of the KL divergence of like distributions."""
    if activation == 'softmax':
        log_s, log_t = log_softmax(student, 1), log_softmax(teacher, 1)
        return (np.exp(log_t) * (log_t - log_s)).sum(1).mean()
    return sum((np.exp(log_expit(sign * teacher)) *
                (log_expit(sign * teacher) - log_expit(sign * student))).sum()
               for sign in (1, -1)) / len(student)


def with_gradient(function, student, *args):
    """The terms as numbers, and the gradient of their sum."""
    student = student.clone().requires_grad_()
    terms = function(student, *args)
    gradient, = torch.autograd.grad(sum(terms.values()), student)
    return [float(term.detach()) for term in terms.values()], gradient


@given(logits(), ACTIVATIONS, ACTIVATIONS, st.sampled_from([1., 4.]))
def test_dist_is_its_formula(pair, of_student, of_teacher, tau):
    """To 1e-5 with float32 inside, 1e-7 with float64; always finite."""
    student, teacher = pair
    terms, gradient = with_gradient(dist_terms, student, teacher, tau,
                                    of_student, of_teacher)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape and gradient.isfinite().all()
    if student.numel() == 0:
        assert terms == [0, 0]
        return
    functions = dict(softmax=lambda rows: softmax(rows, 1), sigmoid=expit)
    p = functions[of_student](table(student) / tau)
    q = functions[of_teacher](table(teacher) / tau)
    bound = 1e-7 if student.dtype == torch.float64 else 1e-5
    expected = [distance(p, q), distance(p.T, q.T)]
    assert [term / tau**2 for term in terms] == pytest.approx(
        expected, abs=bound)


@given(logits(), ACTIVATIONS)
def test_kd_is_the_divergence(pair, activation):
    """To 1e-5 of its size; always finite."""
    student, teacher = pair
    terms, gradient = with_gradient(kd_terms, student, teacher, 1., activation)
    assert gradient.dtype == student.dtype
    assert gradient.shape == student.shape and gradient.isfinite().all()
    if student.numel() == 0:
        assert terms == [0]
        return
    expected = divergence(table(student), table(teacher), activation)
    assert terms == pytest.approx([expected], rel=1e-5, abs=1e-5)


@given(logits(), ACTIVATIONS)
def test_rows_have_no_order(pair, activation):
    """Neither relation knows which row came first."""
    student, teacher = (torch.from_numpy(table(logits)) for logits in pair)
    order = torch.arange(len(student)).flip(0)
    terms, gradient = with_gradient(dist_terms, student, teacher, 1.,
                                    activation)
    others, turned = with_gradient(dist_terms, student[order], teacher[order],
                                   1., activation)
    assert others == pytest.approx(terms, abs=1e-9)
    torch.testing.assert_close(turned, gradient[order], rtol=1e-6, atol=1e-9)


def formula(student, teacher, of_student, of_teacher, tau):
    """DIST as its authors write it, for autograd."""
    p, q = (activate(to_rows(x) / tau, activation)
            for x, activation in ((student, of_student), (teacher,
                                                          of_teacher)))
    return tau**2 * sum(1 - torch.cosine_similarity(
        *(x - x.mean(dim, keepdim=True) for x in (p, q)), dim, 0).mean()
                        for dim in (0, 1))


# Two or three numbers correlate almost fully: 1 - rho has few digits.
TABLES = st.one_of(
    st.tuples(st.integers(8, 40), st.integers(8, 20)),
    st.tuples(
        st.integers(2, 3), st.integers(8, 12), st.integers(2, 4),
        st.integers(2, 4)))


@given(TABLES, ACTIVATIONS, ACTIVATIONS, st.sampled_from([1., 4.]),
       st.sampled_from([0.3, 1., 4.]), st.integers(0, 2**20),
       st.sampled_from([torch.float32, torch.float64]))
def test_the_gradient_is_that_of_the_formula(way, shape, of_student,
                                             of_teacher, tau, scale, seed,
                                             dtype):
    """Of random logits, which have no rows or columns that nearly vary."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = (
        scale *
        torch.randn(2, *shape, generator=rng, dtype=torch.float64)).to(dtype)
    ours = with_gradient(dist_terms, student, teacher, tau, of_student,
                         of_teacher, 0.)[1]
    student = student.double().requires_grad_()
    expected, = torch.autograd.grad(
        formula(student, teacher.double(), of_student, of_teacher, tau),
        student)
    error = (ours.double() - expected).norm() / expected.norm()
    # Nearly uniform probabilities have few digits of what differs; tables as
    # small as these are only here computed in blocks, which are float32.
    bound = 1e-6 if way == 'whole' else 4e-6
    assert error < (1e-10 if dtype == torch.float64 else bound)
