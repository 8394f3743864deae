"""tools/train.py: MMDetection's flags, on a toy data set."""
import importlib.util
import json
import os.path as osp
import runpy
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from tensorboard.backend.event_processing.event_accumulator import \
    EventAccumulator

from tests import helpers, segmentors
from tests.helpers import (build, checkpoint, detector, distiller_cfg, run_cfg,
                           save_teacher, write_coco)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TRAIN = osp.join(ROOT, 'tools', 'train.py')


@pytest.fixture(scope='module')
def config(tmp_path_factory):
    """The path of a config of one epoch, without a work directory."""
    root = tmp_path_factory.mktemp('train')
    data = write_coco(root / 'data')
    teacher = save_teacher(detector('retina'), root)
    cfg = run_cfg(
        distiller_cfg(detector('retina'), teacher), data, root, epochs=1)
    cfg.pop('work_dir')
    cfg.pop('experiment_name')
    cfg.dump(str(root / 'toy_config.py'))
    return str(root / 'toy_config.py')


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run the tool in this process, as ``python tools/train.py`` would."""
    calls = []

    def run(*arguments):
        # MMEngine names an experiment by the second it starts in.
        calls.append(arguments)
        monkeypatch.setattr('time.strftime', _numbered(tmp_path, len(calls)))
        monkeypatch.setattr(sys, 'argv', [TRAIN, *map(str, arguments)])
        runpy.run_path(TRAIN, run_name='__main__')

    return run


def _numbered(folder, number):
    return lambda *_: f'20260101_{folder.name}_{number}'


@pytest.mark.slow
def test_command_line(config, tmp_path):
    """A checkpoint of the plain student, a log with the terms of DIST."""
    subprocess.run([
        sys.executable, TRAIN, config, '--work-dir',
        str(tmp_path), '--cfg-options', 'optim_wrapper.optimizer.lr=0.005',
        'model.distill_loss.gamma=2.0'
    ],
                   check=True,
                   cwd=ROOT)
    written = Config.fromfile(str(tmp_path / 'toy_config.py'))
    assert written.optim_wrapper.optimizer.lr == 0.005
    assert written.model.distill_loss.gamma == 2
    logs = list(tmp_path.glob('*/vis_data/scalars.json'))
    assert len(logs) == 1
    lines = [json.loads(line) for line in logs[0].read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        parts = ('loss_cls', 'loss_bbox', 'loss_kd_inter', 'loss_kd_intra')
        # Each is rounded to four significant digits in the log, or not.
        assert line['loss'] == pytest.approx(
            sum(line[part] for part in parts), rel=1e-3)
    build(detector('retina')).load_state_dict(
        checkpoint(tmp_path, 1)['state_dict'], strict=True)


TASKS = dict(
    detection=(('mmdet', ), helpers, lambda: detector('faster'), write_coco),
    segmentation=(('mmdet', 'mmseg'), segmentors,
                  lambda: segmentors.segmentor('pspnet'),
                  segmentors.write_masks))


@pytest.mark.slow
@pytest.mark.parametrize('task, hooks',
                         [('detection', []),
                          ('segmentation', [dict(type='mmdist.SeedHook')])])
def test_the_tools_of_the_libraries_train_the_same(task, hooks, tmp_path):
    """Ours adds nothing to a config: losses and weights are bit-equal.

    RoIs are sampled and activations dropped at random.
    """
    libraries, kit, model, write = TASKS[task]
    cfg = kit.run_cfg(
        kit.distiller_cfg(model(), kit.save_teacher(model(), tmp_path)),
        write(tmp_path / 'data'),
        tmp_path,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=20),
        custom_hooks=hooks)
    cfg.pop('work_dir')
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=20)
    cfg.param_scheduler.by_epoch = False
    cfg.dump(str(tmp_path / 'toy.py'))
    tools = dict(ours=TRAIN)
    for name in libraries:
        folder = osp.dirname(importlib.util.find_spec(name).origin)
        tools[name] = osp.join(folder, '.mim', 'tools', 'train.py')
    runs = [
        subprocess.Popen([sys.executable, tool, 'toy.py', '--work-dir', name],
                         cwd=tmp_path) for name, tool in tools.items()
    ]
    assert [run.wait() for run in runs] == [0] * len(runs)
    found = {}
    for name in tools:
        log, = (tmp_path / name).glob('*/vis_data/scalars.json')
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        losses = [{
            k: v
            for k, v in line.items() if 'loss' in k
        } for line in lines]
        assert len(losses) == 20 and 'loss_kd_inter' in losses[0]
        found[name] = losses, torch.load(
            tmp_path / name / 'iter_20.pth', weights_only=False)['state_dict']
    losses, weights = found.pop('ours')
    for other_losses, other_weights in found.values():
        assert losses == other_losses
        assert weights.keys() == other_weights.keys()
        assert all(torch.equal(weights[k], other_weights[k]) for k in weights)


def test_tensorboard_shows_each_term_and_predictions(config, run, tmp_path):
    """A curve each, with the values of the log, and images of validation."""
    cfg = Config.fromfile(config)
    cfg.update(
        val_cfg=dict(),
        val_dataloader=cfg.test_dataloader,
        val_evaluator=cfg.test_evaluator)
    cfg.default_hooks.visualization.update(draw=True, interval=1)
    cfg.visualizer = dict(
        type='DetLocalVisualizer',
        vis_backends=[
            dict(type='LocalVisBackend'),
            dict(type='TensorboardVisBackend')
        ])
    cfg.dump(str(tmp_path / 'curves.py'))
    run(tmp_path / 'curves.py', '--work-dir', tmp_path / 'run')
    folder = next((tmp_path / 'run').glob('*/vis_data'))
    curves = EventAccumulator(str(folder)).Reload()
    lines = [
        json.loads(line)
        for line in (folder / 'scalars.json').read_text().splitlines()
    ]
    for name in ('loss_kd_inter', 'loss_kd_intra', 'kd_grad_ratio'):
        assert [e.value for e in curves.Scalars(name)] == pytest.approx(
            [line[name] for line in lines if name in line], rel=1e-6)
    assert len(curves.Images('val_img')) > 1


def test_resume_goes_on_from_the_last_checkpoint(config, run, tmp_path):
    """--resume finds it; --resume PATH takes the one that is named."""
    run(config, '--work-dir', tmp_path / 'a')
    first = (tmp_path / 'a/epoch_1.pth').stat().st_mtime_ns
    two = ('--cfg-options', 'train_cfg.max_epochs=2')
    run(config, '--work-dir', tmp_path / 'a', '--resume', *two)
    assert (tmp_path / 'a/epoch_1.pth').stat().st_mtime_ns == first
    assert checkpoint(tmp_path / 'a', 2)['meta']['iter'] == 6
    run(config, '--work-dir', tmp_path / 'b', '--resume',
        tmp_path / 'a/epoch_1.pth', *two)
    assert not (tmp_path / 'b/epoch_1.pth').exists()
    ours, theirs = (checkpoint(tmp_path / d, 2)['state_dict'] for d in 'ab')
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_resume_in_an_empty_work_dir_starts(config, run, tmp_path):
    """The same command starts a run and continues it."""
    run(config, '--work-dir', tmp_path, '--resume')
    assert checkpoint(tmp_path, 1)['meta']['iter'] == 3


def test_resume_in_the_config(config, run, tmp_path):
    """It skips half a checkpoint, too, and starts if there is no other."""
    two = ('--cfg-options', 'train_cfg.max_epochs=2', 'resume=True')
    run(config, '--work-dir', tmp_path, *two)
    whole = checkpoint(tmp_path, 2)['state_dict']
    (tmp_path / 'epoch_2.pth').write_bytes(b'PK')
    run(config, '--work-dir', tmp_path, *two)
    again = checkpoint(tmp_path, 2)
    assert again['meta']['iter'] == 6
    assert all(torch.equal(again['state_dict'][k], whole[k]) for k in whole)
    for epoch in (1, 2):
        (tmp_path / f'epoch_{epoch}.pth').write_bytes(b'PK')
    run(config, '--work-dir', tmp_path, *two)
    assert checkpoint(tmp_path, 1)['meta']['iter'] == 3


def test_default_work_dir_is_named_after_the_config(config, run, tmp_path,
                                                    monkeypatch):
    """./work_dirs/<config name>, as in MMDetection."""
    monkeypatch.chdir(tmp_path)
    run(config)
    assert (tmp_path / 'work_dirs/toy_config/epoch_1.pth').is_file()


def test_auto_scale_lr(config, run, tmp_path):
    """The config's rate is for 16 pictures: 2 get an eighth of it."""
    run(config, '--work-dir', tmp_path, '--auto-scale-lr')
    group = checkpoint(tmp_path, 1)['optimizer']['param_groups'][0]
    assert group['initial_lr'] == pytest.approx(0.01 * 2 / 16)


def test_auto_scale_lr_needs_the_batch_size(config, run, tmp_path):
    """Without auto_scale_lr in the config the flag cannot mean anything."""
    cfg = Config.fromfile(config)
    cfg.pop('auto_scale_lr')
    cfg.dump(str(tmp_path / 'bare.py'))
    with pytest.raises(ValueError, match='auto_scale_lr'):
        run(tmp_path / 'bare.py', '--work-dir', tmp_path, '--auto-scale-lr')


def test_amp(config, run, tmp_path, monkeypatch):
    """Trains under AmpOptimWrapper; MMEngine wants a GPU to be there."""
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available',
        lambda: True)
    run(config, '--work-dir', tmp_path, '--amp')
    written = Config.fromfile(str(tmp_path / 'toy_config.py')).optim_wrapper
    assert written.type == 'AmpOptimWrapper'
    assert written.loss_scale == 'dynamic'
    # Only AmpOptimWrapper writes the state of a loss scaler.
    assert 'loss_scaler' in checkpoint(tmp_path, 1)['optimizer']


def test_a_plain_config_trains_alone(config, run, tmp_path):
    """The tool trains teachers and baselines, too."""
    cfg = Config.fromfile(config)
    cfg.model = cfg.model.student
    cfg.dump(str(tmp_path / 'alone.py'))
    run(tmp_path / 'alone.py', '--work-dir', tmp_path)
    text = next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
    assert 'loss_cls' in text and 'loss_kd' not in text


def test_a_missing_teacher_ends_the_run_at_once(config, run, tmp_path):
    """Nothing is trained without the teacher's weights."""
    with pytest.raises(ValueError, match='model.teacher.checkpoint'):
        run(config, '--work-dir', tmp_path, '--cfg-options',
            'model.teacher.checkpoint=/no/such.pth')
    assert not list(tmp_path.glob('*.pth'))
