"""MimicLoss: projected feature levels, by hand."""
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from mmdist.errors import ConfigError
from mmdist.models.losses import MimicLoss

STUDENT, TEACHER = (2, 3), (4, 5)


def build(**cfg):
    """Build as a model of MMDetection does."""
    cfg = dict(student_channels=STUDENT, teacher_channels=TEACHER, **cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(dict(type='mmdist.MimicLoss', **cfg))


def pyramid(channels, seed=0):
    """Feature levels that need a gradient."""
    torch.manual_seed(seed)
    return [
        torch.randn(2, c, 8 // 2**i, 6 // 2**i, requires_grad=True)
        for i, c in enumerate(channels)
    ]


def by_hand(loss, student, teacher):
    """A matrix product a level, then the mean squared error, in NumPy."""
    total = 0.
    for conv, s, t in zip(loss.projections, student, teacher):
        weight, bias = (p.detach().double().numpy() for p in conv.parameters())
        s, t = (x.detach().double().numpy() for x in (s, t))
        projected = np.einsum('tc,nchw->nthw', weight[:, :, 0, 0], s)
        total += np.mean((projected + bias[:, None, None] - t)**2)
    return total


def test_it_is_the_projected_mean_squared_error():
    """Summed over the levels and multiplied by the weight."""
    loss = build(loss_weight=0.5)
    student, teacher = pyramid(STUDENT), pyramid(TEACHER, 1)
    expected = 0.5 * by_hand(loss, student, teacher)
    # float32 arithmetic of a few hundred terms
    assert loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert loss.terms(student, teacher).keys() == {'mimic'}


def test_projections_and_student_learn_and_the_teacher_does_not():
    """The gradients reach each level and its convolution."""
    loss, student = build(), pyramid(STUDENT)
    teacher = pyramid(TEACHER, 1)
    loss(student, teacher).backward()
    for tensor in (*student, *loss.parameters()):
        assert tensor.grad.abs().max() > 0
    assert all(level.grad is None for level in teacher)
    assert len(list(loss.parameters())) == 4  # two 1x1 convs with bias


def test_a_perfect_projection_gives_zero():
    """What the student can express exactly costs nothing."""
    loss, student = build(), pyramid(STUDENT)
    teacher = [conv(x) for conv, x in zip(loss.projections, student)]
    assert loss(student, teacher).item() == 0.


@pytest.mark.parametrize('scale', [1., 1e4])
def test_the_error_is_computed_in_float32_under_autocast(scale):
    """The squares of large features do not overflow or lose digits."""
    loss = build()
    student = [scale * x.detach() for x in pyramid(STUDENT)]
    teacher = [scale * x.detach() for x in pyramid(TEACHER, 1)]
    with torch.autocast('cpu', dtype=torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype == torch.float32
    # the convolutions run in bfloat16: eight bits
    expected = by_hand(loss, student, teacher)
    assert value.item() == pytest.approx(expected, rel=2**-6)


def test_half_precision_features_do_not_overflow():
    """1e4 squared is beyond float16; the difference is taken in float32."""
    loss = MimicLoss([1], [1]).half()
    with torch.no_grad():
        loss.projections[0].weight.fill_(1.)
        loss.projections[0].bias.zero_()
    feats = [torch.full((1, 1, 2, 2), 1e4, dtype=torch.half)]
    value = loss(feats, [-feats[0]])
    assert value.item() == pytest.approx(4e8, rel=2**-10)


def test_differing_numbers_of_levels_are_refused_when_built():
    """One sentence with both numbers."""
    with pytest.raises(ConfigError, match='has 2 levels.* has 1$') as error:
        MimicLoss([8], [8, 8])
    assert error.value.field == 'teacher_channels'


@pytest.mark.parametrize('levels', [1, 3])
def test_a_student_with_other_levels_is_refused(levels):
    """No level is dropped in silence."""
    student = pyramid(STUDENT + (3, ))[:levels]
    with pytest.raises(
            ConfigError, match=f'has 2 .* gives {levels}$') as error:
        build()(student, pyramid(TEACHER))
    assert error.value.field == 'model.mimic_loss.student_channels'


def test_a_teacher_with_other_levels_or_sizes_is_refused():
    """One sentence; nothing is broadcast."""
    student, teacher = pyramid(STUDENT), pyramid(TEACHER)
    with pytest.raises(ValueError, match='feature levels.* 2 and 1$'):
        build()(student, teacher[:1])
    teacher[1] = teacher[1][..., :1]
    with pytest.raises(ValueError, match=r'features must have one shape'):
        build()(student, teacher)


@pytest.mark.parametrize('value', [-1., float('nan'), 'a'])
def test_a_weight_out_of_range_is_refused(value):
    """One sentence that names the field and the value."""
    with pytest.raises(ConfigError) as error:
        build(loss_weight=value)
    assert error.value.field == 'loss_weight'


def test_a_weight_of_numpy_is_a_number():
    """It does not make the loss one of NumPy."""
    loss = build(loss_weight=np.float32(0.5))
    assert type(loss.loss_weight) is float
    value = loss(pyramid(STUDENT), pyramid(TEACHER, 1))
    assert isinstance(value, torch.Tensor) and value.requires_grad


def test_a_teacher_in_inference_mode():
    """Gradients reach the student and the projections."""
    loss, student = build(), pyramid(STUDENT)
    with torch.inference_mode():
        teacher = [x * 1 for x in pyramid(TEACHER, 1)]
    loss(student, teacher).backward()
    assert all(x.grad.abs().max() > 0 for x in (*student, *loss.parameters()))
