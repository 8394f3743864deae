"""Trains or tests what a config says, after checks of its data."""
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

from mmdist.errors import ConfigError

LOOK_AT = ('see whether data_root, ann_file and data_prefix name the right '
           'files, metainfo.classes the right classes, and whether '
           'filter_cfg leaves any; paths are relative to the folder in which '
           'you start')


def run(cfg: Config, loop: str) -> None:
    """Train or test (``loop``, the runner's method) what a config says.

    Raises:
        ConfigError: If a training cannot begin as the config says.
    """
    if loop == 'train':
        strategy = (cfg.get('strategy') or {}).get('type')
        if cfg.get('resume') and strategy == 'FSDPStrategy':
            # MMEngine gives PyTorch's loader of the optimizer its arguments
            # in another order, and shards would run code.
            raise ConfigError(
                'resume', 'FSDPStrategy cannot resume a run with this PyTorch',
                'train on from the weights alone: load_from=<checkpoint> '
                "without resume, with the strategy's "
                "state_dict_type='FULL_STATE_DICT'")
    path = cfg.get('load_from')  # models are built first, which is slow
    if path and '://' not in path and not osp.exists(osp.expanduser(path)):
        raise ConfigError('load_from' if loop == 'train' else 'CHECKPOINT',
                          f'there is no checkpoint {path!r}')
    if cfg.launcher == 'pytorch' and get_device() == 'cpu':
        # MMEngine would select a GPU for the process, and give one to DDP.
        torch.distributed.init_process_group('gloo')
        cfg.setdefault(
            'model_wrapper_cfg',
            dict(
                type='MMDistributedDataParallel',
                device_ids=None,
                broadcast_buffers=False,
                find_unused_parameters=cfg.get('find_unused_parameters',
                                               False)))
    with _config_kept(cfg) as started:
        runner = RUNNERS.build(
            cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        runner.register_hook(started)
        if loop == 'train':
            for part in ('train', 'val'):
                _build_data(runner, f'{part}_dataloader')
            _check_names(runner)
        getattr(runner, loop)()
    if torch.distributed.is_initialized():
        # A thread of gloo that is still busy at Python's own end aborts a
        # process that had done all its work; after DDP some stay, but idle.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _check_names(runner: Runner) -> None:
    """Refuse now what IoUMetric would refuse in the first validation."""
    dataset = getattr(runner._val_dataloader, 'dataset', None)
    names = getattr(dataset, 'metainfo', dict(classes=True)).get('classes')
    if not names and 'IoUMetric' in str(runner.cfg.get('val_evaluator')):
        raise ConfigError('val_dataloader.dataset',
                          'it has no class names, which IoUMetric needs',
                          'list them in metainfo.classes')


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


def _build_data(runner: Runner, name: str) -> None:
    """Build a data loader of the runner, and refuse one without batches.

    A sampler of an empty data set never returns, or the training ends at once.
    """
    loader = getattr(runner, f'_{name}')
    if isinstance(loader, dict):
        try:
            loader = runner.build_dataloader(
                loader,
                seed=runner.seed,
                diff_rank_seed=runner._randomness_cfg.get(
                    'diff_rank_seed', False))
        except Exception as error:  # MMEngine cannot pack an empty list, too
            raise ConfigError(
                f'{name}.dataset', 'the data cannot be read, or there are no '
                f'images ({type(error).__name__}: {error})',
                LOOK_AT) from error
        setattr(runner, f'_{name}', loader)
    if not isinstance(getattr(loader, 'dataset', None), Sized):
        return
    if not len(loader.dataset):
        raise ConfigError(f'{name}.dataset', 'there are no images', LOOK_AT)
    if isinstance(loader.sampler, Sized) and not len(loader):
        raise ConfigError(
            name, 'there is no batch: drop_last leaves none of '
            f'{len(loader.dataset)} images', 'lower its batch_size')
