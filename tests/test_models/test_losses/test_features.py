"""DIST on feature maps: positions and channels, without an activation."""
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr

from mmdist.models.losses import DISTLoss
from mmdist.models.losses.functional import dist_terms


def features(*shape, seed=0, dtype=torch.float64):
    """Feature maps of student and teacher that agree in part."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, *shape, generator=rng, dtype=dtype)
    scale = 1 + torch.arange(shape[1], dtype=dtype).view(-1, 1, 1)
    return scale * student, scale * (student + teacher) + 5


def test_it_is_scipys_correlation():
    """Inter per position over the channels, intra per channel over all."""
    student, teacher = features(3, 8, 5, 4)
    terms = dist_terms(student, teacher, 1., 'none', eps=0.)
    tables = [
        x.movedim(1, -1).reshape(-1, 8).numpy() for x in (student, teacher)
    ]
    for name, (s, t) in dict(
            inter=tables, intra=[x.T for x in tables]).items():
        expected = 1 - np.mean([pearsonr(a, b)[0] for a, b in zip(s, t)])
        assert terms[name].item() == pytest.approx(expected, rel=1e-12)


def test_intra_is_pkds_loss():
    """PKD: half the mean squared error of maps that are normalised per
    channel, whose unbiased deviation makes it (M - 1) / M of ours."""
    student, teacher = features(2, 6, 7, 5)
    student.requires_grad_()
    normalised = [(x - x.mean((0, 2, 3), keepdim=True)) / x.std(
        (0, 2, 3), keepdim=True) for x in (student, teacher)]
    pkd = 0.5 * torch.nn.functional.mse_loss(*normalised)
    intra = dist_terms(student, teacher, 1., 'none', eps=0.)['intra']
    number = 2 * 7 * 5
    ours = (number - 1) / number * intra
    torch.testing.assert_close(ours, pkd, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(ours, student),
        torch.autograd.grad(pkd, student),
        rtol=1e-9,
        atol=1e-15)


def test_gradcheck():
    """With both terms and a temperature, which changes nothing but tau^2."""
    student, teacher = features(2, 4, 3, 2)

    def terms(x):
        return tuple(dist_terms(x, teacher, 2., 'none').values())

    assert torch.autograd.gradcheck(terms, student.requires_grad_())


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-6),
                                          (torch.bfloat16, 4e-3)])
def test_the_gradient_of_few_digits(dtype, bound):
    """That of float64, for channels of any scale beside one another."""
    student, teacher = (x.to(dtype) for x in features(2, 16, 20, 20))
    grads = []
    for x in (student, student.double()):
        x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
        terms = DISTLoss().terms(x, teacher.to(x.dtype), 'none')
        grads.append(torch.autograd.grad(sum(terms.values()), x)[0].double())
    assert (grads[0] - grads[1]).norm() < bound * grads[1].norm()


@pytest.mark.parametrize('scale', [0., 1e-30, 1e4, 1e18, 1e30])
def test_any_magnitude_is_finite(scale):
    """Also where squares overflow or vanish, and of constant features."""
    student = torch.randn(2, 8, 4, 4).clamp(-1, 1) * scale
    student.requires_grad_()
    for teacher in (torch.randn(2, 8, 4, 4), student.detach()):
        terms = dist_terms(student, teacher, 1., 'none')
        gradient, = torch.autograd.grad(sum(terms.values()), student)
        assert all(-1e-6 <= term <= 2 for term in terms.values())
        assert gradient.isfinite().all()
