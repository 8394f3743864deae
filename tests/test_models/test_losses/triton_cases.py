"""Cases of test_triton.py, each run in a process of its own."""
import os
import sys
import warnings

import torch

from mmdist.models.losses import pearson, triton_pearson
from mmdist.models.losses.functional import dist_terms
from tests.test_models.test_losses.test_pearson import logits, reference

KERNELS = triton_pearson.statistics, triton_pearson.gradient
SHAPES = [(2, 19, 13, 11), (50, 7), (3, 5, 41), (2, 1500, 6), (9, 1), (1, 12),
          (2, 4096, 6)]
ACTIVATIONS = [('softmax', 'softmax'), ('sigmoid', 'softmax'),
               ('none', 'none'), ('softmax', 'sigmoid')]


def computed(student, teacher, options):
    """Terms and gradient by the kernels."""
    student = student.detach().requires_grad_()
    inter, intra = pearson.distances(student, teacher, options, *KERNELS)
    gradient, = torch.autograd.grad(inter + 2 * intra, student)
    assert gradient.dtype == student.dtype
    return torch.stack([inter, intra]).detach(), gradient.double()


def assert_is_formula(student, teacher, activations, tau, bound=1e-6):
    options = pearson.Options(tau, *activations, 1e-8)
    terms, gradient = computed(student, teacher, options)
    expected, expected_gradient = reference(student, teacher, activations)
    if tau != 1:
        expected, expected_gradient = reference(student / tau, teacher / tau,
                                                activations)
        expected_gradient /= tau
    torch.testing.assert_close(
        terms.double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    error = (gradient - expected_gradient).norm()
    assert error <= bound * expected_gradient.norm(), (student.shape, error)


def values():
    """Against the formula in float64; layouts, dtypes, constants, extremes."""
    for shape in SHAPES:
        for activations in ACTIVATIONS:
            pair = logits(shape, torch.float32)
            # The interpreter adds thousands of numbers one by one.
            bound = 1e-6 if shape[1] < 1000 else 1e-5
            assert_is_formula(*pair, activations, 1., bound)
    student, teacher = logits((2, 19, 6, 7), torch.float32)
    assert_is_formula(student, teacher, ACTIVATIONS[0], 4.)
    last = dict(memory_format=torch.channels_last)
    assert_is_formula(
        student.to(**last), teacher[:, :, :, :], ACTIVATIONS[0], 1.)
    assert_is_formula(
        student.transpose(2, 3), teacher.transpose(2, 3), ACTIVATIONS[0], 1.)
    for dtype in (torch.float16, torch.bfloat16):
        assert_is_formula(
            student.to(dtype), teacher.to(dtype), ACTIVATIONS[0], 1.,
            torch.finfo(dtype).eps)
    options = pearson.Options(1., 'softmax', 'softmax', 1e-8)
    for x in (torch.zeros(6, 4), 1e4 * torch.eye(6)[:, :4]):
        terms, gradient = computed(x, torch.randn(6, 4), options)
        assert terms.isfinite().all() and gradient.isfinite().all()
    assert computed(torch.zeros(6, 4), torch.randn(6, 4),
                    options)[0].tolist() == [1., 1.]
    masked = torch.randn(2, 6, 4)
    masked[:, :, 3] = -torch.inf
    assert_is_formula(*masked, ACTIVATIONS[0], 1.)
    first, second = (computed(student, teacher, options) for _ in range(2))
    assert all(map(torch.equal, first, second))


def opt_in():
    """By an environment variable; wrong kernels are left with one warning."""
    student, teacher = logits((2, 5, 3, 4), torch.float32)
    eager = dist_terms(student, teacher)
    calls, kernel = [], triton_pearson.statistics

    def statistics(*args):
        calls.append(args)
        return kernel(*args)

    triton_pearson.statistics = statistics
    os.environ['MMDIST_TRITON'] = '1'
    for name, term in dist_terms(student, teacher).items():
        torch.testing.assert_close(term, eager[name])
    assert len(calls) == 2  # the check, and the call
    triton_pearson._agrees.cache_clear()
    triton_pearson.gradient = lambda student, *args: 2 * student
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(3):
            assert dist_terms(student, teacher) == eager
    assert ['Triton' in str(w.message) for w in caught] == [True]


def compiled():
    """For a GPU that is not here: what the interpreter does not check."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    kernels = (triton_pearson._statistics_kernel,
               triton_pearson._gradient_kernel)
    for activation, classes, dtype in (('softmax', 19, 'fp32'),
                                       ('sigmoid', 720, 'bf16'), ('none', 2048,
                                                                  'fp16')):
        _, fixed = triton_pearson._blocks(
            torch.empty(2, classes, 1000),
            pearson.Options(1., activation, activation))
        types = dict.fromkeys(fixed, 'constexpr')
        types.update(dict.fromkeys(('s', 't', 'result'), '*' + dtype))
        types.update(
            dict.fromkeys(
                ('similarity', 'rows', 'parts', 'columns', 'row_weight'),
                '*fp32'))
        types.update(dict.fromkeys(('tau', 'eps', 'relative', 'tiny'), 'fp32'))
        for kernel in kernels:
            signature = {n: types.get(n, 'i32') for n in kernel.arg_names}
            source = ASTSource(kernel, signature, fixed)
            done = compile(source, target=GPUTarget('cuda', 90, 32))
            assert done.asm['ptx']


if __name__ == '__main__':
    dict(values=values, opt_in=opt_in, compiled=compiled)[sys.argv[1]]()
    print('done')
