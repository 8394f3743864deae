"""Runs that are killed, by tools/train.py and processes of their own."""
import functools
import json
import math
import multiprocessing
import os
import os.path as osp
import random
import resource
import runpy
import signal
import sys
import time

import pytest
import torch

from mmdist.engine import newest_checkpoint
from tests import helpers, segmentors
from tests.quick import quick

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TRAIN = osp.join(ROOT, 'tools', 'train.py')
MOMENTS = 20
EPOCHS, ITERS = 4, 12
FLIP = dict(type='RandomFlip', prob=0.5)
# A new process need not import everything again.
processes = multiprocessing.get_context('forkserver')
processes.set_forkserver_preload(['tests.helpers', 'tests.segmentors'])


def detection(root):
    """Faster R-CNN samples RoIs at random; pictures are flipped so, too."""
    model = helpers.detector('faster')
    data = helpers.write_coco(root / 'data')
    cfg = helpers.run_cfg(
        helpers.distiller_cfg(model, helpers.save_teacher(model, root)),
        data,
        root,
        EPOCHS,
        # A validation draws random numbers between two epochs.
        val_dataloader=helpers.loader(data, False),
        val_evaluator=dict(
            type='CocoMetric', ann_file=f'{data}/coco.json', metric='bbox'),
        val_cfg=dict())
    cfg.train_dataloader.dataset.pipeline.insert(2, FLIP)
    return cfg


def segmentation(root):
    """PSPNet drops activations; the loop counts iterations."""
    model = segmentors.segmentor('pspnet')
    data = segmentors.write_masks(root / 'data')
    cfg = segmentors.run_cfg(
        segmentors.distiller_cfg(model, segmentors.save_teacher(model, root)),
        data,
        root,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=ITERS))
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=3)
    cfg.param_scheduler.update(by_epoch=False, milestones=[4])
    return cfg


TASKS = dict(detection=detection, segmentation=segmentation)


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """A function of a task: a config's path, and the folder and seconds of a
    whole run."""

    @functools.lru_cache(None)
    def whole_run(task):
        root = tmp_path_factory.mktemp(task)
        cfg = TASKS[task](root)
        cfg.train_dataloader.num_workers = 1
        cfg.default_hooks.checkpoint.update(
            max_keep_ckpts=1, backend_args=dict(backend='mmdist.whole'))
        cfg.custom_hooks = [dict(type='mmdist.SeedHook')]
        for key in ('work_dir', 'experiment_name'):
            cfg.pop(key)
        config = str(root / 'toy.py')
        cfg.dump(config)
        end, seconds = timed(config, root / 'whole')
        assert end == 0
        return config, root / 'whole', seconds

    return whole_run


@pytest.fixture(params=list(TASKS))
def run(request, whole_run):
    """A run of each task."""
    return whole_run(request.param)


@pytest.fixture
def one_run(whole_run):
    """A run of one task, for what is about files."""
    return whole_run('segmentation')


def train(config, work_dir, *arguments, **limits):
    """Train in a new process, and return how it ended."""
    return timed(config, work_dir, *arguments, **limits)[0]


def timed(config, work_dir, *arguments, seconds=math.inf, **limits):
    """Train in a new process, and kill it when it has computed so long.

    Time of the processor, so that it does not matter what else runs.

    Returns:
        tuple[int, float]: How the process ended, and the seconds.
    """
    process = processes.Process(
        target=_train,
        args=([config, '--work-dir',
               str(work_dir), *arguments], limits))
    process.start()
    spent = 0.
    while process.is_alive():
        spent = processor_time(process.pid) or spent
        if spent >= seconds:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        time.sleep(0.003)
    return process.exitcode, spent


def processor_time(pid):
    """Seconds; None if the process has ended."""
    try:
        with open(f'/proc/{pid}/stat') as file:
            fields = file.read().rpartition(')')[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def _train(arguments, limits):
    os.makedirs(arguments[2], exist_ok=True)
    # Workers of data loaders end with their process, but not at once.
    with open(osp.join(arguments[2], 'said.txt'), 'a') as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [TRAIN, *arguments]
    if 'event' in limits:
        _die_at(limits['event'], limits['part'])
    if 'size' in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, [limits['size']] * 2)
    with quick():
        runpy.run_path(TRAIN, run_name='__main__')


def _die_at(event, part):
    """Kill this process when it is about to touch a file for good."""

    def watch(name, arguments):
        if name == event and part in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def losses(work_dir):
    """What was logged in the end for every step."""
    found = {}
    for log in sorted(
            work_dir.glob('*/vis_data/scalars.json'), key=osp.getmtime):
        for line in filter(None, log.read_text().split('\n')):
            values = json.loads(line)
            if 'loss' in values:
                found[values['step']] = {
                    name: value
                    for name, value in values.items() if 'loss' in name
                }
    return found


def assert_equal(work_dir, whole):
    """Weights, optimizer state and logged losses, bit for bit."""
    ends = [
        torch.load(newest_checkpoint(str(d)), weights_only=False)
        for d in (work_dir, whole)
    ]
    assert ends[0]['meta']['iter'] == ends[1]['meta']['iter'] == ITERS
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        ours, theirs = (helpers.tensors_of(end[part]) for end in ends)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(work_dir) == losses(whole)


@pytest.mark.slow
def test_resumed_runs_equal_the_uninterrupted_one(run, tmp_path):
    """Killed at a random moment of each part, from its start to its end."""
    config, whole, seconds = run
    assert len(losses(whole)) == ITERS
    moments, killed, begun = random.Random(0), 0, 0
    for i in range(MOMENTS):
        work_dir = tmp_path / str(i)
        moment = (i + moments.random()) / MOMENTS * seconds
        end = train(config, work_dir, seconds=moment)
        killed += end == -signal.SIGKILL
        begun += newest_checkpoint(str(work_dir)) is not None
        assert train(config, work_dir, '--resume') == 0
        assert_equal(work_dir, whole)
    print(f'{killed} of {MOMENTS} killed, {begun} after a checkpoint')
    assert killed >= MOMENTS / 2 and begun >= MOMENTS / 5


@pytest.mark.slow
@pytest.mark.parametrize('event, part', [
    ('open', '.pth.partial'),
    ('os.rename', '.pth.partial'),
    ('os.remove', '.pth'),
    ('open', 'last_checkpoint'),
])
def test_killed_while_a_checkpoint_is_written(one_run, tmp_path, event, part):
    """Before and after each step of writing it, and of removing the last."""
    config, whole, _ = one_run
    assert train(config, tmp_path, event=event, part=part) == -signal.SIGKILL
    assert train(config, tmp_path, '--resume') == 0
    assert_equal(tmp_path, whole)
    assert len(list(tmp_path.glob('*.pth*'))) <= 2


@pytest.mark.slow
def test_full_disk(one_run, tmp_path):
    """The last whole checkpoint is left, and the error names the file."""
    config, whole, _ = one_run
    train(config, tmp_path, event='open', part='last_checkpoint')
    kept = newest_checkpoint(str(tmp_path))
    content = open(kept, 'rb').read()
    # What is written here has an end sooner than on a full disk.
    limit = len(content) // 2
    assert train(config, tmp_path, '--resume', size=limit) == 1
    assert open(kept, 'rb').read() == content
    assert not list(tmp_path.glob('*.partial'))
    said, = {
        line
        for line in (tmp_path / 'said.txt').read_text().splitlines()
        if line.startswith('OSError') and 'could not be written' in line
    }
    assert f'{tmp_path}' in said
    assert 'make room' in said and '--resume' in said
    assert train(config, tmp_path, '--resume') == 0
    assert_equal(tmp_path, whole)


@pytest.mark.slow
def test_half_a_checkpoint_is_skipped(one_run, tmp_path):
    """As other tools, or another disk, may leave it."""
    config, whole, _ = one_run
    train(config, tmp_path, event='os.remove', part='.pth')
    old, new = sorted(tmp_path.glob('*.pth'), key=osp.getmtime)
    os.truncate(new, new.stat().st_size // 2)
    (tmp_path / 'last_checkpoint').write_text(str(new))
    assert newest_checkpoint(str(tmp_path)) == str(old)
    assert train(config, tmp_path, '--resume') == 0
    said = (tmp_path / 'said.txt').read_text()
    assert f'{new} is not complete and will be skipped' in said
    assert_equal(tmp_path, whole)
