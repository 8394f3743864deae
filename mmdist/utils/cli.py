"""What the command-line tools share."""
import argparse
import os
import os.path as osp

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner


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


def load_tool_config(args: argparse.Namespace) -> Config:
    """The config with what the flags of :func:`tool_parser` say."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = Config.fromfile(args.config)
    cfg.launcher = args.launcher
    if args.cfg_options is not None:
        cfg.merge_from_dict(args.cfg_options)
    # The command line goes before the config, and that before the file name.
    name = osp.splitext(osp.basename(args.config))[0]
    cfg.work_dir = (
        args.work_dir or cfg.get('work_dir') or osp.join('./work_dirs', name))
    return cfg


def _join_cpu_processes(cfg: Config) -> None:
    """Let ``torch.distributed.run`` work without an accelerator.

    MMEngine would select a GPU for the process, and give one to DDP.
    """
    torch.distributed.init_process_group('gloo')
    cfg.setdefault(
        'model_wrapper_cfg',
        dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))


def _build_runner(cfg: Config) -> Runner:
    """The runner that a config names, or MMEngine's default one."""
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        _join_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def run(cfg: Config, loop: str) -> None:
    """Build the config's runner, let it work, and leave the other processes.

    Args:
        cfg: What :func:`load_tool_config` gave.
        loop: The runner's method: ``train`` or ``test``.
    """
    getattr(_build_runner(cfg), loop)()
    if torch.distributed.is_initialized():
        # A thread of gloo that outlives Python's own end aborts a process
        # that had done all its work, and the launcher reports a failure.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
