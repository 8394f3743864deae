"""Check and time the DIST loss beside the formula as its authors write it.

    python benchmarks/benchmark_loss.py --json loss.json > loss.md

PyTorch is all it needs, and Triton for the kernels on a GPU. Gradients come
first, against the formula in float64. Then forward and backward of the same
logits are timed in turns, so that what else the machine does meets all; the
ratio of medians is what counts. Operations, and the numbers that they read and
write per logit, are those of one chunk. The share of a GPU's bandwidth counts
the five numbers per logit that nobody can save: both logits read forward and
backward, and the gradient written.
"""
import argparse
import json
import os
import sys
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from timing import (MIB, Count, add_arguments, milliseconds, peak_memory,
                    table, turns)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from mmdist.models.losses.functional import dist_terms, to_rows  # noqa: E402

# Usual sizes: PSPNet on Cityscapes and ADE20K, the five levels of RetinaNet
# for 800x1333, the first of them as features, the RoIs of Faster R-CNN, a
# batch of ImageNet, and a tiny table.
LEVELS = ('100,152', '50,76', '25,38', '13,19', '7,10')
SHAPES = ('4,19,128,256:softmax', '2,150,128,128:softmax',
          *(f'2,720,{level}:sigmoid'
            for level in LEVELS), '2,256,100,152:none', '1024,81:softmax',
          '256,1000:softmax', '8,4:softmax')
CHECKED = ('3,7,13,11:softmax', '2,720,9,5:sigmoid', '2,256,8,9:none',
           '300,1000:softmax', '64,4000:softmax')
# of a row: what is measured of each way, and how it is shown
COLUMNS = {
    'ratios': ('ratio', '{:.2f}'.format),
    'bandwidth': ('bandwidth_share', '{:.0%}'.format),
    'extra MiB': ('extra_mib', '{:.1f}'.format),
    'operations on numbers': ('counts', lambda count: '%d on %.0f' % count)
}


def formula(student, teacher, activation):
    """DIST as its authors write it: tables of the logits' size."""
    act = dict(
        softmax=lambda x: x.softmax(1),
        sigmoid=torch.sigmoid).get(activation, lambda x: x)
    p, q = (act(to_rows(x)) for x in (student, teacher))
    return 2 - _correlation(p, q).mean() - _correlation(p.T, q.T).mean()


def _correlation(x, y):
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1) + 1e-8)


def mmdist(student, teacher, activation, triton=False, chunk_numel=None):
    """The same by mmdist, in PyTorch or by Triton's kernels."""
    os.environ['MMDIST_TRITON'] = str(int(triton))
    return sum(
        dist_terms(student, teacher, 1., activation,
                   chunk_numel=chunk_numel).values())


def step(way, student, teacher, activation):
    """The gradient of one forward and backward pass."""
    return torch.autograd.grad(way(student, teacher, activation), student)[0]


def parse_shape(text):
    """``'4,19,128,256:softmax'`` -> shape and activation."""
    sizes, _, activation = text.partition(':')
    if activation not in ('softmax', 'sigmoid', 'none'):
        raise argparse.ArgumentTypeError(
            f'{text!r} must end with :softmax, :sigmoid or :none')
    return [int(size) for size in sizes.split(',')], activation


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
    for shape, activation in map(parse_shape, CHECKED):
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


def bandwidth():
    """Bytes per millisecond of a copy of 1 GiB."""
    source = torch.empty(2**28, device='cuda')
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return 2 * source.nbytes / min(milliseconds(copy, 'cuda') for _ in '1234')


def measure(ways, shape, activation, args):
    """Medians in milliseconds, ratios to the formula, memory beside the
    logits and the returned gradient, operations and numbers per logit."""
    inputs = *pair(shape, getattr(torch, args.dtype), args.device), activation
    size = inputs[0].nbytes
    steps = {name: partial(step, way, *inputs) for name, way in ways.items()}
    times = turns(steps, args.repeats, args.device)
    times = {name: median(values) for name, values in times.items()}
    result = dict(
        shape=shape,
        activation=activation,
        milliseconds=times,
        ratio={
            name: times['formula'] / value
            for name, value in times.items()
        },
        logits_mib=size / MIB,
        extra_mib={
            name: (peak_memory(one, args.device) - size) / MIB
            for name, one in steps.items()
        },
        counts={})
    numel = inputs[0].numel()
    for name, way in dict(
            formula=formula, pytorch=partial(mmdist,
                                             chunk_numel=numel)).items():
        student, teacher = torch.empty(2, *shape, device='meta').unbind()
        with Count() as counted:
            step(way, student.requires_grad_(), teacher, activation)
        result['counts'][name] = counted.operations, counted.numbers / numel
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--shapes',
        nargs='+',
        type=parse_shape,
        default=[parse_shape(shape) for shape in SHAPES],
        help='e.g. 4,19,128,256:softmax (classes second)')
    parser.add_argument('--dtype', default='float32')
    parser.add_argument(
        '--check-only',
        action='store_true',
        help='compare with the formula, time nothing')
    add_arguments(parser, repeats=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings('error', 'the Triton kernels')
    ways, gpu = dict(pytorch=mmdist), args.device != 'cpu'
    if find_spec('triton') and (gpu
                                or os.environ.get('TRITON_INTERPRET') == '1'):
        ways['triton'] = partial(mmdist, triton=True)
    report = dict(
        torch=torch.__version__,
        device=torch.cuda.get_device_name() if gpu else 'cpu',
        threads=args.threads,
        dtype=args.dtype,
        errors=check(ways, args.device),
        results=[])
    print(json.dumps(report, indent=1), file=sys.stderr)
    if not args.check_only:
        compiled = dict(compiled=torch.compile(formula)) if gpu else {}
        ways = dict(formula=formula, **compiled, **ways)
        speed, rows = gpu and bandwidth(), []
        for shape, activation in args.shapes:
            result = measure(ways, shape, activation, args)
            times, size = result['milliseconds'], result['logits_mib']
            if gpu:
                result['bandwidth_share'] = {
                    name: 5 * MIB * size / speed / value
                    for name, value in times.items()
                }
            report['results'].append(result)
            rows.append({
                'logits': '×'.join(map(str, shape)),
                'activation': activation,
                **{
                    f'{name} ms': f'{t:.3f}'
                    for name, t in times.items()
                },
                **{
                    title: ' / '.join(map(form, result[key].values()))
                    for title, (key, form) in COLUMNS.items() if key in result
                }, 'logits MiB': f'{size:.1f}'
            })
        print(table(rows))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == '__main__':
    main()
