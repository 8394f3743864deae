"""KDLoss as a registered module; its divergences are tested beside it."""
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch.distributions import Bernoulli, Categorical, kl_divergence

from mmdist.errors import ConfigError
from mmdist.models.losses import KDLoss


def build(**cfg):
    """Build as a model of MMDetection does."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='mmdist.KDLoss', **cfg))


def test_a_worked_example():
    """KL of (1/2, 1/2) from (1/4, 3/4): ln 2 - ln(3) / 2."""
    s = torch.tensor([[1., 3.]], dtype=torch.float64).log()
    t = torch.zeros(1, 2, dtype=torch.float64)
    # log(1/2 / 1/4) / 2 + log(1/2 / 3/4) / 2
    expected = (torch.tensor(4. / 3, dtype=torch.float64)).log() / 2
    torch.testing.assert_close(KDLoss()(s, t), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize('activation, distribution', [
    ('softmax', Categorical),
    ('sigmoid', Bernoulli),
])
def test_pictures_equal_torch_distributions(activation, distribution):
    """(N, C, H, W) in float32, with the weight and tau^2."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 2, 5, 3, 4)
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 5).double() / 4 for x in (t, s)]
    divergence = kl_divergence(*(distribution(logits=x) for x in rows))
    expected = 0.5 * 16 * divergence.sum() / 24
    loss = KDLoss(tau=4., loss_weight=0.5)(s, t, activation)
    # float32 arithmetic of 120 terms
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


ACTIVATIONS = [('softmax', 'softmax'), ('sigmoid', 'sigmoid'),
               ('softmax', 'sigmoid'), ('sigmoid', 'softmax')]


@pytest.mark.parametrize('shape', [(30, 7), (2, 5, 3, 4), (2, 3, 41)])
@pytest.mark.parametrize('student, teacher', ACTIVATIONS)
def test_the_gradient_is_that_of_the_value(shape, student, teacher):
    """By finite differences, in float64."""
    torch.manual_seed(0)
    s, t = torch.randn(2, *shape, dtype=torch.float64)
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: KDLoss(tau=2.)(s, t, student, teacher), s)


@pytest.mark.parametrize('student, teacher', ACTIVATIONS)
def test_it_compiles_whole(student, teacher):
    """No graph break, and the same numbers."""
    loss = KDLoss(tau=2.)
    s, t = torch.randn(2, 2, 5, 3, 4)
    s.requires_grad_()
    compiled = torch.compile(
        lambda s, t: loss(s, t, student, teacher),
        fullgraph=True,
        backend='aot_eager')
    results = []
    for function in (lambda s, t: loss(s, t, student, teacher), compiled):
        value = function(s, t)
        results.append((value, *torch.autograd.grad(value, s)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('compiling', [False, True])
@pytest.mark.parametrize('student', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('teacher', ['softmax', 'sigmoid'])
def test_a_masked_class_counts_for_nothing(compiling, student, teacher,
                                           monkeypatch):
    """Logits of -inf, as texts that an image does not have: as without."""
    monkeypatch.setattr(torch.compiler, 'is_compiling', lambda: compiling)
    torch.manual_seed(0)
    s, t = torch.randn(2, 30, 4, dtype=torch.float64)
    found = []
    for masked in (False, True):
        rows = s.clone().requires_grad_()
        mask = torch.full((30, masked), float('-inf'), dtype=rows.dtype)
        loss = KDLoss(tau=2.)(*(torch.cat([x, mask], 1) for x in (rows, t)),
                              student, teacher)
        found.append((loss.detach(), *torch.autograd.grad(loss, rows)))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('student, teacher', ACTIVATIONS)
def test_the_second_derivative_is_right(student, teacher):
    """By finite differences, in float64."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 6, 4, dtype=torch.float64)
    s.requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda s: KDLoss(tau=2.)(s, t, student, teacher), s)


def test_terms_sum_to_forward():
    """There is one term, 'kl', weighted."""
    s, t = torch.randn(2, 6, 5)
    loss = KDLoss(loss_weight=3.)
    terms = loss.terms(s, t)
    assert list(terms) == ['kl']
    assert terms['kl'].item() == loss(s, t).item() == pytest.approx(
        3 * KDLoss()(s, t).item(), rel=1e-6)


def test_default_scope_of_mmdet_finds_the_loss():
    """And its defaults are tau = 1 and weight 1."""
    loss = build()
    assert type(loss) is KDLoss and (loss.tau, loss.loss_weight) == (1., 1.)
    assert not loss.state_dict()


@pytest.mark.parametrize('field, value', [
    ('loss_weight', -1.),
    ('loss_weight', float('nan')),
    ('tau', 0.),
    ('tau', '4'),
])
def test_a_value_out_of_range_is_refused(field, value):
    """One sentence that names the field and the value."""
    with pytest.raises(ConfigError) as error:
        build(**{field: value})
    assert error.value.field == field and repr(value) in error.value.problem
    text = str(error.value)
    assert '\n' not in text and '. ' not in text


def test_an_unknown_key_is_refused():
    """A typo in a config does not pass."""
    with pytest.raises(TypeError, match="KDLoss.*'beta'"):
        build(beta=2.)


@pytest.mark.parametrize('field', ['loss_weight', 'tau'])
@pytest.mark.parametrize('value', [
    np.float32(0.5),
    np.float16(0.5),
    np.int64(2),
    np.array(2),
    torch.tensor(2.),
    Fraction(1, 2), True
])
def test_any_kind_of_number_is_one(field, value):
    """NumPy scalars, arrays without dimensions, and real numbers."""
    number = getattr(build(**{field: value}), field)
    assert type(number) is float and number == value


@pytest.mark.parametrize(
    'value',
    [np.float32('nan'),
     np.array([1.]),
     np.array('1'),
     np.complex64(1), 1j])
def test_no_number_is_none(value):
    """Not finite, with dimensions, or not real."""
    with pytest.raises(ConfigError) as error:
        build(tau=value)
    assert error.value.field == 'tau'
