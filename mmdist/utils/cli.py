"""What the command-line tools share."""
import argparse
import logging
import os
import os.path as osp
import re
import sys
import tempfile
import traceback
from typing import Callable, Optional

from mmengine.config import Config, DictAction
from mmengine.dist import get_rank, is_main_process
from mmengine.logging import MMLogger

TRACEBACK = 'MMDIST_TRACEBACK'
# How PyTorch sends an error of a data loader's worker.
WORKER_STACK = '\nOriginal Traceback (most recent call last):\n'


def tool_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags of all MM tools; the config comes first."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file path')
    parser.add_argument('--work-dir', help='the dir to save logs and models')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override some settings in the used config, the key-value pair '
        'in xxx=yyy format will be merged into config file. If the value to '
        'be overwritten is a list, it should be like key="[a,b]" or key=a,b '
        'It also allows nested list/tuple values, e.g. key="[(a,b),(c,d)]" '
        'Note that the quotation marks are necessary and that no white space '
        'is allowed.')
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
    """The flag of tools for what configs call ``model.teacher.class_map``."""
    parser.add_argument(
        '--class-map',
        nargs='+',
        action=ClassMapAction,
        metavar='CLASS',
        help='for a teacher of more classes, or in another order: the word '
        "names, which finds the student's classes by their names, or the "
        "teacher's class for each of the student's, by name or label")


def load_tool_config(args: argparse.Namespace) -> Config:
    """The config with what the flags of :func:`tool_parser` say."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    try:
        cfg = Config.fromfile(args.config)
    except Exception as error:
        raise ValueError(f'{args.config} cannot be read as a config '
                         f'({type(error).__name__}: {error})') from error
    if 'model' not in cfg:
        raise ValueError(f'{args.config} has no `model`: it is no config of '
                         'MMDetection or MMSegmentation')
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    # The command line goes before the config, and that before the file name.
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name))
    return cfg


def run_tool(main: Callable[[], None]) -> None:
    """Run a tool's ``main``; of an error show the sentence, not the stack.

    The stack goes to the log file of the run, if it has one, and to the
    terminal if the environment has ``MMDIST_TRACEBACK=1``.

    Raises:
        SystemExit: If the tool failed (1) or was interrupted (130).
    """
    try:
        main()
    except KeyboardInterrupt:
        print('Interrupted', file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if os.environ.get(TRACEBACK, '0') != '0':
            raise
        log = _log_stack(error)
        where = f'the whole traceback is in {log}' if log else (
            f'{TRACEBACK}=1 shows the whole traceback')
        sys.exit(f'{_sentence(error)}\n'
                 f'({_last_frame(error)}; {where})')


def _sentence(error: BaseException) -> str:
    """The error in one line; that of a data loader's worker without the
    stack that PyTorch writes before it."""
    text = f'{type(error).__name__}: {error}'.rstrip()
    if WORKER_STACK in text:
        text = re.split(r'\n(?! )', text)[-1]
    return ' '.join(text.split())


def _last_frame(error: BaseException) -> str:
    """Where an error was raised for the first time.

    MMEngine's registries raise it again, with the name of the class before.
    """
    while _says_again(error, error.__context__):
        error = error.__context__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{frame.filename}, line {frame.lineno}, in {frame.name}'


def _says_again(error: BaseException, cause: Optional[BaseException]) -> bool:
    return bool(
        cause and cause.__traceback__ and str(cause)
        and str(cause) in str(error))


def _log_stack(error: BaseException) -> Optional[str]:
    """Write the stack of an error into the log files of the run."""
    path, logger = None, MMLogger.get_current_instance()
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(
                logger.makeRecord(logger.name, logging.ERROR, __file__, 0,
                                  str(error), (),
                                  (type(error), error, error.__traceback__)))
            path = handler.baseFilename
    if path is None and not is_main_process():  # MMEngine logs the main one's
        path = osp.join(tempfile.mkdtemp(), f'mmdist_rank_{get_rank()}.txt')
        with open(path, 'w') as file:
            traceback.print_exception(
                type(error), error, error.__traceback__, file=file)
    return path
