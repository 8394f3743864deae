"""Check that every family of MMDetection and MMSegmentation can be distilled.

For a config of each family, a student and a teacher are built without any
download and compute their losses on a synthetic batch, alone and in the
wrapper.
"""
import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, List

import torch
from mmengine.logging import MMLogger
from zoo_checks import CHECKS, Check, PlainModelFails
from zoo_models import (PACKAGES, last_line, mim_folder, tell_progress,
                        zoo_configs)

from mmdist.errors import ConfigError, NoClassLogitsError
from mmdist.utils import markdown_table, run_tool

PASSES, NO_CLASSES, PLAIN, FAILS = ('passes', 'no class predictions',
                                    'plain model does not train here', 'fails')
# Configs of a family that are tried until one can be checked here.
MAX_TRIES = 6
VERSIONED = ('torch', 'torchvision', 'mmcv', 'mmdet', 'mmsegmentation',
             'mmpretrain', 'transformers', 'onedl-mmcv', 'onedl-mmdetection',
             'onedl-mmsegmentation', 'onedl-mmpretrain')
# What a machine that is short of time or memory does to a check.
CUT_OFF, ENDED = 'not ready after', 'the process ended with'


def check(config: str) -> Dict[str, Any]:
    """Check one config in this process."""
    import mmdist  # noqa: F401
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    tell_progress()
    # Some configs name files relative to the folder of the configs.
    os.chdir(mim_folder(config.partition('::')[0]))
    report: Dict[str, Any] = dict(status=FAILS)
    try:
        with tempfile.TemporaryDirectory() as folder:
            checks = Check(config, Path(folder))
            passes, report['features'] = checks.features()
            report['passed'] = dict(f=passes)
            report.update(checks.classes())
        report['passed']['f'] = passes
        missed = [c for c, ok in report['passed'].items() if ok is False]
        report['status'] = FAILS if missed else PASSES
        report['reason'] = '; '.join(f'not {CHECKS[c]}' for c in missed)
    except PlainModelFails as error:
        report.update(status=PLAIN, reason=str(error))
    except Exception as error:
        none = isinstance(error, NoClassLogitsError)
        none = none and report.get('passed') != dict(f=False)
        report.update(
            status=NO_CLASSES if none else FAILS,
            reason=last_line(error),
            traceback=traceback.format_exc())
    return report


def _child(config: str, connection) -> None:
    with open(os.devnull, 'w') as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        connection.send(check(config))


def check_in_child(config: str, seconds: float) -> Dict[str, Any]:
    """Check one config in a process of its own, which may crash."""
    package, _, file = config.partition('::')
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
        package=package,
        family=file.partition('/')[0],
        config=config,
        seconds=round(time.monotonic() - begun, 1),
        **report)


def check_one_of(configs: List[str], seconds: float) -> Dict[str, Any]:
    """Check configs until one has classes and trains here without mmdist."""
    reports = []
    for config in configs[:MAX_TRIES]:
        report = check_in_child(config, seconds)
        # Another config of the family may take less memory or time.
        if report['status'] in (PASSES, FAILS) and not was_stopped(report):
            return report
        reports.append(report)
    # A check that was stopped is no answer; of reasons that of no classes says
    # more.
    stopped = [r for r in reports if was_stopped(r)]
    classless = [r for r in reports if r['status'] == NO_CLASSES]
    return (stopped + classless + reports)[0]


def was_stopped(report: Dict[str, Any]) -> bool:
    """Whether a machine that is short of memory or time ended a check."""
    return report['reason'].startswith((CUT_OFF, ENDED))


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
    installed = {d.name: d.version for d in metadata.distributions()}
    return ', '.join(f'{name} {installed[name]}' for name in VERSIONED
                     if name in installed)


def _table(reports: List[Dict[str, Any]]) -> List[str]:
    counts = Counter(report['status'] for report in reports)
    numbers = ', '.join(f'{n} {s}' for s, n in counts.most_common())
    refused = sum(r['status'] == PASSES and r['passed']['f'] is None
                  for r in reports)
    numbers += f'; {refused} without a feature loss' if refused else ''
    rows = []
    for r in reports:
        what = r['pairs'] if r['status'] == PASSES else r['reason']
        rows.append({
            'family': r['family'],
            'config': r['config'].partition('/')[2],
            'result': r['status'],
            'pairs, or the reason': what.replace('|', '\\|'),
            'features': r.get('features', '').replace('|', '\\|')
        })
    return [f'{len(reports)} families: {numbers}.', '', markdown_table(rows)]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--config',
        nargs='+',
        default=[],
        metavar='NAME',
        help="every config of these names, such as 'mmdet::atss/*', instead "
        'of the first of a family that trains')
    parser.add_argument('--jobs', type=int, default=os.cpu_count())
    parser.add_argument(
        '--timeout', type=float, default=1800, help='seconds a config')
    parser.add_argument('--json', type=Path, help='write all reports there')
    parser.add_argument(
        '--resume',
        action='store_true',
        help='keep the reports that --json holds, and check the others and '
        'what was cut off')
    parser.add_argument('--markdown', type=Path, help='write a table there')
    return parser.parse_args()


def select(names: List[str]) -> List[List[str]]:
    """The configs to check; one of each group is enough."""
    groups = [
        configs for package in PACKAGES
        for configs in zoo_configs(package).values()
    ]
    if not names:
        return groups
    return [[config] for configs in groups for config in configs if any(
        fnmatch(config, name) for name in names)]


def main() -> None:
    args = parse_args()
    groups = select(args.config)
    if not groups:
        raise ConfigError('--config', 'no config of the zoo has such a name',
                          "write for instance 'mmdet::atss/*'")
    reports = []
    if args.resume and args.json and args.json.exists():
        reports = [
            r for r in json.loads(args.json.read_text()) if not was_stopped(r)
        ]
    multiprocessing.get_context('forkserver').set_forkserver_preload(
        ['torch', 'mmdet.models', 'mmseg.models', 'mmdist'])
    # The second round repeats, one at a time, the checks that ran out of time
    # or memory: the largest models take 16 GB.
    for jobs in (args.jobs, 1):
        known = {r['config'] for r in reports if not was_stopped(r)}
        with ThreadPoolExecutor(jobs) as pool:
            futures = {
                pool.submit(check_one_of, group, args.timeout): group
                for group in groups if known.isdisjoint(group)
            }
            for future in as_completed(futures):
                report = future.result()
                print(
                    report['config'],
                    report['status'],
                    report['reason'],
                    flush=True)
                reports = [
                    r for r in reports if r['config'] not in futures[future]
                ]
                reports.append(report)
                reports.sort(
                    key=lambda r: (r['package'], r['family'], r['config']))
                if args.json:
                    part = args.json.with_suffix('.partial')
                    part.write_text(json.dumps(reports, indent=1))
                    part.replace(args.json)
    if args.markdown:
        args.markdown.write_text(markdown(reports))
    counts = Counter(report['status'] for report in reports)
    print('\n'.join(f'{number:4} {status}'
                    for status, number in counts.most_common()))
    sys.exit(1 if counts[FAILS] else 0)


if __name__ == '__main__':
    run_tool(main)
