"""Write the config that distils a teacher into a student, and check it.

The check builds both models, loads the teacher and pairs their class logits,
as the first seconds of a training do.
"""
import argparse
import importlib.util
import keyword
import os
import shlex
from pathlib import Path

from mmengine.config import Config

from mmdist.errors import ConfigError
from mmdist.models.teacher import build_model
from mmdist.utils import (add_class_map, data_classes_of, find_config,
                          library_of, load_config, run_tool, wrapper_for)

ROOT = Path(__file__).resolve().parents[1]

# --features adds a loss and its arguments to DIST on the class logits. In the
# trials on digit scenes (docs/en/results.md), on outputs of FPNs, detectors
# have 0.408 mAP by intra and 0.406 by mimic, segmentors 51 mIoU by mimic (five
# seeds), though no more than without after four times the epochs (one seed).
# Segmentors without a neck are compared before their last convolution:
# to project the stages of a PSPNet costs 1.13 x the step.
FEATURES = {
    'mmdist.DistillDetector': ('DISTLoss', 'beta=0.0, gamma=1.0'),
    'mmdist.DistillSegmentor': ('MimicLoss', 'loss_weight=1.0')
}

# MMEngine does not let a config of one style inherit from the other.
TEMPLATE = '''_base_ = {base!r}
custom_imports = dict(imports={imports!r})
model = dict(
    _delete_=True,
    type='mmdist.{wrapper}',
    student={{{{_base_.model}}}},
'''
NEW_STYLE = '''from mmengine.config import read_base

with read_base():
    from {base} import *

from mmdist.engine import SeedHook
from mmdist.models.distillers import {wrapper}
from mmdist.models.losses import {losses}

model = dict(
    type={wrapper},
    student=model,
'''
# the fields of both
MODEL = '''    teacher=dict(
        config={teacher!r},
        checkpoint={checkpoint!r}{class_map}),
    distill_loss=dict(type={dist}, {weights}, tau=1.0){others})
{hooks}'''


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        'student',
        help="config to train: a path, or 'mmdet::…', 'mmseg::…', …")
    parser.add_argument('teacher', help="the teacher's config, likewise")
    parser.add_argument(
        'checkpoint', help="the teacher's weights: path or URL")
    add_class_map(parser)
    parser.add_argument(
        '--align',
        choices=['boxes'],
        help='for a teacher of another family: it answers for the boxes of '
        'the student')
    parser.add_argument(
        '--features',
        action='store_true',
        help='distil feature maps, too: intra of the necks of detectors, the '
        'mean squared error of necks or decode heads of segmentors')
    parser.add_argument(
        '--out', type=Path, help='default: ./dist_<name of the student>')
    parser.add_argument(
        '--force', action='store_true', help='overwrite an existing file')
    return parser.parse_args()


def imports_of(cfg):
    """The imports of the student's config, which ours would replace, and
    mmdist."""
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else [*imports]
    return [*imports, *(['mmdist'] if 'mmdist' not in imports else [])]


def resuming_hooks(cfg, new_style):
    """Lines with which a killed run resumes exactly, where CFG lacks them."""
    lines, own = [], cfg.get('custom_hooks') or []
    if not any('SeedHook' in str(hook['type']) for hook in own):
        kept = '*custom_hooks, ' if new_style else '*_base_.custom_hooks, '
        seed = 'SeedHook' if new_style else "'mmdist.SeedHook'"
        lines.append(
            f'custom_hooks = [{kept if own else ""}dict(type={seed})]\n')
    hook = (cfg.get('default_hooks') or {}).get('checkpoint')
    # FlexibleRunner, which is a runner_type, writes without a backend.
    if hook and not hook.get('backend_args') and 'runner_type' not in cfg:
        whole = "backend_args=dict(backend='mmdist.whole')"
        lines.append(
            f"default_hooks['checkpoint'].update({whole})\n" if new_style else
            f'default_hooks = dict(checkpoint=dict({whole}))\n')
    return ''.join(lines)


def place_of(path):
    """A teacher's file as the config names it. Trainings start in the
    checkout, so a path from elsewhere must be absolute."""
    here = Path.cwd().resolve() == ROOT
    return path if here or not os.path.exists(path) else os.path.abspath(path)


def module_of(path, folder, library):
    """The module that a new-style config imports the student's from.

    A config of the library's package has an absolute name, any other one a
    name relative to the folder of the importing file.
    """
    package = os.path.dirname(importlib.util.find_spec(library).origin)
    place = os.path.relpath(os.path.abspath(path), package)
    start = f'{library}.'
    if place.startswith(os.pardir):
        place = os.path.relpath(path, folder)
        start = '.'
    *folders, name = Path(place).with_suffix('').parts
    up = folders.count(os.pardir)
    parts = [*folders[up:], name]
    for part in parts:
        if not part.isidentifier() or keyword.iskeyword(part):
            raise ConfigError(
                'STUDENT', f'{path!r} is a new-style config, which MMEngine '
                'imports by the names of its file and folders',
                f'rename {part!r}, which is no Python name, or choose another '
                '--out')
    return start + '.' * up + '.'.join(parts)


def main():
    args = parse_args()
    name = os.path.basename(args.student.partition('::')[2] or args.student)
    out = args.out or Path(f'dist_{name}')
    if out.suffix != '.py':
        raise ConfigError('--out', f'{out} must end with .py')
    if out.exists() and not args.force:
        raise ConfigError('--out', f'{out} exists', '--force overwrites it')
    cfg = load_config(args.student, 'STUDENT')
    wrapper = wrapper_for(cfg, 'STUDENT')
    path = find_config(args.student, 'STUDENT')
    new_style = Config._is_lazy_import(path)
    # the paper's beta and gamma
    weight = 2.0 if wrapper == 'mmdist.DistillClassifier' else 1.0
    losses, others = ['DISTLoss'], ''
    if args.features:
        if wrapper not in FEATURES:
            raise ConfigError(
                '--features', f'there is no recommended setting for {wrapper}',
                'leave it out, or write a feature_loss yourself')
        loss, arguments = FEATURES[wrapper]
        losses = sorted({*losses, loss})
        if 'Segmentor' in wrapper and not cfg.model.get('neck'):
            arguments += ", where='head'"
        kind = loss if new_style else f"'mmdist.{loss}'"
        others = f',\n    feature_loss=dict(type={kind}, {arguments})'
    if args.align:
        others += f',\n    tap=dict(align={args.align!r})'
    if new_style:
        base = module_of(path, out.parent, library_of(cfg))
    else:  # MMEngine looks for paths from the file's folder
        base = args.student if '::' in args.student else os.path.relpath(
            path, out.parent)
    fields = dict(
        base=base,
        imports=imports_of(cfg),
        wrapper=wrapper.partition('.')[2],
        losses=', '.join(losses),
        dist='DISTLoss' if new_style else "'mmdist.DISTLoss'",
        weights=f'beta={weight}, gamma={weight}',
        hooks=resuming_hooks(cfg, new_style),
        teacher=place_of(args.teacher),
        checkpoint=place_of(args.checkpoint),
        class_map=f',\n        class_map={args.class_map!r}'
        if args.class_map else '',
        others=others)
    text = ((NEW_STYLE if new_style else TEMPLATE) + MODEL).format(**fields)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f'_partial_{out.name}')
    part.write_text(text)
    try:
        model = build_model(str(part), 'model', resolve=False)[0]
        model.distillation.compare_classes(model, data_classes_of(cfg))
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    train = os.path.relpath(ROOT / 'tools' / 'train.py')
    print(f'{out} is ready: {shlex.join(["python", train, str(out)])}')


if __name__ == '__main__':
    run_tool(main)
