"""Take the student out of a training checkpoint, to publish or deploy it.

Without optimizer, schedulers, message hub and trained projections, in a file
that MMDetection or MMSegmentation loads without mmdist. A name that ends with
.onnx gets the network instead: from images as the data preprocessor normalises
them to what the heads return, before any decoding or NMS.
"""
import argparse
import hashlib
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import save
from torch import Tensor

from mmdist.errors import ConfigError
from mmdist.models.teacher import build_model, read_checkpoint
from mmdist.utils import run_tool, scope_of, student_of

# What tells others what the weights are; the config holds paths.
META = ('dataset_meta', 'epoch', 'iter', 'seed', 'mmengine_version', 'time')


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('config', help='config that it was trained with')
    parser.add_argument('checkpoint', help='training checkpoint')
    parser.add_argument(
        'out',
        type=Path,
        help='.pth, .safetensors for weights alone, or .onnx')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the images, for .onnx; their number may vary')
    parser.add_argument(
        '--last',
        action='store_true',
        help='the weights of the last iteration, where an EMAHook averaged '
        'them; without the flag the average')
    parser.add_argument(
        '--force', action='store_true', help='overwrite an existing file')
    return parser.parse_args()


def weights_of(checkpoint, last):
    """The student's weights, by the names of the plain model."""
    if 'state_dict' not in checkpoint:
        raise ConfigError('CHECKPOINT', 'it has no `state_dict`',
                          'name one that MMEngine wrote')
    if not last:
        return checkpoint['state_dict']
    # MMEngine's EMAHook exchanges both when it writes a checkpoint.
    if 'ema_state_dict' not in checkpoint:
        raise ConfigError(
            '--last', 'the checkpoint has the last weights '
            'alone: its run had no EMAHook', 'leave --last out')
    return {
        name.removeprefix('module.'): weight
        for name, weight in checkpoint['ema_state_dict'].items()
        if name.startswith('module.')
    }


def load_student(weights, cfg):
    """The plain student with the weights, which it must load strictly."""
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        model, _ = build_model(
            student_of(cfg.model), 'model.student',
            cfg.get('data_preprocessor'))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            'CHECKPOINT', 'it is not of the student of this config: '
            f'{shorten(str(error), 300, placeholder=" …")}') from error
    return model


def names_of(outputs, name='output'):
    """output_0_2 is the third level of the first output of a head."""
    if isinstance(outputs, Tensor):
        return [name]
    return [
        inner for i, part in enumerate(outputs)
        for inner in names_of(part, f'{name}_{i}')
    ]


@torch.no_grad()
def write_onnx(path, model, size):
    """The network by PyTorch's own exporter, in one file."""
    model.eval()
    images = torch.zeros(2, 3, *size)  # of one image, it would be fixed
    try:
        outputs = model(images)  # in MM's mode 'tensor'
    except (TypeError, AttributeError, AssertionError) as error:
        raise ConfigError(
            'OUT', 'the heads of this student need more than images, as '
            'those with proposals or queries do',
            'write a .pth, and let mmdeploy export that') from error
    torch.onnx.export(
        model, (images, ),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({
            0: torch.export.Dim.AUTO
        }, ),
        input_names=['images'],
        output_names=names_of(outputs),
        verbose=False)


def write(path, model, weights, meta, size):
    """A file of PyTorch, safetensors or ONNX, by the suffix."""
    # Heads of one module share their memory, which safetensors refuses.
    weights = {n: w.clone().contiguous() for n, w in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.partial')
    if path.suffix == '.onnx':
        write_onnx(part, model, size)
    elif path.suffix == '.safetensors':
        part.write_bytes(save(weights))  # save_file lets the owner alone read
    else:
        torch.save(dict(meta=meta, state_dict=weights), part)
    part.replace(path)


def main():
    args = parse_args()
    if args.out.suffix not in ('.pth', '.safetensors', '.onnx'):
        raise ConfigError(
            'OUT', f'{args.out} must end with .pth, .safetensors or .onnx')
    if args.out.suffix == '.onnx':
        if args.size is None:
            raise ConfigError('--size', 'ONNX needs the size of the images')
        if not (find_spec('onnx') and find_spec('onnxscript')):
            raise ConfigError('OUT', 'ONNX needs onnx and onnxscript',
                              "pip install 'mmdist[onnx]'")
    if args.out.exists() and not args.force:
        raise ConfigError('OUT', f'{args.out} exists', '--force overwrites it')
    cfg = Config.fromfile(args.config)
    checkpoint = read_checkpoint(args.checkpoint, field='CHECKPOINT')
    weights = {
        name: weight
        for name, weight in weights_of(checkpoint, args.last).items()
        if not name.startswith('distiller.')  # trained projections
    }
    model = load_student(weights, cfg)
    meta = checkpoint.get('meta', {})
    write(args.out, model, weights,
          {key: meta[key]
           for key in META if key in meta}, args.size)
    sha = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f'{args.out}: {len(weights)} tensors, '
          f'{args.out.stat().st_size / 2**20:.1f} MiB, sha256 {sha}')


if __name__ == '__main__':
    run_tool(main)
