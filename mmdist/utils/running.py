"""Running what a config says: what is checked before, and kept after."""
import os.path as osp
from contextlib import contextmanager
from typing import Iterator, Sized

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

LOOK_AT = ('see whether data_root, ann_file and data_prefix name the right '
           'files, metainfo.classes the right classes, and whether '
           'filter_cfg leaves any')


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
    if loop == 'train':
        _refuse_resumed_fsdp(cfg)
        _refuse_no_file(cfg)
    with _config_kept(cfg) as started:
        runner = _build_runner(cfg)
        runner.register_hook(started)
        if loop == 'train':
            _refuse_empty_data(runner)
        getattr(runner, loop)()
    if torch.distributed.is_initialized():
        # A thread of gloo that is still busy at Python's own end aborts a
        # process that had done all its work; after DDP some stay, but idle.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class _Started(Hook):
    """Knows whether a run has trained."""
    yes = False

    def after_train_iter(self, *args, **kwargs) -> None:
        self.yes = True


@contextmanager
def _config_kept(cfg: Config) -> Iterator[_Started]:
    """Leave the config of an earlier run alone if this one does not start.

    MMEngine writes the config into ``work_dir`` before it reads any data.
    """
    path = osp.join(cfg.work_dir, osp.basename(cfg.filename))
    before = None
    if osp.isfile(path):
        with open(path, 'rb') as file:
            before = file.read()
    started = _Started()
    try:
        yield started
    except BaseException:
        if before is not None and not started.yes and is_main_process():
            with open(path, 'wb') as file:
                file.write(before)
        raise


def _refuse_resumed_fsdp(cfg: Config) -> None:
    """MMEngine hands PyTorch's loader of the optimizer's state its arguments
    in another order, and PyTorch reads no shards without running code."""
    strategy = cfg.get('strategy') or {}
    if cfg.get('resume') and strategy.get('type') == 'FSDPStrategy':
        raise ValueError(
            'FSDPStrategy cannot resume a run with this PyTorch; train on '
            'from the weights alone: load_from=<checkpoint> without resume, '
            "with the strategy's state_dict_type='FULL_STATE_DICT'")


def _refuse_no_file(cfg: Config) -> None:
    """Before models are built and data is read, which takes its time."""
    path = cfg.get('load_from')
    if path and '://' not in path and not osp.exists(osp.expanduser(path)):
        raise FileNotFoundError(
            f'load_from={path!r}: there is no such checkpoint')


def _refuse_empty_data(runner: Runner) -> None:
    """Build the data of training and validation, which must not be empty.

    A sampler of an empty data set never returns, or a training ends at once.
    """
    for part in ('train', 'val'):
        name = f'{part}_dataloader'
        loader = getattr(runner, f'_{name}')
        if isinstance(loader, dict):
            loader = _build_data(runner, loader, name)
            setattr(runner, f'_{name}', loader)
        if not isinstance(getattr(loader, 'dataset', None), Sized):
            continue
        if not len(loader.dataset):
            raise ValueError(f'{name}.dataset has no pictures: {LOOK_AT}')
        if isinstance(loader.sampler, Sized) and not len(loader):
            raise ValueError(
                f'{name} has no batch: drop_last leaves none of '
                f'{len(loader.dataset)} pictures; lower its batch_size')


def _build_data(runner: Runner, loader: dict, name: str) -> DataLoader:
    ranks_differ = runner._randomness_cfg.get('diff_rank_seed', False)
    try:
        return runner.build_dataloader(
            loader, seed=runner.seed, diff_rank_seed=ranks_differ)
    except Exception as error:  # MMEngine cannot pack an empty list, either
        raise ValueError(f'{name}.dataset cannot be read or has no pictures '
                         f'({type(error).__name__}: {error}): '
                         f'{LOOK_AT}') from error
