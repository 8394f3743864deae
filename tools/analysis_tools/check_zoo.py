"""Check that every family of MMDetection and MMSegmentation can be distilled.

For a config of each family, a student and a teacher are built without any
download and compute their losses on a synthetic batch, alone and in the
wrapper.
"""
import argparse
import copy
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.progress import track
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zoo_models import (PACKAGES, SIZES, ZooConfig, batch_for, build,
                        build_wrapper, last_line, load, mim_folder,
                        tell_progress, zoo_configs)

from mmdist.errors import NoClassLogitsError
from mmdist.models.taps import build_tap
from mmdist.models.taps.watch import replaced
from mmdist.utils import run_tool

PASSES, NO_CLASSES, PLAIN, FAILS = ('passes', 'no class predictions',
                                    'plain model does not train here', 'fails')
CHECKS = dict(
    a='every loss_kd_* is finite and positive for a differing teacher',
    b='its gradient reaches the tapped heads, and nothing of the teacher',
    c='an identical student in eval mode has a KL divergence of 0',
    d="the student's own losses equal the plain model's bit for bit",
    e="the wrapper's weights load strictly in the plain model")
# Of float32: sums of some million products of probabilities.
KL_TOLERANCE = 1e-6
# Configs of a family that are tried until one can be checked here.
MAX_TRIES = 6
# What a machine that is short of time or memory does to a check.
CUT_OFF, ENDED = 'not ready after', 'the process ended with'


class PlainModelFails(Exception):
    """The plain model does not compute a loss here."""


def seed_everything(seed: int = 0) -> None:
    """Seed all random number generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def losses_of(model: nn.Module, batch: Dict[str, Any]) -> Dict[str, Any]:
    """The losses of a batch, from a seed, the batch left as it was."""
    seed_everything()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    return model.loss(data['inputs'], data['data_samples'])


def spread(losses: Dict[str, Any]) -> Dict[str, Tensor]:
    """Losses by name, lists of levels spread into names."""
    return {
        f'{name}.{i}': value.detach()
        for name, values in losses.items()
        for i, value in enumerate(
            values if isinstance(values, (list, tuple)) else [values])
        if isinstance(value, Tensor)
    }


def _training_copy(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.train()  # LAD's returns nothing
    return twin


def find_batch(model: nn.Module, cfg: Config,
               package: str) -> Tuple[Dict[str, Any], int]:
    """A batch that the plain model trains on, and the pictures' size.

    Raises:
        PlainModelFails: With the error of the largest pictures; small ones
            may have too few locations.
    """
    # BEiT takes pictures of the size of its crops only.
    for side in (*SIZES, *cfg.get('crop_size', ())[:1]):
        try:
            batch = batch_for(model, cfg, package, side)
            losses_of(_training_copy(model), batch)
            return batch, side
        except Exception as error:
            last = error
    raise PlainModelFails(last_line(last)) from last


@torch.no_grad()
def calibrate(model: nn.Module, batch: Dict[str, Any]) -> None:
    """Give batch norms the statistics of a batch.

    Most models keep those of their pretrained backbone; with random weights
    and statistics of 0 and 1 activations grow from layer to layer until a
    softmax is certain and has no gradient.
    """
    modes = {module: module.training for module in model.modules()}
    # Those with an epsilon of 0 can only be frozen (NAS-FCOS).
    norms = [
        m for m in model.modules() if isinstance(m, _BatchNorm) and m.eps > 0
    ]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.training = norm in norms
    for norm in norms:
        norm.momentum = 1.
    losses_of(model, batch)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    for module, mode in modes.items():
        module.training = mode


class Check:
    """The five checks of one config.

    Args:
        config (ZooConfig): The config.
        folder (Path): For the teacher's checkpoint.
    """

    def __init__(self, config: ZooConfig, folder: Path) -> None:
        self.package, self.folder = config.package, folder
        try:
            self.cfg = load(config)
            self.plain = build(self.cfg.model, self.package, seed=0)
        except Exception as error:
            raise PlainModelFails(last_line(error)) from error
        build_tap(self.plain)  # says so if it has no class predictions
        self.batch, self.size = find_batch(self.plain, self.cfg, self.package)
        calibrate(self.plain, self.batch)
        self.weights = self.plain.state_dict()
        # Another that has computed no loss: some keep count in attributes.
        self.plain = build(self.cfg.model, self.package, seed=0)
        self.plain.load_state_dict(self.weights, strict=False)
        self.plain.train()
        self.plain_losses = spread(losses_of(self.plain, self.batch))

    def wrapper(self, teacher: Dict[str, Tensor], loss: str) -> nn.Module:
        """A wrapper whose student has the plain model's weights."""
        wrapper = build_wrapper(self.cfg.model, self.cfg.model, teacher,
                                self.package, self.folder, loss)
        # DDQ's weights have more names once it has computed a loss.
        wrapper.load_state_dict(self.weights, strict=False)
        return wrapper

    def run(self) -> Dict[str, Any]:
        """Which checks pass, and what was measured."""
        passed, measured = self.differing_teacher()
        passed['c'] = self.identical_kl()
        return dict(passed=passed, size=self.size, **measured)

    def differing_teacher(self) -> Tuple[Dict[str, bool], Dict[str, Any]]:
        """All checks but one; their wrapper is gone afterwards."""
        teacher = build(self.cfg.model, self.package, seed=1)
        calibrate(teacher, self.batch)
        teacher = teacher.state_dict()
        wrapper = self.wrapper(teacher, 'DISTLoss').train()
        losses = losses_of(wrapper, self.batch)
        kd = {k: v for k, v in losses.items() if k.startswith('loss_kd')}
        own = spread({k: v for k, v in losses.items() if k not in kd})
        passed = dict(
            a=all(0 < float(v) < float('inf') for v in kd.values()),
            b=self.gradient_is_right(wrapper, kd, teacher),
            d=_equal(own, self.plain_losses),
            e=self.loads(wrapper))
        return passed, dict(
            losses={
                k: float(v)
                for k, v in kd.items()
            },
            tap=type(wrapper.distillation.tap).__name__,
            pairs=wrapper.distillation.tap.describe(
                wrapper, wrapper.distillation.teacher.model))

    def gradient_is_right(self, wrapper: nn.Module, kd: Dict[str, Tensor],
                          weights: Dict[str, Tensor]) -> bool:
        """It reaches a weight of a tapped head; the teacher is untouched."""
        sum(kd.values()).backward()
        heads = [
            wrapper.get_submodule(p) for p in wrapper.distillation.tap.heads
        ]
        reached = any(p.grad is not None and p.grad.abs().max() > 0
                      for head in heads for p in head.parameters())
        teacher = wrapper.distillation.teacher.model
        state = teacher.state_dict()
        return (reached and all(p.grad is None for p in teacher.parameters())
                and all(
                    torch.equal(state[name], weights[name])
                    for name in state.keys() & weights.keys()))

    def identical_kl(self) -> bool:
        """The KL divergence of an identical student from it is 0."""
        same = self.wrapper(self.weights, 'KDLoss').eval()
        # Other kernels, which round otherwise, compute gradients.
        same.kd_student.requires_grad_(False)
        # Some decide by the mode whether they can compute a loss (DINO's
        # denoising queries): their outermost module is in training mode, or
        # all that have no layers of randomness.
        student = same.kd_student
        blocks = [
            m for m in student.modules()
            if any(m.children()) and not isinstance(m, nn.MultiheadAttention)
        ]
        for training in ([], [student], blocks):
            for module in training:
                module.training = True
            try:
                return _kl(same, self.batch) < KL_TOLERANCE
            except Exception as error:
                problem = error
        raise problem

    def loads(self, wrapper: nn.Module) -> bool:
        """The plain model takes all of the wrapper's weights and no other."""
        self.plain.load_state_dict(wrapper.state_dict(), strict=True)
        return True


def _kl(wrapper: nn.Module, batch: Dict[str, Any]) -> float:
    """The largest KL divergence of what the teacher says from the student's.

    Heads with further outputs in training (DDRNet) learn all of them from
    the teacher's one, which is the same as one of theirs.
    """
    ask = wrapper.distillation.teacher.batch

    # LightHamHead draws numbers in eval mode.
    def asked_from_seed(*args, **kwargs):
        batch = ask(*args, **kwargs)
        batch.computing = partial(_from_seed, batch.computing)
        return batch

    seed_everything()
    data = wrapper.data_preprocessor(copy.deepcopy(batch), True)
    with replaced(wrapper.distillation.teacher, 'batch', asked_from_seed):
        pairs = wrapper.kd_pairs(data['inputs'], data['data_samples'])
    divergences = defaultdict(list)
    for pair in pairs:
        terms = wrapper.distillation.loss.terms(pair.student, pair.teacher,
                                                pair.student_activation,
                                                pair.teacher_activation)
        divergences[pair.teacher.data_ptr()].append(float(terms['kl']))
    return max(min(values) for values in divergences.values())


@contextmanager
def _from_seed(computing: Callable) -> Iterator[None]:
    with computing():
        seed_everything()
        yield


def _equal(ours: Dict[str, Tensor], theirs: Dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].nan_to_num(), theirs[name].nan_to_num())
        for name in ours)


def check(config: ZooConfig) -> Dict[str, Any]:
    """Check one config in this process."""
    import mmdist  # noqa: F401
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    tell_progress()
    # Some configs name files relative to the folder of the configs.
    os.chdir(mim_folder(config.package))
    report: Dict[str, Any] = dict(status=FAILS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            report.update(Check(config, Path(folder)).run())
        missed = [c for c, passed in report['passed'].items() if not passed]
        report['status'] = FAILS if missed else PASSES
        report['reason'] = '; '.join(f'not {CHECKS[c]}' for c in missed)
    except PlainModelFails as error:
        report.update(status=PLAIN, reason=str(error))
    except Exception as error:
        none = isinstance(error, NoClassLogitsError)
        report.update(
            status=NO_CLASSES if none else FAILS,
            reason=last_line(error),
            traceback=traceback.format_exc())
    return report


def _child(config: ZooConfig, connection) -> None:
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        connection.send(check(config))


def check_in_child(config: ZooConfig, seconds: float) -> Dict[str, Any]:
    """Check one config in a process of its own, which may crash."""
    context = multiprocessing.get_context('forkserver')
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(config, sender))
    begun = time.monotonic()
    child.start()
    sender.close()
    try:
        report = receiver.recv() if receiver.poll(seconds) else dict(
            status=FAILS, reason=f'{CUT_OFF} {seconds:g} s')
    except EOFError:
        child.join()
        report = dict(status=FAILS, reason=f'{ENDED} {child.exitcode}')
    child.kill()
    child.join()
    return dict(
        package=config.package,
        family=config.family,
        config=config.name,
        seconds=round(time.monotonic() - begun, 1),
        **report)


def check_one_of(configs: List[ZooConfig], seconds: float) -> Dict[str, Any]:
    """Check configs until one has classes and trains here without mmdist."""
    reports = []
    for config in configs[:MAX_TRIES]:
        report = check_in_child(config, seconds)
        # Another config of the family may take less memory or time.
        if report['status'] in (PASSES, FAILS) and not _was_stopped(report):
            return report
        reports.append(report)
    # A check that was stopped is no answer; of reasons that of no classes says
    # more.
    return next((r for r in reports if _was_stopped(r)),
                next((r for r in reports if r['status'] == NO_CLASSES),
                     reports[0]))


def _was_stopped(report: Dict[str, Any]) -> bool:
    """Whether a machine that is short of memory or time ended a check."""
    return report['reason'].startswith((CUT_OFF, ENDED))


def check_all(groups: List[List[ZooConfig]], jobs: int, seconds: float,
              done: List[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
    """Check groups of configs side by side, with progress.

    One that is cut off or killed (the largest take 16 GB) is checked again
    when the others are done, alone.

    Args:
        groups (list[list[ZooConfig]]): Of each, one config is enough.
        jobs (int): Processes at a time.
        seconds (float): Time for a config.
        done (list[dict]): Reports of groups that need no check any more.

    Yields:
        dict: Reports, as they are ready.
    """
    multiprocessing.get_context('forkserver').set_forkserver_preload(
        ['torch', 'mmdet.models', 'mmseg.models', 'mmdist'])
    known = {report['config'] for report in done}
    left = [g for g in groups if not known & {config.name for config in g}]
    again = []
    with ThreadPoolExecutor(jobs) as pool:
        groups = {pool.submit(check_one_of, g, seconds): g for g in left}
        for future in track(
                as_completed(groups), 'Checking', total=len(groups)):
            report = _shown(future.result())
            if _was_stopped(report):
                again.append(groups[future])
            else:
                yield report
    for group in track(again, 'Checking again, alone', disable=not again):
        yield _shown(check_one_of(group, seconds))


def _shown(report: Dict[str, Any]) -> Dict[str, Any]:
    print(f'{report["config"]}: {report["status"]} {report["reason"]}')
    return report


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix('.partial')
    part.write_text(text)
    part.replace(path)


def markdown(reports: List[Dict[str, Any]]) -> str:
    """A page with the table of all reports."""
    checks = [f'- {text}' for text in CHECKS.values()]
    lines = [
        '# The zoo', '',
        'Written by `make zoo`. Of every family of the installed packages the '
        'first config that trains', 'on a CPU is checked, with random weights '
        'and a synthetic batch:', '', *checks, '',
        '"Plain model does not train here" is the error of MMDetection or '
        'MMSegmentation alone,', f'with {versions()}.', ''
    ]
    for package, title in PACKAGES.items():
        part = [r for r in reports if r['package'] == package]
        if part:
            lines += [f'## {title}', '', *_table(part), '']
    return '\n'.join(lines)


def versions() -> str:
    """The versions of what decides which models train."""
    names = ('torch', 'torchvision', 'mmcv', 'mmdet', 'mmsegmentation',
             'mmpretrain', 'transformers', 'onedl-mmcv', 'onedl-mmdetection',
             'onedl-mmsegmentation', 'onedl-mmpretrain')
    found = []
    for name in names:
        try:
            found.append(f'{name} {metadata.version(name)}')
        except metadata.PackageNotFoundError:
            continue
    return ', '.join(found)


def _table(reports: List[Dict[str, Any]]) -> List[str]:
    counts = Counter(report['status'] for report in reports)
    numbers = ', '.join(f'{n} {s}' for s, n in counts.most_common())
    rows = []
    for r in reports:
        name = r['config'].partition('/')[2]
        what = r['pairs'] if r['status'] == PASSES else r['reason']
        what = what.replace('|', '\\|')
        rows.append(f'| {r["family"]} | {name} | {r["status"]} | {what} |')
    return [
        f'{len(reports)} families: {numbers}.', '',
        '| family | config | result | pairs, or the reason |',
        '| --- | --- | --- | --- |', *rows
    ]


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--package', choices=list(PACKAGES), help='default: both')
    parser.add_argument(
        '--family', nargs='+', help='only these folders of configs')
    parser.add_argument(
        '--config',
        nargs='+',
        help='only these names, which may have * in them')
    parser.add_argument(
        '--all-configs',
        action='store_true',
        help='every config instead of the first of a family that trains')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument(
        '--timeout', type=float, default=1800, help='seconds a config')
    parser.add_argument('--json', type=Path, help='write all reports there')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='keep the reports that --json holds, and check the others')
    parser.add_argument('--markdown', type=Path, help='write a table there')
    return parser.parse_args(argv)


def select(args: argparse.Namespace) -> List[List[ZooConfig]]:
    """The configs that the user asked for, of each group one is enough."""
    packages = [args.package] if args.package else list(PACKAGES)
    groups = []
    for package in packages:
        for family, files in zoo_configs(package).items():
            if args.family and family not in args.family:
                continue
            if args.config:
                files = [
                    f for f in files if any(
                        fnmatch(f.path.name, pattern)
                        for pattern in args.config)
                ]
            every = args.all_configs or args.config
            groups += [[f] for f in files] if every else [files]
    return groups


def main() -> None:
    args = parse_args()
    groups = select(args)
    if not groups:
        sys.exit('No config of the zoo is of that name.')
    reports = []
    if args.resume and args.json and args.json.exists():
        reports = json.loads(args.json.read_text())
    for report in check_all(groups, args.jobs, args.timeout, list(reports)):
        reports.append(report)
        reports.sort(key=lambda r: (r['package'], r['family'], r['config']))
        if args.json:
            write(args.json, json.dumps(reports, indent=1))
    if args.markdown:
        write(args.markdown, markdown(reports))
    counts = Counter(report['status'] for report in reports)
    print('\n'.join(f'{number:4} {status}'
                    for status, number in counts.most_common()))
    sys.exit(1 if counts[FAILS] else 0)


if __name__ == '__main__':
    run_tool(main)
