"""Check and time the DIST loss on a GPU: PyTorch and Triton are all it needs.

    python benchmarks/gpu_loss.py --json gpu_loss.json --markdown gpu_loss.md

Correctness comes first, against the formula in float64. Then forward and
backward are timed in turns: the authors' formula, the same compiled, mmdist in
PyTorch, and mmdist in Triton; and memory is measured. The bandwidth counts the
five numbers per logit that nobody can save: both logits read forward and
backward, and the gradient written. It takes less than five minutes.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mmdist.models.losses import pearson  # noqa: E402
from mmdist.models.losses.functional import to_rows  # noqa: E402

# PSPNet on Cityscapes and ADE20K, levels of RetinaNet at 800x1333, RoIs,
# ImageNet, and an FPN level as features.
SHAPES = [((4, 19, 128, 256), 'softmax'), ((2, 150, 128, 128), 'softmax'),
          ((2, 720, 100, 168), 'sigmoid'), ((2, 720, 50, 84), 'sigmoid'),
          ((2, 720, 25, 42), 'sigmoid'), ((2, 720, 13, 21), 'sigmoid'),
          ((2, 720, 7, 11), 'sigmoid'), ((1024, 81), 'softmax'),
          ((256, 1000), 'softmax'), ((2, 256, 100, 168), 'none')]
CHECKED = [((3, 7, 13, 11), 'softmax'), ((2, 720, 9, 5), 'sigmoid'),
           ((2, 256, 8, 9), 'none'), ((300, 1000), 'softmax'),
           ((64, 4000), 'softmax')]


def formula(student, teacher, activation):
    """DIST as its authors write it."""
    p, q = (
        pearson.activate(to_rows(x), activation) for x in (student, teacher))
    return 2 - sum(_correlation(x, y).mean() for x, y in ((p, q), (p.T, q.T)))


def _correlation(x, y):
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def ours(kernels):
    """DIST by mmdist, in PyTorch or by other kernels."""

    def loss(student, teacher, activation):
        options = pearson.Options(1., activation, activation, 1e-8)
        return sum(pearson.distances(student, teacher, options, *kernels))

    return loss


def step(way, student, teacher, activation):
    """The gradient of one forward and backward pass."""
    return torch.autograd.grad(way(student, teacher, activation), student)[0]


def pair(shape, dtype, device):
    """Logits of student and teacher that agree in part."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *shape, generator=rng)
    student, teacher = 3 * student, 3 * (student + teacher)
    return (student.to(device,
                       dtype).requires_grad_(), teacher.to(device, dtype))


def check(ways, device):
    """Relative errors of the gradients, by dtype; stops where one is wrong."""
    worst = {}
    for shape, activation in CHECKED:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            student, teacher = pair(shape, dtype, device)
            exact = step(formula,
                         student.detach().double().requires_grad_(),
                         teacher.double(), activation)
            # (Small gradients of half precision have few digits.)
            bound = 1e-5 if dtype == torch.float32 else 1e-2
            for name, way in ways.items():
                found = step(way, student, teacher, activation).double()
                error = float((found - exact).norm() / exact.norm())
                key = f'{name} {str(dtype)[6:]}'
                worst[key] = max(worst.get(key, 0.), error)
                assert error < bound, (key, shape, activation, error)
    return worst


def milliseconds(ways, args, repeats):
    """Medians of turns, by CUDA events."""
    times = {name: [] for name in ways}
    for turn in range(repeats + 3):
        for name, way in ways.items():
            begin, end = (
                torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            step(way, *args)
            end.record()
            end.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def extra_mib(way, args):
    """Peak memory beside the logits and the returned gradient."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    size = step(way, *args).nbytes
    return (torch.cuda.max_memory_allocated() - before - size) / 2**20


def bandwidth():
    """Bytes per second of a copy of 1 GiB."""
    source = torch.empty(2**28, device='cuda')
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.nbytes / (1e-3 * min(times))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument('--dtype', default='float32')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--markdown', type=Path)
    parser.add_argument(
        '--check-only',
        action='store_true',
        help='compare with the formula on any device, time nothing')
    args = parser.parse_args()
    ways = dict(pytorch=ours(()))
    try:
        from mmdist.models.losses import triton_pearson
        ways['triton'] = ours(
            (triton_pearson.statistics, triton_pearson.gradient))
    except ImportError:
        print('Triton is not installed')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu':  # compiled kernels need a GPU
        import os
        if os.environ.get('TRITON_INTERPRET') != '1':
            ways.pop('triton', None)
    report = dict(
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
        dtype=args.dtype,
        errors=check(ways, device))
    print(json.dumps(report, indent=1))
    if args.check_only:
        return
    if device == 'cpu':
        sys.exit('times need a GPU; --check-only compares without one')
    ways = dict(formula=formula, compiled=torch.compile(formula), **ways)
    report.update(bandwidth=bandwidth(), results=[])
    lines = [
        f'{report["device"]}, torch {torch.__version__}, {args.dtype}', '',
        '| logits | activation | ' + ' | '.join(f'{w} ms' for w in ways) +
        ' | ratios to the formula | share of the bandwidth | extra MiB |',
        '|' + ' --- |' * (len(ways) + 5)
    ]
    for shape, activation in SHAPES:
        torch.cuda.empty_cache()
        inputs = *pair(shape, getattr(torch, args.dtype), 'cuda'), activation
        times = milliseconds(ways, inputs, args.repeats)
        least = 5 * inputs[0].nbytes / report['bandwidth'] * 1e3
        result = dict(
            shape=shape,
            activation=activation,
            milliseconds=times,
            ratio={
                n: times['formula'] / t
                for n, t in times.items()
            },
            bandwidth_share={
                n: least / t
                for n, t in times.items()
            },
            extra_mib={
                n: extra_mib(w, inputs)
                for n, w in ways.items()
            })
        report['results'].append(result)
        cells = [
            '×'.join(map(str, shape)), activation,
            *(f'{t:.3f}' for t in times.values()),
            *(' / '.join(form.format(x) for x in result[key].values())
              for key, form in (('ratio', '{:.1f}'),
                                ('bandwidth_share', '{:.0%}'),
                                ('extra_mib', '{:.0f}')))
        ]
        lines.append('| ' + ' | '.join(cells) + ' |')
        print(lines[-1])
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    if args.markdown:
        args.markdown.write_text('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
