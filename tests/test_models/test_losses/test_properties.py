"""Logits of any shape, dtype and magnitude, against NumPy in float64."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, log_expit, log_softmax, softmax

from mmdist.models.losses import DISTLoss, KDLoss, MimicLoss
from mmdist.models.losses.formula import activate
from mmdist.models.losses.functional import (dist_terms, kd_terms, mimic_terms,
                                             to_rows)

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
    total = sum(terms.values())
    if total.requires_grad:
        gradient, = torch.autograd.grad(total, student)
    else:  # rows and columns of one or two numbers
        gradient = torch.zeros_like(student)
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


# Of every order of magnitude that float32 has, and most that squares have.
MAGNITUDES = st.one_of(
    st.sampled_from([0., 1e-30, -1e-30, 1e30, -1e30]),
    st.tuples(st.floats(-10, 10),
              st.integers(-30,
                          29)).map(lambda parts: parts[0] * 10.**parts[1]))
FEW = settings(max_examples=60)
LARGEST = 1e30


@st.composite
def extremes(draw, number=2):
    """Tensors of one shape and dtype, of any magnitude; some are constant."""
    shape, dtype = draw(SHAPES), draw(DTYPES)
    tensors = [
        torch.from_numpy(draw(arrays(np.float64, shape, elements=MAGNITUDES)))
        for _ in range(number)
    ]
    largest = torch.finfo(dtype).max
    return [limited(tensor, largest).to(dtype) for tensor in tensors]


def limited(tensor, bound):
    """No larger than a bound that the dtype may not have."""
    bound = min(bound, torch.finfo(tensor.dtype).max)
    return tensor.clamp(-bound, bound)


def wide(tensor):
    """In the precision that losses are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def assert_sane(function, student, *args):
    """Terms and gradients are numbers; those of half precision are float32's,
    rounded, which may be too large for it. Returns the terms."""
    with torch.autograd.detect_anomaly():
        terms, gradient = with_gradient(function, student, *args)
        others, exact = with_gradient(function, wide(student), *args)
    assert np.isfinite(terms).all() and terms == others
    assert exact.isfinite().all()
    assert gradient.dtype == student.dtype
    assert torch.equal(gradient, exact.to(student.dtype))
    return terms


@given(extremes(), ACTIVATIONS, ACTIVATIONS, st.sampled_from([0.1, 1., 4.]),
       st.sampled_from([0., 0.5, 3.]), st.sampled_from([0.5, 3.]))
@FEW
def test_dist_of_any_magnitude(way, pair, of_student, of_teacher, tau, beta,
                               gamma):
    """Finite, and from 0 to twice the weight, where the correlation is -1."""
    student, teacher = (limited(x, LARGEST) for x in pair)
    loss = DISTLoss(beta, gamma, tau)
    terms = assert_sane(loss.terms, student, teacher, of_student, of_teacher)
    for term, weight in zip(terms, (beta, gamma)):
        rounding = 1e-5 * weight * tau**2
        assert -rounding <= term <= 2 * weight * tau**2 + rounding


@given(extremes(), ACTIVATIONS, ACTIVATIONS, st.sampled_from([0.1, 1., 4.]),
       st.sampled_from([0.5, 3.]))
@FEW
def test_kd_of_any_magnitude(pair, of_student, of_teacher, tau, weight):
    """Finite, and a divergence is never negative."""
    loss = KDLoss(tau, weight)
    kl, = assert_sane(loss.terms, *pair, of_student, of_teacher)
    assert kl >= -1e-5 * weight * tau**2


@given(extremes(1), ACTIVATIONS)
@FEW
def test_kd_of_oneself_is_nothing(same, activation):
    """Exactly, whatever the magnitude; so is the gradient but for rounding."""
    terms, gradient = with_gradient(kd_terms, *same, *same, 1., activation)
    assert terms == [0] and gradient.abs().sum() < 1e-4


@given(TABLES, ACTIVATIONS, st.sampled_from([0.5, 4.]), st.integers(0, 2**20))
@FEW
def test_dist_of_oneself_is_nothing(shape, activation, scale, seed):
    """Where nothing is constant, and without an eps that damps."""
    rng = torch.Generator().manual_seed(seed)
    same = scale * torch.randn(*shape, generator=rng, dtype=torch.float64)
    terms, gradient = with_gradient(dist_terms, same, same, 1., activation,
                                    activation, 0.)
    assert terms == pytest.approx([0, 0], abs=1e-9)
    assert gradient.abs().max() < 1e-7


TERMS = pytest.mark.parametrize('terms_of', [dist_terms, kd_terms])


def numbers(terms):
    return pytest.approx([float(term) for term in terms.values()],
                         rel=1e-6,
                         abs=1e-6)


@TERMS
@given(logits(), ACTIVATIONS, ACTIVATIONS, st.randoms(use_true_random=False))
@FEW
def test_neither_rows_nor_classes_have_an_order(terms_of, pair, of_student,
                                                of_teacher, rng):
    """Both models' rows, and both models' classes, may be in any order."""
    rows = [torch.from_numpy(table(x)) for x in pair]
    orders = [rng.sample(range(n), n) for n in rows[0].shape]
    mixed = [x[orders[0]][:, orders[1]] for x in rows]
    activations = 1., of_student, of_teacher
    assert list(terms_of(*mixed, *activations).values()) == numbers(
        terms_of(*rows, *activations))


@TERMS
@given(logits(), st.integers(-64, 64))
@FEW
def test_a_number_added_to_a_row_is_nothing_to_softmax(terms_of, pair, shift):
    """Another number for each row, of either model."""
    rows = [torch.from_numpy(table(x)) for x in pair]
    added = shift / 8 * torch.arange(len(rows[0])).double()[:, None]
    expected = numbers(terms_of(*rows))
    assert list(terms_of(rows[0] + added, rows[1]).values()) == expected
    assert list(terms_of(rows[0], rows[1] - added).values()) == expected


@TERMS
@given(logits(), ACTIVATIONS, ACTIVATIONS, st.sampled_from([0.5, 2., 4.]))
@FEW
def test_the_temperature_divides_and_multiplies(terms_of, pair, of_student,
                                                of_teacher, tau):
    """Logits are divided by it, terms multiplied by its square."""
    student, teacher = (x.double() for x in pair)
    cool = terms_of(student / tau, teacher / tau, 1., of_student, of_teacher)
    warm = terms_of(student, teacher, tau, of_student, of_teacher)
    assert [float(x) / tau**2 for x in warm.values()] == numbers(cool)


@given(logits(), ACTIVATIONS, ACTIVATIONS)
@FEW
def test_dist_is_symmetric(pair, of_student, of_teacher):
    """A correlation does not know who teaches; a divergence does."""
    student, teacher = (x.double() for x in pair)
    one = dist_terms(student, teacher, 1., of_student, of_teacher)
    other = dist_terms(teacher, student, 1., of_teacher, of_student)
    assert list(one.values()) == numbers(other)


def maps(tensor):
    """``(N, C, H, W)`` features; squares of float32 end at 1e38."""
    if tensor.dim() == 2:
        tensor = tensor[..., None, None]
    return limited(tensor, 1e18)


@given(extremes())
@FEW
def test_mimic_of_any_magnitude(pair):
    """Finite, and the mean squared error of the level."""
    student, teacher = map(maps, pair)
    error, = assert_sane(lambda s, t: mimic_terms([s], [t]), student, teacher)
    if not student.numel():
        assert error == 0
        return
    difference = wide(student) - wide(teacher)
    expected = np.square(difference.double().numpy()).mean()
    assert error == pytest.approx(expected, rel=1e-5, abs=1e-30)


@given(
    st.lists(st.tuples(*[st.integers(1, 4)] * 5), min_size=1, max_size=3),
    st.sampled_from([0., 1., 2.5]), st.sampled_from([1e-15, 1., 1e9]),
    st.integers(0, 2**20))
@FEW
def test_mimic_of_any_pyramid(shapes, weight, scale, seed):
    """Levels add up, and the projections have finite gradients."""
    torch.manual_seed(seed)
    loss = MimicLoss(*zip(*((s, t) for s, t, *_ in shapes)), weight)
    student = [scale * torch.randn(n, c, h, w) for c, _, n, h, w in shapes]
    teacher = [scale * torch.randn(n, c, h, w) for _, c, n, h, w in shapes]
    with torch.autograd.detect_anomaly():
        total = loss(student, teacher)
        total.backward()
    errors = [(project(s) - t).square().mean()
              for project, s, t in zip(loss.projections, student, teacher)]
    torch.testing.assert_close(total, weight * sum(errors), rtol=1e-5, atol=0)
    assert all(p.grad.isfinite().all() for p in loss.parameters())
