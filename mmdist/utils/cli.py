"""Arguments, configs and errors of the command-line tools."""
import argparse
import os
import os.path as osp
import sys
from typing import Callable

from mmengine.config import Config, DictAction

from mmdist.errors import ConfigError


def tool_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of all MM tools; the config comes first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file path')
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: key=value, where a list is '
        'key="[a,b]" or key=a,b and a nested one key="[(a,b),(c,d)]", quoted '
        'and without white space')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher')
    # `torch.distributed.launch` passes --local-rank.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


class ClassMapAction(argparse.Action):
    """Reads ``--class-map``: 'names', or classes as names or labels."""

    def __call__(self, parser, namespace, values, option_string=None):
        classes = [int(word) if word.isdigit() else word for word in values]
        setattr(namespace, self.dest,
                'names' if classes == ['names'] else classes)


def add_class_map(parser: argparse.ArgumentParser) -> None:
    """Add ``--class-map``, the tools' flag for ``model.teacher.class_map``."""
    parser.add_argument(
        '--class-map',
        nargs='+',
        action=ClassMapAction,
        metavar='CLASS',
        help='for a teacher of more classes, or in another order: the word '
        "names, which finds the student's classes by their names, or the "
        "teacher's class for each of the student's, by name or label")


def load_tool_config(args: argparse.Namespace) -> Config:
    """Load the config and apply the flags of :func:`tool_parser` to it.

    Raises:
        ConfigError: If the file is no config of a model.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:
        raise ConfigError(
            'CONFIG', f'{args.config} cannot be read as a config '
            f'({type(error).__name__}: {error})') from error
    if 'model' not in cfg:
        raise ConfigError(
            'CONFIG', f'{args.config} has no `model`',
            'name a config of MMDetection, MMSegmentation or MMPretrain')
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    # The command line goes before the config, and that before the file name.
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name))
    return cfg


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's ``main`` and show a :class:`ConfigError` as one sentence.

    Any other error is a bug, of ours or of a library, and keeps its traceback.

    Raises:
        SystemExit: If the tool was refused (1) or interrupted (130).
    """
    try:
        main()
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(130)
    except ConfigError as error:
        sys.exit(f'Error: {error}')
