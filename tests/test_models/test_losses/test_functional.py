"""The pure loss functions against NumPy, SciPy and torch.distributions."""
import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mmdist.models.losses.functional import (dist_terms, kd_terms, mimic_terms,
                                             pearson_distance, to_rows)

ACTIVATIONS = [('softmax', None), ('sigmoid', None), ('softmax', 'sigmoid'),
               ('sigmoid', 'softmax')]
FUNCTIONS = [dist_terms, kd_terms]
LOW_PRECISION = [torch.float16, torch.bfloat16]
EMPTY = [(0, 5), (0, 5, 4, 3), (2, 5, 0, 3)]
# float64 arithmetic of a hundred terms: far above round-off, far below any
# mistake
EXACT = dict(rtol=1e-12, atol=1e-12)


def logits(*shape, seed=0, scale=2., dtype=torch.float64):
    """Random logits that need a gradient."""
    generator = torch.Generator().manual_seed(seed)
    values = scale * torch.randn(*shape, generator=generator, dtype=dtype)
    return values.requires_grad_()


def gradient(loss, tensor):
    """The gradient of a loss or of the sum of its terms."""
    total = sum(loss.values()) if isinstance(loss, dict) else loss
    return torch.autograd.grad(total, tensor, retain_graph=True)[0]


def numpy_activate(rows, activation):
    """Probabilities by SciPy."""
    rows = rows.detach().numpy()
    return softmax(rows, 1) if activation == 'softmax' else expit(rows)


def numpy_dist(p_s, p_t):
    """Both relations of DIST by SciPy's correlation (without eps)."""
    inter = [1 - pearsonr(s, t)[0] for s, t in zip(p_s, p_t)]
    intra = [1 - pearsonr(s, t)[0] for s, t in zip(p_s.T, p_t.T)]
    return np.mean(inter), np.mean(intra)


@pytest.mark.parametrize('dim', [0, 1, -1])
def test_pearson_distance_is_one_minus_scipys_correlation(dim):
    """Every vector along ``dim`` is correlated as SciPy does it."""
    x, y = logits(6, 9), logits(6, 9, seed=1)
    ours = pearson_distance(x, y, dim=dim, eps=0.)
    pairs = zip(*(t.detach().movedim(dim, -1).numpy() for t in (x, y)))
    expected = [1 - pearsonr(a, b)[0] for a, b in pairs]
    np.testing.assert_allclose(ours.detach().numpy(), expected, **EXACT)


def test_pearson_distance_spans_zero_to_two():
    """0 for a positive affine relation, 1 without, 2 for a negative one."""
    x = torch.tensor([[1., 2., 3., 6.]], dtype=torch.float64)
    orthogonal = torch.tensor([[1., -1., 1., -1.]], dtype=torch.float64)
    orthogonal -= (orthogonal * (x - 3.)).sum() / ((x - 3.)**2).sum() * (
        x - 3.)
    for y, expected in ((3 * x + 7, 0.), (orthogonal, 1.), (-x, 2.)):
        distance = pearson_distance(x, y, eps=0.)
        torch.testing.assert_close(distance, x.new_tensor([expected]), **EXACT)


def test_pearson_distance_is_damped_by_eps_as_the_formula_says():
    """rho = sum(ab) / (|a||b| + eps), worked out by hand."""
    x = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
    # a = b = x, |a||b| = sum(ab) = 2e-8
    expected = x.new_tensor(1 - 2e-8 / (2e-8 + 1e-8))
    torch.testing.assert_close(
        pearson_distance(x, x, eps=1e-8), expected, **EXACT)


@pytest.mark.parametrize('eps', [1e-8, 0.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_constant_vector_has_distance_one_and_no_gradient(dtype, eps):
    """Also where only one side is constant, and eps is small or zero."""
    x = torch.full((2, 5), 0.1, dtype=dtype)
    x[1] = torch.arange(5)
    y = torch.stack([x[1], x[0]])
    x, y = x.requires_grad_(), y.requires_grad_()
    distance = pearson_distance(x, y, dim=1, eps=eps)
    assert distance.tolist() == [1., 1.]
    for grad in torch.autograd.grad(distance.sum(), (x, y)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('tau', [1., 4.])
def test_dist_terms_equal_scipy(activations, tau):
    """Each relation, with tau and with a teacher of another activation."""
    s, t = logits(7, 5), logits(7, 5, seed=1)
    ours = dist_terms(s, t, tau, *activations, eps=0.)
    p_s = numpy_activate(s / tau, activations[0])
    p_t = numpy_activate(t / tau, activations[1] or activations[0])
    expected = [tau**2 * term for term in numpy_dist(p_s, p_t)]
    actual = [ours['inter'].item(), ours['intra'].item()]
    np.testing.assert_allclose(actual, expected, **EXACT)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_dist_is_zero_for_identical_logits(activation):
    """Up to eps: probabilities of this spread have norms above 1e-2."""
    s = logits(40, 6)
    # 1 - p / (p + eps) < eps / p with p = |a||b| > 1e-4
    for term in dist_terms(s, s, 1., activation).values():
        assert 0 <= term.item() < 1e-4
    for term in dist_terms(s, s, 1., activation, eps=0.).values():
        assert abs(term.item()) < 1e-12


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_dist_but_not_kd_ignores_an_affine_transform(function, activation):
    """A positively scaled, shifted copy of the probabilities is no loss."""
    p = numpy_activate(logits(30, 4), activation)
    scaled = torch.from_numpy(0.5 * p + 0.125)  # softmax rows sum to 1 again
    to_logits = torch.log if activation == 'softmax' else torch.logit
    extra = dict(eps=0.) if function is dist_terms else {}
    terms = function(
        to_logits(scaled), to_logits(torch.from_numpy(p)), 1., activation,
        **extra)
    is_zero = [abs(term.item()) < 1e-12 for term in terms.values()]
    assert all(is_zero) if function is dist_terms else not any(is_zero)


def test_dist_decreases_along_its_gradient():
    """A small step against the gradient lowers the loss as predicted."""
    s, t = logits(20, 6), logits(20, 6, seed=1)
    loss = sum(dist_terms(s, t).values())
    grad = gradient(loss, s)
    step = 1e-4
    after = sum(dist_terms(s - step * grad, t).values())
    # first order; the error is of the order of the step
    torch.testing.assert_close(
        (loss - after) / step, grad.square().sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_a_student_without_variance_gets_no_gradient(activation):
    """A zero-initialised classifier: both terms are 1, nothing explodes."""
    s = torch.zeros(6, 4, requires_grad=True)
    terms = dist_terms(s, logits(6, 4, dtype=torch.float32), 1., activation)
    assert terms['inter'].item() == terms['intra'].item() == 1.
    assert torch.equal(gradient(terms, s), torch.zeros(6, 4))


def test_one_flat_row_leaves_the_gradient_of_the_others():
    """The flat row adds 1 / R to the inter term, and only that."""
    s, t = logits(4, 5), logits(4, 5, seed=1)
    with_flat = torch.cat([s, torch.zeros(1, 5, dtype=s.dtype)])
    t_all = torch.cat([t, t[:1]])
    inter = dist_terms(with_flat, t_all)['inter']
    alone = dist_terms(s, t)['inter']
    torch.testing.assert_close(inter, (4 * alone + 1) / 5, **EXACT)
    torch.testing.assert_close(
        gradient(inter, s),
        gradient(alone, s) * 4 / 5, **EXACT)


def test_one_class():
    """Softmax of one class is constant: both terms are 1 without gradient."""
    s = logits(8, 1)
    terms = dist_terms(s, logits(8, 1, seed=1))
    assert terms['inter'].item() == terms['intra'].item() == 1.
    assert not terms['inter'].requires_grad
    assert torch.equal(gradient(terms, s), torch.zeros_like(s))


def test_one_sigmoid_class_is_learnt_between_the_instances():
    """One column: no relation between classes, one between instances."""
    s, t = logits(8, 1), logits(8, 1, seed=1)
    terms = dist_terms(s, t, 1., 'sigmoid', eps=0.)
    expected = 1 - pearsonr(
        expit(s.detach().numpy()[:, 0]), expit(t.detach().numpy()[:, 0]))[0]
    assert terms['inter'].item() == 1.
    assert terms['intra'].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
def test_one_row_is_learnt_between_the_classes(activation):
    """One instance: the intra term is 1 and gives no gradient."""
    s, t = logits(1, 6), logits(1, 6, seed=1)
    terms = dist_terms(s, t, 1., activation)
    assert terms['intra'].item() == 1. and not terms['intra'].requires_grad
    assert gradient(terms['inter'], s).abs().max() > 0


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('shape', EMPTY)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_no_rows_give_a_zero_that_is_connected(function, shape, dtype):
    """Backward works and reaches what produced the empty logits."""
    weight = torch.ones((), dtype=dtype, requires_grad=True)
    s = torch.empty(shape, dtype=dtype, requires_grad=True)
    terms = function(s * weight, torch.empty(shape, dtype=dtype))
    total = sum(terms.values())
    assert total.item() == 0. and total.dtype == torch.float32
    total.backward()
    assert s.grad.shape == shape and weight.grad.item() == 0.


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('dtype', [torch.float32, *LOW_PRECISION])
def test_huge_logits_stay_finite(function, activations, dtype):
    """Logits of +-1e4, agreeing and disagreeing with the teacher's."""
    signs = torch.tensor([[1., -1., -1.], [-1., 1., 1.], [1., 1., -1.],
                          [-1., -1., -1.]])
    s = (1e4 * signs).to(dtype).requires_grad_()
    t = (1e4 * signs.roll(1, 0)).to(dtype)
    for teacher in (t, s.detach()):
        terms = function(s, teacher, 1., *activations)
        assert all(term.isfinite() for term in terms.values())
        assert gradient(terms, s).isfinite().all()


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('dtype', LOW_PRECISION)
def test_low_precision_logits_are_computed_in_float32(function, activations,
                                                      dtype):
    """The same as for those logits cast to float32 first, to the bit."""
    s = logits(50, 6, dtype=torch.float32).detach().to(dtype).requires_grad_()
    t = logits(50, 6, seed=1, dtype=torch.float32).detach().to(dtype)
    s32 = s.detach().float().requires_grad_()
    terms = function(s, t, 2., *activations)
    terms32 = function(s32, t.float(), 2., *activations)
    for name, term in terms.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, terms32[name])
    assert torch.equal(gradient(terms, s), gradient(terms32, s32).to(dtype))


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('shape', [(50, 6), (2, 6, 5, 4)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(function, activations, shape, dtype):
    """Inside and outside an autocast region the result is one and the same."""
    s = logits(*shape, dtype=torch.float32).detach().to(dtype).requires_grad_()
    t = logits(*shape, seed=1, dtype=torch.float32).detach().to(dtype)
    outside = function(s, t, 1., *activations)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = function(s, t, 1., *activations)
    for name, term in inside.items():
        assert term.dtype == torch.float32
        assert torch.equal(term, outside[name])
    assert torch.equal(gradient(inside, s), gradient(outside, s))


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('shape', [(4, 3), (2, 3, 2, 2)])
def test_gradcheck(function, activations, shape):
    """Analytical gradients equal numerical ones, at a temperature of 2.5."""
    t = logits(*shape, seed=1)

    def terms(s):
        return tuple(function(s, t, 2.5, *activations).values())

    assert torch.autograd.gradcheck(terms, (logits(*shape), ))


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('shape', [(3, 5, 4, 6), (3, 5, 7), (2, 5, 2, 3, 2)])
def test_every_position_of_every_picture_is_a_row(function, shape):
    """(N, C, *spatial) equals the rows picked out one by one."""
    s, t = logits(*shape), logits(*shape, seed=1)
    tables = []
    for tensor in (s, t):
        positions = np.ndindex(shape[0], *shape[2:])
        tables.append(
            torch.stack(
                [tensor[(n, slice(None), *at)] for n, *at in positions]))
    ours, expected = function(s, t), function(*tables)
    for name, term in ours.items():
        torch.testing.assert_close(term, expected[name], **EXACT)


def test_pictures_are_not_correlated_over_the_batch():
    """MMRazor's intra term correlates over N; with N = 1 it is constant."""
    s, t = logits(1, 4, 5, 6), logits(1, 4, 5, 6, seed=1)
    terms = dist_terms(s, t, eps=0.)
    p_s, p_t = (
        softmax(x.detach().numpy(), 1).transpose(0, 2, 3, 1).reshape(-1, 4)
        for x in (s, t))
    inter, intra = numpy_dist(p_s, p_t)
    np.testing.assert_allclose(terms['intra'].item(), intra, **EXACT)
    np.testing.assert_allclose(terms['inter'].item(), inter, **EXACT)
    assert abs(terms['intra'].item() - 1.) > 1e-3  # what N = 1 gives there
    assert gradient(terms['intra'], s).abs().max() > 1e-4


def test_dist_of_a_batch_differs_from_mmrazors():
    """With several pictures too, value by value of the look-alike."""
    s, t = logits(3, 4, 2, 2), logits(3, 4, 2, 2, seed=1)
    p_s, p_t = (softmax(x.detach().numpy(), 1) for x in (s, t))
    over_batch = [
        pearsonr(p_s[:, c, y, x], p_t[:, c, y, x])[0]
        for c, y, x in np.ndindex(4, 2, 2)
    ]
    intra = dist_terms(s, t)['intra'].item()
    assert abs(intra - (1 - np.mean(over_batch))) > 1e-2


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('shape', [(6, 4), (0, 4)])
def test_the_teacher_gets_no_gradient(function, shape):
    """Though its logits ask for one."""
    s, t = logits(*shape), logits(*shape, seed=1)
    sum(function(s, t).values()).backward()
    assert s.grad is not None and t.grad is None


@pytest.mark.parametrize('tau', [1., 4.])
def test_softmax_kd_equals_torch_distributions(tau):
    """tau^2 KL(teacher || student) of categoricals, mean over rows."""
    s, t = logits(9, 5), logits(9, 5, seed=1)
    divergence = kl_divergence(
        Categorical(logits=t / tau), Categorical(logits=s / tau))
    expected = tau**2 * divergence.mean()
    ours = kd_terms(s, t, tau)['kl']
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize('tau', [1., 4.])
def test_sigmoid_kd_equals_torch_distributions(tau):
    """Bernoulli divergences, summed over classes, mean over rows."""
    s, t = logits(9, 5), logits(9, 5, seed=1)
    divergence = kl_divergence(
        Bernoulli(logits=t / tau), Bernoulli(logits=s / tau))
    expected = tau**2 * divergence.sum(1).mean()
    ours = kd_terms(s, t, tau, 'sigmoid')['kl']
    torch.testing.assert_close(ours, expected, **EXACT)


def test_softmax_kd_of_a_sigmoid_teacher():
    """The teacher's probabilities are normalised to sum to 1."""
    s, t = logits(9, 5), logits(9, 5, seed=1)
    p_t = numpy_activate(t, 'sigmoid')
    p_t /= p_t.sum(1, keepdims=True)
    expected = rel_entr(p_t, numpy_activate(s, 'softmax')).sum(1).mean()
    ours = kd_terms(s, t, 1., 'softmax', 'sigmoid')['kl'].item()
    assert ours == pytest.approx(expected, rel=1e-12)


def test_sigmoid_kd_of_a_softmax_teacher():
    """One Bernoulli divergence a class, from the softmax probability."""
    s, t = logits(9, 5), logits(9, 5, seed=1)
    p_s, p_t = numpy_activate(s, 'sigmoid'), numpy_activate(t, 'softmax')
    both = rel_entr(p_t, p_s) + rel_entr(1 - p_t, 1 - p_s)
    ours = kd_terms(s, t, 1., 'sigmoid', 'softmax')['kl'].item()
    assert ours == pytest.approx(both.sum(1).mean(), rel=1e-12)


@pytest.mark.parametrize('activation', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('scale', [2., 1e3])
def test_kd_of_identical_logits_is_exactly_zero(activation, scale):
    """In float32, with a gradient of round-off only."""
    s = logits(30, 6, scale=scale, dtype=torch.float32)
    loss = kd_terms(s, s.detach(), 1., activation)['kl']
    assert loss.item() == 0.
    # (p - p) / R: a few units in the last place of a probability
    assert gradient(loss, s).abs().max() < 4 * torch.finfo(s.dtype).eps


def test_mimic_is_the_sum_of_the_levels_mean_squared_errors():
    """Worked out by hand: 4 on one level, 0.25 on the other."""
    student = [torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 1, 1)]
    teacher = [torch.full((1, 2, 2, 2), 2.), torch.full((1, 2, 1, 1), .5)]
    assert mimic_terms(student, teacher)['mimic'].item() == 4.25


def test_to_rows_refuses_a_vector():
    """One sentence with the shape."""
    with pytest.raises(ValueError, match=r'logits must be .*\(3,\)$'):
        to_rows(torch.zeros(3))


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('shape', [(4, 6), (0, 6), (4, 5, 1)])
def test_shapes_that_differ_are_refused(function, shape):
    """Also where broadcasting would have hidden it; both are named."""
    with pytest.raises(ValueError) as error:
        function(torch.zeros(4, 5), torch.zeros(shape))
    text = str(error.value)
    assert '(4, 5)' in text and str(shape) in text and '\n' not in text


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('tau', [0, -1., float('nan')])
def test_a_temperature_that_is_not_positive_is_refused(function, tau):
    """Terms would be nan, or teach the opposite."""
    with pytest.raises(ValueError, match=f'tau must be positive.* {tau}$'):
        function(torch.zeros(4, 5), torch.zeros(4, 5), tau)


@pytest.mark.parametrize('function', FUNCTIONS)
@pytest.mark.parametrize('activations', [('relu', None), ('softmax', 'tanh')])
def test_unknown_activation_is_refused(function, activations):
    """On either side; the message says what there is."""
    known = dict(
        dist_terms="'softmax', 'sigmoid' or 'none'",
        kd_terms="'softmax' or 'sigmoid'")[function.__name__]
    with pytest.raises(ValueError, match=known) as error:
        function(torch.zeros(4, 5), torch.zeros(4, 5), 1., *activations)
    assert any(repr(a) in str(error.value) for a in ('relu', 'tanh'))


@pytest.mark.parametrize('eps', [0., 1e-8])
def test_a_variance_too_small_for_float32_counts_as_none(eps):
    """Sigmoids of -60 differ by 1e-27: their squares are 0."""
    student = torch.linspace(-61, -59, 12).reshape(4, 3).requires_grad_()
    terms = dist_terms(
        student, torch.randn(4, 3), student_activation='sigmoid', eps=eps)
    assert terms['inter'] == terms['intra'] == 1
    sum(terms.values()).backward()
    assert student.grad.eq(0).all()


@pytest.mark.parametrize('terms', [dist_terms, kd_terms])
def test_a_vector_is_refused(terms):
    """By the shape that logits have."""
    with pytest.raises(ValueError, match=r'logits must be \(R, C\) or'):
        terms(torch.zeros(5), torch.zeros(5))


@pytest.mark.parametrize('shape, activations, inter, intra', [
    ((8, 1), ('sigmoid', None), False, True),
    ((8, 2), ('softmax', None), False, True),
    ((8, 2), ('softmax', 'sigmoid'), True, True),
    ((8, 2), ('sigmoid', None), True, True),
    ((8, 1), ('none', None), False, True),
    ((1, 6), ('softmax', None), True, False),
    ((1, 6, 1), ('sigmoid', None), True, False),
    ((2, 6), ('softmax', None), True, True),
    ((1, 1), ('softmax', None), False, False),
    ((0, 2), ('softmax', None), True, True),
])
def test_what_is_constant_by_design_has_no_gradient(shape, activations, inter,
                                                    intra):
    """Its value is there all the same; no rows stay connected."""
    s, t = logits(*shape), logits(*shape, seed=1)
    terms = dist_terms(s, t, 2., *activations)
    assert terms['inter'].requires_grad is inter
    assert terms['intra'].requires_grad is intra
    for term in terms.values():
        if term.requires_grad and s.numel():
            assert gradient(term, s).abs().max() > 0


def test_two_classes_rank_alike_or_not():
    """Their rows correlate by 1 or -1, which is what inter counts."""
    s = torch.tensor([[1., 0.], [0., 2.], [3., 0.], [0., 1.]]).double()
    inter = dist_terms(s, s[[0, 1, 3, 2]], eps=0.)['inter']
    assert inter.item() == pytest.approx(1., abs=1e-12)  # 2 in two of four


@pytest.mark.parametrize('shape', [(6, 5), (2, 5, 300, 100)])
@pytest.mark.parametrize('function', FUNCTIONS)
def test_a_teacher_in_inference_mode(function, shape):
    """The same numbers as without; also where all is in inference mode."""
    s = logits(*shape, dtype=torch.float32)
    with torch.inference_mode():
        t = logits(*shape, seed=1, dtype=torch.float32) * 1
        inside = function(t, t)
    assert t.is_inference() and inside == function(t, t)
    found = [function(s, teacher) for teacher in (t, t.clone())]
    assert found[0] == found[1]
    assert torch.equal(*(gradient(terms, s) for terms in found))


def test_features_of_a_teacher_in_inference_mode():
    """Mimic, too."""
    s = logits(2, 3, 4, 4)
    with torch.inference_mode():
        t = logits(2, 3, 4, 4, seed=1) * 1
    terms = mimic_terms([s], [t])
    expected = 2 * (s - t.clone()) / s.numel()
    torch.testing.assert_close(gradient(terms, s), expected)


@pytest.mark.parametrize('tau', [np.float32(2), np.int64(2), np.array(2.)])
@pytest.mark.parametrize('function', FUNCTIONS)
def test_a_temperature_of_numpy(function, tau):
    """It is a number like any other."""
    s, t = logits(6, 5), logits(6, 5, seed=1)
    assert function(s, t, tau) == function(s, t, 2.)


def test_the_formula_that_is_compiled_is_the_same(monkeypatch):
    """Terms and gradients, with a teacher of another activation."""
    s, t = logits(2, 6, 5, 4), logits(2, 6, 5, 4, seed=1)
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
        terms = dist_terms(s, t, 2., 'softmax', 'sigmoid')
        found.append([*terms.values(), gradient(terms, s)])
    torch.testing.assert_close(*found, **EXACT)
