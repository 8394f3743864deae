"""DIST in chunks: against the formula as written, in float64."""
import runpy
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdist.models.losses import pearson
from mmdist.models.losses.formula import activate
from mmdist.models.losses.functional import (dist_terms, kd_terms,
                                             pearson_distance, to_rows)
from mmdist.models.losses.pearson import SMALL_NUMEL
from tests.test_models.test_losses.conftest import in_chunks

TIMING = str(Path(__file__).resolve().parents[3] / 'benchmarks' / 'timing.py')
ACTIVATIONS = [('softmax', 'softmax'), ('sigmoid', 'sigmoid'),
               ('softmax', 'sigmoid'), ('sigmoid', 'softmax')]
SHAPES = [(300, 7), (4, 9, 11, 13), (3, 5, 41), (2, 6, 3, 4, 5), (1, 40),
          (50, 1), (3, 8, 41), (60, 21), (90, 8, 1)]


@pytest.fixture(autouse=True)
def way(monkeypatch):
    """The formula is the reference here."""
    in_chunks(monkeypatch)


def logits(shape, dtype=torch.float64, seed=0, scale=3.):
    """Logits of student and teacher."""
    rng = torch.Generator().manual_seed(seed)
    student, teacher = scale * torch.randn(
        2, *shape, generator=rng, dtype=torch.float64)
    # They agree in part.
    return student.to(dtype), (student + teacher).to(dtype)


def reference(student, teacher, activations, tau=1.):
    """Terms and gradient of the formula as written, in float64."""
    student = student.detach().double().requires_grad_()
    p = [
        activate(to_rows(x) / tau, activation)
        for x, activation in zip((student, teacher.double()), activations)
    ]
    terms = [tau**2 * pearson_distance(*p, dim=dim).mean() for dim in (1, 0)]
    (terms[0] + 2 * terms[1]).backward()
    return [float(term) for term in terms], student.grad


def computed(student, teacher, activations, tau=1.):
    """The same of the chunks, in the dtype of the logits."""
    # Detached, it stays in its memory format.
    student = student.detach().requires_grad_()
    terms = dist_terms(student, teacher, tau, *activations)
    (terms['inter'] + 2 * terms['intra']).backward()
    return [float(terms['inter']), float(terms['intra'])], student.grad


def error(gradient, expected):
    """Relative, in the norm of all."""
    return float((gradient.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('tau', [1., 4.])
def test_it_is_the_formula(shape, activations, tau):
    """Exactly, but for the order of sums."""
    student, teacher = logits(shape)
    terms, gradient = computed(student, teacher, activations, tau)
    expected, expected_gradient = reference(student, teacher, activations, tau)
    assert terms == pytest.approx(expected, rel=1e-12, abs=1e-12)
    torch.testing.assert_close(
        gradient, expected_gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize('shape', [(70, 9, 40), (3, 50, 11, 13), (900, 60)])
@pytest.mark.parametrize('activations', ACTIVATIONS)
def test_backward_again_gives_the_gradient_again(shape, activations):
    """Backward leaves the kept statistics for a second backward."""
    student, teacher = logits(shape)
    student.requires_grad_()
    total = sum(dist_terms(student, teacher, 2., *activations).values())
    first, = torch.autograd.grad(total, student, retain_graph=True)
    before = first.clone()
    second, = torch.autograd.grad(total, student)
    assert torch.equal(first, before)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize('small', [0, SMALL_NUMEL])
@pytest.mark.parametrize('shape', [(3000, 19), (2, 150, 20, 20)])
@pytest.mark.parametrize('activations', ACTIVATIONS)
def test_float32_has_seven_digits(shape, activations, small, monkeypatch):
    """Chunks of a real size, or the whole; the formula as written has five
    here."""
    monkeypatch.setattr(pearson, 'SMALL_NUMEL', small)
    monkeypatch.setattr(pearson, 'CHUNK_NUMEL', 2**13)
    student, teacher = logits(shape, torch.float32)
    terms, gradient = computed(student, teacher, activations)
    expected, expected_gradient = reference(student, teacher, activations)
    assert terms == pytest.approx(expected, abs=3e-7)
    assert error(gradient, expected_gradient) < 1e-6


def test_a_certain_background_keeps_its_digits():
    """A column of 0.999 with a deviation of a thousandth."""
    student, teacher = logits((2000, 5), torch.float32, scale=0.5)
    student[:, 0] += 8
    teacher[:, 0] += 8
    gradient = computed(student, teacher, ACTIVATIONS[0])[1]
    expected = reference(student, teacher, ACTIVATIONS[0])[1]
    # 1 - p has four digits less than p.
    assert error(gradient, expected) < 1e-4


@pytest.mark.parametrize('logit', [-18., -20., -1e4])
def test_an_absent_class_counts_as_the_formula_says(logit, monkeypatch):
    """Its column is constant or nearly so, whatever ``1 / C`` rounds to."""
    monkeypatch.undo()
    student, teacher = logits((1, 3, 256, 512), torch.float32)
    student[:, 2] = teacher[:, 2] = logit
    student[:, 2] += 0.1 * student[:, 0] if logit > -100 else 0
    terms, gradient = computed(student, teacher, ACTIVATIONS[0])
    expected, expected_gradient = reference(student, teacher, ACTIVATIONS[0])
    assert terms == pytest.approx(expected, abs=1e-5)
    assert error(gradient, expected_gradient) < 1e-6


def test_rare_classes_keep_their_digits(monkeypatch):
    """Logits with a bias of their own for each class."""
    monkeypatch.undo()
    student, teacher = logits((1, 19, 128, 128), torch.float32)
    bias = 5 * torch.randn(
        19, 1, 1, generator=torch.Generator().manual_seed(5))
    student, teacher = student + bias, teacher + bias
    terms, gradient = computed(student, teacher, ACTIVATIONS[0])
    expected, expected_gradient = reference(student, teacher, ACTIVATIONS[0])
    assert terms == pytest.approx(expected, abs=1e-6)
    assert error(gradient, expected_gradient) < 1e-6


@pytest.mark.parametrize('classes, mean', [(2, -12.), (3, -14.), (20, -18.)])
def test_confident_misses_of_sigmoids_have_a_gradient(classes, mean,
                                                      monkeypatch):
    """Their deviations are small beside 1, not beside their mean."""
    monkeypatch.undo()
    monkeypatch.setattr(pearson, 'SMALL_NUMEL', 0)
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4000, classes, generator=rng)
    student, teacher = student + mean, 2 * teacher
    gradient = computed(student, teacher, ACTIVATIONS[1])[1]
    expected = reference(student, teacher, ACTIVATIONS[1])[1]
    assert error(gradient, expected) < 1e-4


@pytest.mark.parametrize('layout', [
    lambda t: t.to(memory_format=torch.channels_last),
    lambda t: torch.cat([t, t], dim=3)[..., :t.shape[3]],
    lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    lambda t: t.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
])
def test_the_layout_in_memory_changes_nothing(layout):
    """channels_last and tensors that are no whole of their memory."""
    student, teacher = logits((4, 5, 6, 7))
    expected = computed(student, teacher, ACTIVATIONS[0])
    for sides in ((layout(student), layout(teacher)),
                  (student, layout(teacher)), (layout(student), teacher)):
        terms, gradient = computed(*sides, ACTIVATIONS[0])
        assert terms == pytest.approx(expected[0], rel=1e-12)
        torch.testing.assert_close(gradient, expected[1])


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('tau', [1., 2.])
def test_low_precision_gets_a_gradient_of_its_dtype(dtype, tau):
    """Rounded once, from float32."""
    student, teacher = logits((4, 9, 11, 13), dtype)
    terms, gradient = computed(student, teacher, ACTIVATIONS[0], tau)
    expected = computed(student.float(), teacher.float(), ACTIVATIONS[0], tau)
    assert gradient.dtype == dtype and terms == pytest.approx(
        expected[0], rel=1e-6)
    # Their last bit in float32 depends on how chunks lie in memory.
    half = torch.finfo(dtype).eps / 2 * (1 + 1e-3)
    torch.testing.assert_close(
        gradient.float(), expected[1], rtol=half, atol=2**-25)


@pytest.mark.parametrize('activations', ACTIVATIONS)
@pytest.mark.parametrize('shape', [(8, 5), (2, 5, 3, 4)])
def test_it_compiles_whole(activations, shape):
    """No graph break, and the same numbers."""

    def loss(student, teacher):
        terms = dist_terms(student, teacher, 2., *activations)
        return terms['inter'] + 2 * terms['intra']

    student, teacher = logits(shape)
    student.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend='aot_eager')
    results = []
    for function in (loss, compiled):
        value = function(student, teacher)
        results.append((value, *torch.autograd.grad(value, student)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize('small', [0, SMALL_NUMEL])
@pytest.mark.parametrize('activations', [*ACTIVATIONS, ('none', 'none')])
def test_the_second_derivative_is_right(activations, small, monkeypatch):
    """By finite differences, with a constant row and a masked class."""
    monkeypatch.setattr(pearson, 'SMALL_NUMEL', small)
    student, teacher = logits((7, 4), scale=1.)
    student[2] = 0
    if activations[0] == 'softmax':
        student = torch.cat([student, torch.full((7, 1), -torch.inf)], 1)
        teacher = torch.cat([teacher, teacher[:, :1]], 1)
    # The constant row has a gradient as soon as it varies.
    varying = torch.ones(7, 4, dtype=torch.bool)
    varying[2] = False

    def terms(x):
        x = student[:, :4].masked_scatter(varying, x)
        x = torch.cat([x, student[:, 4:]], 1)
        return tuple(dist_terms(x, teacher, 2., *activations).values())

    free = student[:, :4][varying].requires_grad_()
    assert torch.autograd.gradgradcheck(terms, free)
    whole = student.clone().requires_grad_()
    first, = torch.autograd.grad(
        sum(dist_terms(whole, teacher, 2., *activations).values()),
        whole,
        create_graph=True)
    second, = torch.autograd.grad(first.square().sum(), whole)
    assert first.isfinite().all() and second.isfinite().all()


def test_it_is_deterministic():
    """Bit for bit."""
    student, teacher = logits((4, 9, 11, 13), torch.float32)
    first, second = (
        computed(student, teacher, ACTIVATIONS[0]) for _ in range(2))
    assert first[0] == second[0] and torch.equal(first[1], second[1])


@pytest.mark.parametrize('shape, activation', [((4, 19, 128, 256), 'softmax'),
                                               ((1, 720, 64, 64), 'sigmoid'),
                                               ((4096, 1000), 'softmax')])
@pytest.mark.parametrize('terms, part', [(dist_terms, 0.3), (kd_terms, 0.25)])
def test_a_part_of_the_logits_is_enough_memory(shape, activation, terms, part,
                                               monkeypatch):
    """Beside the logits and the gradient that is returned."""
    monkeypatch.undo()
    peak_memory = runpy.run_path(TIMING)['peak_memory']
    student, teacher = logits(shape, torch.float32)
    student.requires_grad_()

    def step():
        values = terms(student, teacher, 1., activation).values()
        return torch.autograd.grad(sum(values), student)

    step()
    size = student.numel() * student.element_size()
    assert size < peak_memory(step, 'cpu') < (1 + part) * size


# For these shapes the formula makes 69 to 71 operations on 80 to 83 numbers.
@pytest.mark.parametrize('activation', ['softmax', 'sigmoid', 'none'])
@pytest.mark.parametrize('shape', [(4, 19, 128, 256), (2, 150, 128, 128),
                                   (2, 720, 50, 76), (2, 720, 100, 152)])
def test_few_operations_on_few_numbers(shape, activation, monkeypatch):
    """In one chunk, as on a GPU; forward and backward."""
    monkeypatch.undo()
    count = runpy.run_path(TIMING)['Count']()
    # On a device without values none could be read, either.
    student, teacher = torch.empty(2, *shape, device='meta').unbind()
    student.requires_grad_()
    with count:
        terms = dist_terms(
            student, teacher, 1., activation, chunk_numel=student.numel())
        torch.autograd.grad(terms['inter'] + terms['intra'], student)
    assert count.operations <= 90
    assert count.numbers <= 70 * student.numel()


@pytest.mark.parametrize('chunk_numel', [1, 100, 7 * 9 * 11, None])
def test_the_size_of_a_chunk_changes_nothing(chunk_numel, monkeypatch):
    """However many rows there are in one."""
    monkeypatch.undo()
    student, teacher = logits((3, 7, 9, 11))
    student.requires_grad_()
    terms = dist_terms(student, teacher, chunk_numel=chunk_numel)
    gradient, = torch.autograd.grad(terms['inter'] + 2 * terms['intra'],
                                    student)
    expected, expected_gradient = reference(student, teacher, ACTIVATIONS[0])
    assert [float(x) for x in terms.values()] == pytest.approx(
        expected, rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient)


class NoReading(TorchDispatchMode):
    """Refuses what makes a GPU wait: values of tensors in Python, and
    tensors of values in Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ('_local_scalar_dense', 'nonzero', 'masked_select',
                            'lift_fresh')
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('terms', [dist_terms, kd_terms])
@pytest.mark.parametrize('small', [0, SMALL_NUMEL])
@pytest.mark.parametrize('activations', ACTIVATIONS)
def test_no_value_is_read(terms, small, activations, monkeypatch):
    """Neither forward nor backward, whatever the way."""
    monkeypatch.setattr(pearson, 'SMALL_NUMEL', small)
    student, teacher = logits((4, 9, 11, 13), torch.float32)
    student.requires_grad_()
    with NoReading():
        for wait in (lambda: float(student.sum()), lambda: torch.tensor([1.])):
            with pytest.raises(AssertionError):
                wait()
        values = terms(student, teacher, 2., *activations).values()
        gradient, = torch.autograd.grad(sum(values), student)
    assert gradient.abs().sum() > 0
