"""Take the student out of a training checkpoint, to publish or deploy it.

Without optimizer, schedulers, message hub and projections of mimic, in a file
that MMDetection or MMSegmentation loads without mmdist.
"""
import argparse
import hashlib
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from safetensors.torch import save

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
        'out', type=Path, help='.pth, or .safetensors for weights alone')
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
            'alone: its run had no EMAHook')
    return {
        name.removeprefix('module.'): weight
        for name, weight in checkpoint['ema_state_dict'].items()
        if name.startswith('module.')
    }


def verify(weights, cfg):
    """Refuse weights that the plain student does not load."""
    with DefaultScope.overwrite_default_scope(scope_of(cfg)):
        model, _ = build_model(
            student_of(cfg.model), 'model.student',
            cfg.get('data_preprocessor'))
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            'CHECKPOINT', 'it is not of the student of this config: '
            f'{error}') from error


def write(path, weights, meta):
    """A file of PyTorch or safetensors, by the suffix."""
    # Heads of one module share their memory, which safetensors refuses.
    weights = {n: w.clone().contiguous() for n, w in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f'{path.name}.partial')
    if path.suffix == '.safetensors':
        part.write_bytes(save(weights))  # save_file lets the owner alone read
    else:
        torch.save(dict(meta=meta, state_dict=weights), part)
    part.replace(path)


def main():
    args = parse_args()
    if args.out.suffix not in ('.pth', '.safetensors'):
        raise ConfigError('OUT',
                          f'{args.out} must end with .pth or .safetensors')
    if args.out.exists() and not args.force:
        raise ConfigError('OUT', f'{args.out} exists', '--force overwrites it')
    cfg = Config.fromfile(args.config)
    checkpoint = read_checkpoint(args.checkpoint, field='CHECKPOINT')
    weights = {
        name: weight
        for name, weight in weights_of(checkpoint, args.last).items()
        if not name.startswith('distiller.')  # trained projections
    }
    verify(weights, cfg)
    meta = checkpoint.get('meta', {})
    write(args.out, weights, {key: meta[key] for key in META if key in meta})
    sha = hashlib.sha256(args.out.read_bytes()).hexdigest()
    print(f'{args.out}: {len(weights)} tensors, '
          f'{args.out.stat().st_size / 2**20:.1f} MiB, sha256 {sha}')


if __name__ == '__main__':
    run_tool(main)
