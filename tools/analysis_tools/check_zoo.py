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
from typing import Any, Dict, Iterator, List, Optional

import torch
from mmengine.logging import MMLogger
from rich.progress import track
from zoo_checks import CHECKS, Check, PlainModelFails
from zoo_models import (PACKAGES, ZooConfig, last_line, mim_folder,
                        tell_progress, zoo_configs)

from mmdist.errors import NoClassLogitsError
from mmdist.utils import markdown_table, run_tool

PASSES, NO_CLASSES, PLAIN, FAILS = ('passes', 'no class predictions',
                                    'plain model does not train here', 'fails')
# Configs of a family that are tried until one can be checked here.
MAX_TRIES = 6
# What a machine that is short of time or memory does to a check.
CUT_OFF, ENDED = 'not ready after', 'the process ended with'


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
            checks = Check(config, Path(folder))
            passes, report['features'] = checks.features()
            report['passed'] = dict(f=passes)
            report.update(checks.run())
        report['passed']['f'] = passes
        missed = [c for c, ok in report['passed'].items() if ok is False]
        report['status'] = FAILS if missed else PASSES
        report['reason'] = '; '.join(f'not {CHECKS[c]}' for c in missed)
    except PlainModelFails as error:
        report.update(status=PLAIN, reason=str(error))
    except Exception as error:
        none = isinstance(
            error,
            NoClassLogitsError) and report.get('passed') != dict(f=False)
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
