"""What importing mmdist checks and prepares."""
import importlib.metadata
import os
import pickle
import subprocess
import sys
import warnings

import mmcv
import mmengine
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.model import BaseModel
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import Runner, load_checkpoint
from torch import nn
from torch.utils.data import DataLoader

from mmdist.utils import (allow_mmengine_checkpoints, check_version,
                          find_forks_configs)
from mmdist.utils.setup_env import SUPPORTED_VERSIONS

# check_version


def warnings_of(module, version):
    """The warnings of a version that is not refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        check_version(module, version)
    return [str(warning.message) for warning in caught]


def changed(version, part, by):
    """A version with one of its three numbers changed."""
    numbers = [int(number) for number in version.split('.')]
    numbers[part] += by
    return '.'.join(map(str, numbers))


@pytest.mark.parametrize('module', SUPPORTED_VERSIONS)
def test_both_bounds_are_supported(module):
    """No error and no warning, with a local suffix or without."""
    for version in SUPPORTED_VERSIONS[module]:
        for suffix in ('', '+cpu', '+cu128'):
            assert warnings_of(module, version + suffix) == []


@pytest.mark.parametrize('module', SUPPORTED_VERSIONS)
@pytest.mark.parametrize('suffix', ['', '+cpu'])
def test_an_older_version_is_refused(module, suffix):
    """One sentence with the module, its version and the lowest one."""
    lowest = SUPPORTED_VERSIONS[module][0]
    part = 1 if lowest.endswith('.0') else 2
    older = changed(lowest, part, -1)
    with pytest.raises(AssertionError) as error:
        check_version(module, older + suffix)
    text = str(error.value)
    assert f'{module}=={older}' in text and f'{module}>={lowest}' in text


@pytest.mark.parametrize('module', SUPPORTED_VERSIONS)
@pytest.mark.parametrize('part', [0, 1, 2])
def test_a_newer_version_warns(module, part):
    """Once, with both versions; it may well work."""
    highest = SUPPORTED_VERSIONS[module][1]
    newer = changed(highest, part, 1)
    texts = warnings_of(module, f'{newer}+cu128')
    assert len(texts) == 1
    assert f'{module}=={newer} ' in texts[0] and highest in texts[0]


def test_versions_are_compared_as_numbers():
    """2.10 is newer than 2.6, and a candidate older than its release."""
    assert warnings_of('torch', '2.10.0') == []
    lowest = SUPPORTED_VERSIONS['torch'][0]
    with pytest.raises(AssertionError):
        check_version('torch', f'{lowest}rc1')


def test_this_stack_is_supported():
    """The tests run on versions that users are not warned of."""
    for module in (torch, mmengine, mmcv):
        assert warnings_of(module.__name__, module.__version__) == []


# allow_mmengine_checkpoints


@pytest.fixture(autouse=True)
def allowed():
    """As after the import: the fork's own loading takes globals back."""
    allow_mmengine_checkpoints()


class Numbers(torch.utils.data.Dataset):
    """Four fixed pairs."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor([1. + index, 2.]), torch.tensor([3. * index])


class Line(BaseModel):
    """A linear regression, and something logged from NumPy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(2, 1)

    def forward(self, x, y, mode='loss'):
        """The squared error."""
        MessageHub.get_current_instance().update_info('from_numpy',
                                                      np.float64(y.mean()))
        return dict(loss=(self.layer(x) - y).square().mean())


def train(work_dir, max_iters, **options):
    """Train with MMEngine alone, a checkpoint every second iteration."""
    dataset = Numbers()
    loader = DataLoader(
        dataset, 2, sampler=DefaultSampler(dataset, shuffle=False))
    name = f'{os.path.basename(work_dir)}_{max_iters}_{os.getpid()}'
    runner = Runner(
        Line(),
        str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=False, max_iters=max_iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=1e-2, momentum=0.9)),
        param_scheduler=dict(
            type='LinearLR', start_factor=0.1, end=4, by_epoch=False),
        default_hooks=dict(checkpoint=CheckpointHook(2, by_epoch=False)),
        experiment_name=name,
        log_level='ERROR',
        **options)
    runner.train()
    return runner


@pytest.fixture(scope='module')
def work_dir(tmp_path_factory):
    """What a run of two iterations leaves behind."""
    folder = tmp_path_factory.mktemp('run')
    train(folder, 2)
    return folder


def test_mmengines_checkpoint_loads_restricted(work_dir):
    """Everything in it, equal to what the unrestricted unpickler reads."""
    path = work_dir / 'iter_2.pth'
    ours = torch.load(path, weights_only=True)
    plain = torch.load(path, weights_only=False)
    assert ours.keys() == plain.keys()
    for key, value in plain['state_dict'].items():
        assert torch.equal(ours['state_dict'][key], value)
    ours, plain = ours['message_hub'], plain['message_hub']
    assert ours['runtime_info'] == plain['runtime_info']
    assert type(ours['runtime_info']['from_numpy']) is np.float64
    scalars = plain['log_scalars']
    assert 'train/loss' in scalars
    for name, buffer in scalars.items():
        assert isinstance(ours['log_scalars'][name], HistoryBuffer)
        for a, b in zip(ours['log_scalars'][name].data, buffer.data):
            assert a.dtype == b.dtype and np.array_equal(a, b)
        assert ours['log_scalars'][name].mean() == buffer.mean()


@pytest.mark.parametrize('scheduler', [
    dict(type='OneCycleLR', eta_max=0.1, total_steps=10),
    dict(
        type='OneCycleLR',
        eta_max=0.1,
        total_steps=10,
        anneal_strategy='linear'),
    dict(type='ReduceOnPlateauLR', monitor='loss'),
    dict(type='CosineRestartLR', periods=[5], eta_min=0.),
    dict(type='PolyLR', end=10),
    dict(type='MultiStepLR', milestones=[5]),
    dict(type='ExponentialMomentum', gamma=0.9),
])
def test_the_state_of_a_scheduler_loads_restricted(tmp_path, scheduler):
    """Resuming takes the schedule up where it was."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1, 0.9)
    before, after = (
        PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer))
        for _ in range(2))
    torch.save(before.state_dict(), tmp_path / 'state.pth')
    after.load_state_dict(torch.load(tmp_path / 'state.pth'))
    assert vars(after) == vars(before)


def load_elsewhere(path, imports):
    """Load restricted in a fresh process, as MMEngine does by default."""
    code = (f'import {imports}, torch; '
            f'torch.load({str(path)!r}, weights_only=True); print("loaded")')
    return subprocess.run([sys.executable, '-c', code],
                          capture_output=True,
                          text=True,
                          env=dict(os.environ, PYTHONWARNINGS='ignore'))


@pytest.mark.slow
@pytest.mark.parametrize('imports, loads', [('mmengine', False),
                                            ('mmdist', True)])
def test_only_with_mmdist_it_loads_in_a_fresh_process(work_dir, repo, imports,
                                                      loads, monkeypatch):
    """Stock MMEngine fails on its own checkpoint; the import mends it."""
    monkeypatch.setenv('PYTHONPATH', repo)
    result = load_elsewhere(work_dir / 'iter_2.pth', imports)
    assert ('loaded' in result.stdout) == loads, result.stderr
    assert ('Weights only load failed' in result.stderr) != loads


def test_stock_resume_equals_the_uninterrupted_run(work_dir, tmp_path):
    """Weights, momentum, learning rate, iteration and the logged history."""
    resumed = train(
        tmp_path / 'resumed',
        4,
        resume=True,
        load_from=str(work_dir / 'iter_2.pth'))
    whole = train(tmp_path / 'whole', 4)
    assert resumed.iter == whole.iter == 4
    for a, b in zip(resumed.model.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)
    histories = [
        runner.message_hub.get_scalar('train/loss').data[0]
        for runner in (resumed, whole)
    ]
    assert len(histories[0]) == 4 and np.array_equal(*histories)
    assert resumed.message_hub.get_scalar('train/lr').data[0].tolist() == (
        whole.message_hub.get_scalar('train/lr').data[0].tolist())


def test_stock_load_checkpoint_works(work_dir):
    """MMEngine's own function, as every tool calls it."""
    model = Line()
    nn.init.zeros_(model.layer.weight)
    path = work_dir / 'iter_2.pth'
    load_checkpoint(model, str(path))
    expected = torch.load(path, weights_only=False)['state_dict']
    assert torch.equal(model.layer.weight, expected['layer.weight'])


class Call:
    """Pickled as the call of a function, as an attacker would."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def save(content, folder):
    """Write a checkpoint and return its path."""
    path = folder / 'checkpoint.pth'
    torch.save(content, path)
    return path


@pytest.mark.parametrize('name', ['min', 'max', 'current', 'mean'])
def test_the_statistics_of_a_history_buffer_may_be_read(tmp_path, name):
    """The four that MMEngine pickles, by `getattr`."""
    path = save(Call(getattr, HistoryBuffer, name), tmp_path)
    loaded = torch.load(path, weights_only=True)
    assert loaded is getattr(HistoryBuffer, name)


@pytest.mark.parametrize('owner, name', [
    (HistoryBuffer, 'update'),
    (HistoryBuffer, '__init__'),
    (HistoryBuffer, '__globals__'),
    (HistoryBuffer, 'register_statistics'),
    (HistoryBuffer, '_set_default_statistics'),
    (np.ndarray, 'mean'),
    (np.ndarray, 'tofile'),
    (np.dtype, '__class__'),
    (torch.Tensor, 'mean'),
    (torch.Tensor, '__reduce_ex__'),
    ('text', 'format'),
])
def test_nothing_else_may_be_read(tmp_path, owner, name):
    """`getattr` on whatever the unpickler knows is refused."""
    path = save(Call(getattr, owner, name), tmp_path)
    with pytest.raises((pickle.UnpicklingError, AttributeError)):
        torch.load(path, weights_only=True)


def test_a_statistic_cannot_be_called(tmp_path):
    """It may be read, not run on something of the file's choice."""
    path = save(Call(Call, getattr, HistoryBuffer, 'mean'), tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize('function, args', [
    (os.system, ('touch {mark}', )),
    (eval, ('open("{mark}", "w")', )),
    (open, ('{mark}', 'w')),
    (os.mkdir, ('{mark}', )),
    (np.fromfile, ('{mark}', )),
])
def test_other_functions_stay_refused(tmp_path, function, args):
    """Importing mmdist switches no protection off."""
    mark = tmp_path / 'it_ran'
    args = [arg.format(mark=mark) for arg in args]
    path = save(dict(meta=Call(function, *args)), tmp_path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert not mark.exists()


def test_the_real_getattr_is_not_among_the_safe_globals():
    """Nor `eval` and its like; only the stand-in under its name."""
    safe = torch.serialization.get_safe_globals()
    functions = [g[0] if isinstance(g, tuple) else g for g in safe]
    assert not {getattr, setattr, eval, exec, open, __import__
                } & {f
                     for f in functions if callable(f)}
    names = [g[1] for g in safe if isinstance(g, tuple)]
    assert 'builtins.getattr' in names


@pytest.mark.parametrize('installed', [True, False])
def test_bases_of_mmseg_are_found_in_any_distribution(installed, tmp_path,
                                                      monkeypatch):
    """The fork of mmsegmentation has another name; nothing is installed."""

    def version(name):
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setattr('importlib.metadata.version', version)
    find_forks_configs()
    assert MODULE2PACKAGE['mmseg'] == ('mmsegmentation'
                                       if installed else 'mmseg')
    monkeypatch.undo()
    find_forks_configs()
    (tmp_path /
     'config.py').write_text("_base_ = 'mmseg::_base_/models/fcn_r50-d8.py'")
    cfg = Config.fromfile(tmp_path / 'config.py')
    assert cfg.model.decode_head.type == 'FCNHead'
