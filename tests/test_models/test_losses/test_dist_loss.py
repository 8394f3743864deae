"""DISTLoss against the authors' code and as a registered module."""
import os.path as osp
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmdist.errors import ConfigError
from mmdist.models.losses import DISTLoss

CASES = range(8)


@pytest.fixture(scope='module')
def vectors(shared):
    """The cases that were computed with the authors' code in float64."""
    return np.load(osp.join(shared, 'vectors', 'dist_loss.npz'))


def build(**cfg):
    """Build as a model of MMDetection does."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='mmdist.DISTLoss', **cfg))


def test_the_vectors_are_all_covered(vectors):
    """No case of the file is left out below."""
    assert {f.partition('_')[0] for f in vectors.files} == set(map(str, CASES))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-10),
                                              (torch.float32, 1e-5)])
@pytest.mark.parametrize('case', CASES)
def test_value_and_gradient_equal_the_authors(vectors, case, dtype, tolerance):
    """The gradient is compared relative to its largest entry."""
    student, teacher = (
        torch.from_numpy(vectors[f'{case}_{side}']).to(dtype)
        for side in ('student', 'teacher'))
    student.requires_grad_()
    beta, gamma, tau, sigmoid = vectors[f'{case}_args'].tolist()
    activation = 'sigmoid' if sigmoid else 'softmax'
    loss = DISTLoss(beta, gamma, tau)(student, teacher, activation)
    loss.backward()
    assert loss.dtype == student.grad.dtype == dtype
    expected = vectors[f'{case}_loss'].item()
    assert loss.item() == pytest.approx(expected, rel=tolerance)
    grad = vectors[f'{case}_grad']
    error = np.abs(student.grad.numpy() - grad).max()
    assert error <= tolerance * np.abs(grad).max()


def test_terms_are_weighted_and_sum_to_forward():
    """beta goes to 'inter', gamma to 'intra', tau^2 to both."""
    torch.manual_seed(0)
    s, t = torch.randn(2, 9, 5, dtype=torch.float64)
    plain = DISTLoss(tau=3.).terms(s, t)
    loss = DISTLoss(beta=2., gamma=0.5, tau=3.)
    terms = loss.terms(s, t)
    assert list(terms) == ['inter', 'intra']
    assert terms['inter'].item() == 2 * plain['inter'].item()
    assert terms['intra'].item() == 0.5 * plain['intra'].item()
    assert loss(s, t).item() == sum(terms.values()).item()
    unscaled = DISTLoss().terms(s / 3, t / 3)
    # two orders of the same few products
    assert plain['inter'].item() == pytest.approx(
        9 * unscaled['inter'].item(), rel=1e-14)


@pytest.mark.parametrize('beta, gamma', [(0., 2.), (2., 0), (0, 0)])
def test_a_weight_of_zero_takes_its_term_out(beta, gamma):
    """The term is 0 and the gradient that of the rest, to the bit."""
    s, t = torch.randn(9, 5, requires_grad=True), torch.randn(9, 5)
    terms = DISTLoss(beta, gamma).terms(s, t)
    assert [term.item() == 0
            for term in terms.values()] == [beta == 0, gamma == 0]
    plain = DISTLoss().terms(s, t)
    rest = sum(2 * plain[name] for name in terms if terms[name] != 0)
    # beside a loss of the student's own, as in training
    ours, = torch.autograd.grad(s.square().sum() + sum(terms.values()), s)
    expected, = torch.autograd.grad(s.square().sum() + rest, s)
    assert torch.equal(ours, expected)


def test_default_scope_of_mmdet_finds_the_loss():
    """The defaults are the paper's for detection."""
    loss = build()
    assert type(loss) is DISTLoss
    assert (loss.beta, loss.gamma, loss.tau, loss.eps) == (1., 1., 1., 1e-8)


def test_it_has_no_parameters_and_no_state():
    """So it adds nothing to a checkpoint."""
    assert not build().state_dict() and not list(build().parameters())


@pytest.mark.parametrize('field, value', [
    ('beta', -1.),
    ('gamma', float('nan')),
    ('beta', float('inf')),
    ('gamma', '1'),
    ('beta', None),
    ('tau', 0),
    ('tau', -2.),
    ('tau', float('nan')),
    ('eps', -1e-8),
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
    with pytest.raises(TypeError, match="DISTLoss.*'betta'"):
        build(betta=2.)


@pytest.mark.parametrize('field', ['beta', 'gamma', 'tau', 'eps'])
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
