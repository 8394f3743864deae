"""Distillers in several processes: DDP, FSDP, and ranks that die."""
import copy
import glob
import multiprocessing
import os
import os.path as osp
import re
import signal
import socket
import subprocess
import sys
import time
import uuid

import mmdet.models
import mmseg.models
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.model.wrappers import (MMDistributedDataParallel,
                                     MMFullyShardedDataParallel)
from mmengine.optim import OptimWrapper
from torch import nn
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.modules.batchnorm import _BatchNorm

from mmdist.errors import ConfigError
from mmdist.utils import run
from tests import helpers, segmentors
from tests.helpers import assert_same

# Seconds after which processes hang and are killed.
LIMIT = 240
STEPS = 2
MANY = 11  # more than the monitor's `iters`
MIMIC = dict(mimic_loss=dict(type='mmdist.MimicLoss'))
FEATURES = dict(
    feature_loss=dict(type='mmdist.DISTLoss', project=True, sync_intra=True))
# What takes long to import is imported once, for all processes. Not this
# package: the server of processes may find another one called `tests`.
multiprocessing.get_context('forkserver').set_forkserver_preload(
    ['mmdet.models', 'mmseg.models', 'mmdist'])


def on_ranks(work, world, folder, *args):
    """What each of several processes returns; fails if they hang.

    Args:
        work (Callable): Gets the rank and ``args``; of a module's top level.
        world (int): Processes, of one gloo group.
        folder (Path): For what they leave behind.
        *args: Can be pickled.
    """
    ranks = mp.start_processes(
        process, (work, world, str(folder), args, uuid.uuid4().hex),
        world,
        join=False,
        start_method='forkserver')
    deadline = time.monotonic() + LIMIT
    try:
        while not ranks.join(timeout=1):
            assert time.monotonic() < deadline, f'hung for {LIMIT} s'
    finally:
        for rank in ranks.processes:
            rank.kill()
    return [
        torch.load(f'{folder}/{i}.pth', weights_only=False)
        for i in range(world)
    ]


def process(rank, work, world, folder, args, store):
    """One of them."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo',
        init_method=f'file://{folder}/{store}',
        rank=rank,
        world_size=world)
    torch.save(work(rank, *args), f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


def library(name):
    """The helpers that know a model."""
    return segmentors if name in segmentors.SEGMENTORS else helpers


def model_dict(name):
    """The model dict of a small model that draws no random numbers."""
    if library(name) is helpers:
        return helpers.detector(name)
    still = dict(dropout_ratio=0)
    return segmentors.segmentor(name, decode_head=still, auxiliary_head=still)


def pictures(name, number, seed, size=(96, 96)):
    """A batch; of one size, so that no process pads otherwise."""
    if library(name) is helpers:
        return helpers.batch(name, [size] * number, seed)
    return segmentors.batch(num=number, seed=seed)


def part_of(data, first, number):
    """Some pictures of a batch."""
    return {
        key: copy.deepcopy(value[first:first + number])
        for key, value in data.items()
    }


def ddp(model):
    """As MMEngine's runner wraps a model."""
    return MMDistributedDataParallel(module=model, broadcast_buffers=False)


def alone(model):
    """Of one process."""
    return model


def trained(model, batches, wrap=alone, lr=0.01):
    """Train a step a batch.

    Returns:
        dict: What was logged in each step, the gradients of each step, and
        the weights after the last.
    """
    wrapped, seen = wrap(model), []
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=lr, momentum=0.9)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(helpers.gradients(model)))
    optim_wrapper = OptimWrapper(optimizer)
    logs = [wrapped.train_step(batch, optim_wrapper) for batch in batches]
    weights = {k: v.detach() for k, v in wrapped.state_dict().items()}
    return dict(
        logs=[{
            k: float(v)
            for k, v in log.items()
        } for log in logs],
        gradients=seen,
        weights={
            k.replace('module.', '', 1): v
            for k, v in weights.items()
        })


def distiller(name, teacher, seed=0, sync_intra=True, **options):
    """A distiller whose weights and random numbers are of a seed."""
    loss = dict(type='mmdist.DISTLoss', sync_intra=sync_intra)
    model = library(name).build_distiller(
        model_dict(name), teacher, seed, distill_loss=loss, **options)
    settle(model.state_dict())
    return model


def settle(weights):
    """Deformable DETR has what was in memory there until `init_weights`."""
    if 'level_embed' in weights:
        weights['level_embed'].fill_(0.1)


def frozen(model):
    """Without statistics of a batch."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval().requires_grad_(False)
    return model


def precise(model):
    """In float64, too."""
    model.distillation.teacher.model.double()
    return frozen(model).double()


def save_teacher(name, folder):
    """``model.teacher`` of a distiller."""
    given = library(name).save_teacher(model_dict(name), folder)
    content = torch.load(given['checkpoint'])
    settle(content['state_dict'])
    torch.save(content, given['checkpoint'])
    return given


# ---------------------------------------------- gradients of a large batch

# model, pictures of each rank, options, tolerance. MMDetection computes the
# targets and some losses of FCOS in float32 whatever the weights are.
LARGE_BATCHES = [
    ('pspnet', (2, 2), {}, 1e-10),
    ('pspnet', (1, 1, 1, 1), {}, 1e-10),
    ('pspnet', (1, 3), dict(alpha=0), 1e-10),
    ('pspnet', (1, 3), dict(alpha=0, **FEATURES), 1e-10),
    ('fcos', (2, 2), {}, 1e-6),
    ('fcos', (1, 1, 1, 1), {}, 1e-6),
]


def steps_of_a_part(rank, name, teacher, parts, options):
    """Steps with sync_intra and without, of a rank's pictures."""
    batches = [
        part_of(
            pictures(name, sum(parts), step), sum(parts[:rank]), parts[rank])
        for step in range(STEPS)
    ]
    return [
        trained(
            precise(distiller(name, teacher, sync_intra=sync, **options)),
            copy.deepcopy(batches), ddp) for sync in (True, False)
    ]


def largest_difference(ours, theirs):
    """Of two dicts of tensors, by the largest number of the second."""
    assert ours.keys() == theirs.keys()
    known = [k for k, v in theirs.items() if v is not None]
    assert all(ours[k] is None for k in theirs.keys() - set(known))
    largest = max(theirs[k].abs().max() for k in known)
    return float(
        max((ours[k] - theirs[k]).abs().max() for k in known) / largest)


@pytest.mark.slow
@pytest.mark.parametrize('name,parts,options,tolerance', LARGE_BATCHES)
def test_gradients_are_those_of_the_whole_batch(name, parts, options,
                                                tolerance, tmp_path):
    """The mean over ranks that DDP takes is the gradient of one process.

    This holds where

    - no layer mixes pictures: batch norms are frozen;
    - nothing is drawn: no dropout, and a head that samples no boxes;
    - all pictures are padded to one size;
    - DIST's columns are compared over all ranks: ``sync_intra``, which also
      weights DIST's rows by their number on each rank;
    - the student's own loss is a mean over all ranks. That of a segmentor is
      one over the pixels of each rank, so ranks must have as many pictures,
      or the loss no weight (``alpha=0``); FCOS, ATSS, GFL and most others
      divide by the mean over ranks of the number of positive samples
      (``reduce_mean``), RetinaNet and the two-stage detectors by that of the
      rank.
    """
    teacher = save_teacher(name, tmp_path)
    ranks = on_ranks(steps_of_a_part, len(parts), tmp_path, name, teacher,
                     parts, options)
    whole = trained(
        precise(distiller(name, teacher, **options)),
        [pictures(name, sum(parts), step) for step in range(STEPS)])
    for synced, _ in ranks:
        for ours, theirs in zip(synced['gradients'], whole['gradients']):
            assert largest_difference(ours, theirs) < tolerance
        difference = largest_difference(synced['weights'], whole['weights'])
        assert difference < tolerance
    for i, log in enumerate(whole['logs']):
        for term in ('loss_kd_inter', 'loss_kd_intra'):
            seen = [synced['logs'][i][term] for synced, _ in ranks]
            assert sum(seen) / len(seen) == pytest.approx(
                log[term], rel=tolerance)
    # Without, the gradients are others, though the same on all ranks.
    for _, unsynced in ranks:
        first = unsynced['gradients'][0]
        assert largest_difference(first, whole['gradients'][0]) > 1e-4
        assert_same(first, ranks[0][1]['gradients'][0])


# ------------------------------------------------------ ranks without objects

# Of a two-stage detector no box is proposed; labelled ones are RoIs, too.
NO_PROPOSALS = dict(train_cfg=dict(rpn_proposal=dict(min_bbox_size=1000)))
# model, what is changed in it, ranks whose pictures have no objects
EMPTY = [
    ('faster', {}, (1, )),
    ('faster', {}, (0, 1)),
    ('faster', NO_PROPOSALS, (1, )),
    ('faster', NO_PROPOSALS, (0, 1)),
    ('retina', {}, (1, )),
    ('retina', {}, (0, 1)),
]


def empty_pictures(name, number, seed):
    """A batch without any object."""
    data = pictures(name, number, seed)
    for sample in data['data_samples']:
        sample.gt_instances = sample.gt_instances[:0]
    return data


def steps_on_empty_pictures(rank, name, model, teacher, empty_ranks):
    """So many that the monitor counts over all ranks; synced, and not."""
    draw = empty_pictures if rank in empty_ranks else pictures
    results = []
    for sync, steps in ((True, MANY), (False, STEPS)):
        loss = dict(type='mmdist.DISTLoss', sync_intra=sync)
        student = helpers.build_distiller(model, teacher, distill_loss=loss)
        student.train()
        batches = [draw(name, 2, 2 * step + rank) for step in range(steps)]
        result = trained(student, batches, ddp, lr=1e-3)
        results.append(
            dict(result, judged=student.distillation.monitor.judged))
    return results


@pytest.mark.slow
@pytest.mark.parametrize('name,override,empty_ranks', EMPTY)
def test_ranks_without_objects_go_on(name, override, empty_ranks, tmp_path):
    """No rank waits for ever, and all get the same, finite gradients."""
    teacher = save_teacher(name, tmp_path)
    model = helpers.detector(name, **override)
    ranks = on_ranks(steps_on_empty_pictures, 2, tmp_path, name, model,
                     teacher, empty_ranks)
    for rank, results in enumerate(ranks):
        no_rois = override and rank in empty_ranks
        assert results[0]['judged'] == (len(empty_ranks) < 2)
        for result in results:
            for log in result['logs']:
                assert torch.tensor(list(log.values())).isfinite().all()
                # Without RoIs MMDetection gives no loss of classes.
                assert ('loss_cls' in log) == (not no_rois)
    for first, second in zip(*ranks):
        for ours, theirs in zip(first['gradients'], second['gradients']):
            assert_same(ours, theirs)
            assert all(g is None or g.isfinite().all() for g in ours.values())


# --------------------------------------------- parameters that are not used


def steps_of_all(rank, name, teacher, spoil):
    """Two steps of the plain model, of the wrapper, and of it with mimic and
    with features."""
    lib = library(name)
    options = [{}, MIMIC, FEATURES] if name == 'retina' else [{}, FEATURES]
    models = [lib.build(model_dict(name))]
    models += [distiller(name, teacher, **given) for given in options]
    for model in models[-1:] if spoil else models:
        model.train()
        if spoil:
            model.unused = nn.Parameter(torch.ones(1))
        # DDP complains in the second step.
        trained(
            model, [pictures(name, 2, 2 * s + rank) for s in range(STEPS)],
            ddp,
            lr=1e-3)
    return len(models)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['faster', 'retina', 'pspnet'])
def test_no_parameter_is_unused(name, tmp_path):
    """Not ``find_unused_parameters`` where the plain model needs none."""
    teacher = save_teacher(name, tmp_path)
    expected = 4 if name == 'retina' else 3
    assert on_ranks(steps_of_all, 2, tmp_path, name, teacher,
                    False) == [expected] * 2


@pytest.mark.slow
def test_an_unused_parameter_would_be_found(tmp_path):
    """The test above can fail."""
    teacher = save_teacher('retina', tmp_path)
    with pytest.raises(mp.ProcessRaisedException) as error:
        on_ranks(steps_of_all, 2, tmp_path, 'retina', teacher, True)
    assert 'find_unused_parameters' in str(error.value)


# ---------------------------------------------------------------------- FSDP

# MMEngine gives FSDP the number of a GPU where no device is named.
FSDP = dict(type='MMFullyShardedDataParallel', device_id='cpu')
UNITS = (mmdet.models.layers.ResLayer, mmseg.models.utils.ResLayer)


def fsdp(model):
    """The whole model is one unit."""
    return MMFullyShardedDataParallel(module=model, device_id='cpu')


def fsdp_of_stages(model):
    """Each stage of the backbone is a unit, and the rest is another."""
    return MMFullyShardedDataParallel(
        module=model,
        device_id='cpu',
        auto_wrap_policy=ModuleWrapPolicy(UNITS))


def steps_of_wrappers(rank, name, teacher, options):
    """The same steps by DDP and by FSDP, and the parameters of a rank."""
    results = []
    for wrap in (ddp, fsdp, fsdp_of_stages):
        model = frozen(distiller(name, teacher, **options))
        batches = [pictures(name, 2, 2 * s + rank) for s in range(STEPS)]
        result = trained(model, batches, wrap, lr=1e-3)
        results.append(
            dict(result, held=sum(p.numel() for p in model.parameters())))
    return results


@pytest.mark.slow
@pytest.mark.parametrize('name,options', [
    ('pspnet', {}),
    ('retina', MIMIC),
    ('retina', FEATURES),
    ('deformable', {}),
    ('deformable', MIMIC),
])
def test_fsdp_trains_as_ddp_does(name, options, tmp_path):
    """The same losses and weights, of which each rank holds a part.

    The wrapper and the student share their tables, so that both see what
    FSDP puts there; Deformable DETR has a parameter in no submodule, too.
    """
    teacher = save_teacher(name, tmp_path)
    for by_ddp, *by_fsdp in on_ranks(steps_of_wrappers, 2, tmp_path, name,
                                     teacher, options):
        for sharded in by_fsdp:
            for ours, theirs in zip(sharded['logs'], by_ddp['logs']):
                assert ours == pytest.approx(theirs, rel=1e-5)
            difference = largest_difference(sharded['weights'],
                                            by_ddp['weights'])
            assert difference < 1e-6
            assert sharded['held'] < 0.51 * by_ddp['held']


# -------------------------------------------------------------- the launcher

ROOT = osp.join(osp.dirname(__file__), *[osp.pardir] * 3)
SENTENCE = 'no picture is as broken as the seventh'
# Imported by the configs.
ACCIDENTS = f'''
import os
import signal

from mmcv.transforms import BaseTransform
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS


@TRANSFORMS.register_module()
class Broken(BaseTransform):
    """Fails in the data loader of the second rank, in its second batch."""
    seen = 0

    def transform(self, results):
        self.seen += 1
        if get_rank() == 1 and self.seen > 2:
            raise ValueError('{SENTENCE}')
        return results


@HOOKS.register_module()
class Accident(Hook):
    """Ends the second rank before its second iteration."""

    def __init__(self, kind):
        self.kind = kind

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.rank != 1 or runner.iter < 1:
            return
        if self.kind == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        runner.model.module.distillation.loss.terms = self.fail

    def fail(self, *_):
        raise ValueError('{SENTENCE}')
'''


def config(folder):
    """That of a RetinaNet; an epoch has two steps, of two pictures a rank."""
    model = helpers.detector('retina', test_cfg=dict(score_thr=0.))
    (folder / 'accidents.py').write_text(ACCIDENTS)
    cfg = helpers.run_cfg(
        helpers.distiller_cfg(model, helpers.save_teacher(model, folder)),
        helpers.write_coco(folder / 'data', num=8), folder / 'work')
    cfg.custom_imports.imports.append('accidents')
    cfg.train_dataloader.num_workers = 1
    return cfg


def dist_train(folder):
    """Run tools/dist_train.sh with two processes.

    Returns:
        tuple[int, str, str, list[int]]: The exit status, stdout, stderr, and
        the processes that are left.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    mark = f'MMDIST_MARK={uuid.uuid4().hex}'
    path = os.pathsep.join([osp.dirname(sys.executable), os.environ['PATH']])
    env = dict([mark.split('=')], PATH=path, PORT=port)
    job = subprocess.Popen(
        ['bash', f'{ROOT}/tools/dist_train.sh', 'toy.py', '2'],
        cwd=folder,
        env={
            **os.environ, 'PYTHONPATH': str(folder),
            'OMP_NUM_THREADS': '1',
            **env
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True)
    try:
        out, err = job.communicate(timeout=LIMIT)
        return job.returncode, out, err, left_behind(mark)
    finally:
        for pid in living(mark):
            os.kill(pid, signal.SIGKILL)


def living(mark):
    """The processes that were started with a variable."""
    found = []
    for folder in glob.glob('/proc/[0-9]*'):
        try:
            with open(f'{folder}/environ') as file:
                if mark in file.read().split('\0'):
                    found.append(int(osp.basename(folder)))
        except OSError:  # it has ended, or is another user's
            pass
    return found


def left_behind(mark, patience=20):
    """Those of them that do not end soon: workers look every 5 seconds."""
    deadline = time.monotonic() + patience
    while living(mark) and time.monotonic() < deadline:
        time.sleep(0.5)
    return living(mark)


@pytest.mark.slow
@pytest.mark.skipif(not osp.isdir('/proc/self'), reason='looks into /proc')
@pytest.mark.parametrize('kind', ['data', 'loss', 'kill'])
def test_a_rank_that_dies_ends_the_job(kind, tmp_path):
    """With its error on the terminal, and all other processes."""
    cfg = config(tmp_path)
    if kind == 'data':
        pipeline = cfg.train_dataloader.dataset.pipeline
        pipeline.insert(0, dict(type='Broken'))
    else:
        cfg.custom_hooks = [dict(type='Accident', kind=kind)]
    cfg.dump(str(tmp_path / 'toy.py'))
    status, _, err, left = dist_train(tmp_path)
    assert status
    if kind == 'kill':
        assert re.search(r'exitcode +: -9 .*SIGKILL', err), err
    else:
        sentence = rf'^\[rank1\]: ValueError: .*{SENTENCE}$'
        assert re.search(sentence, err, re.MULTILINE), err
    assert not left


# A full state dict that is moved to the CPU crashes on the CPU, with plain
# models, too.
FULL = dict(
    state_dict_type='FULL_STATE_DICT',
    state_dict_config=dict(type='FullStateDictConfig', offload_to_cpu=False),
    optim_state_dict_config=dict(
        type='FullOptimStateDictConfig', offload_to_cpu=False))


def strategy_config(folder):
    """MMEngine's strategy cannot clip gradients of which a rank has a part."""
    cfg = config(folder)
    cfg.runner_type = 'FlexibleRunner'
    cfg.strategy = dict(
        type='FSDPStrategy', model_wrapper=FSDP, state_dict_cfg=FULL)
    del cfg.optim_wrapper.clip_grad
    cfg.train_cfg.max_epochs = 1
    return cfg


@pytest.mark.slow
def test_the_strategy_of_fsdp_trains(tmp_path):
    """Its full checkpoint is the plain student's, and can be trained on."""
    cfg = strategy_config(tmp_path)
    path = tmp_path / 'work' / 'epoch_1.pth'
    for load_from in (None, str(path)):
        cfg.load_from = load_from
        cfg.dump(str(tmp_path / 'toy.py'))
        status, said, err, _ = dist_train(tmp_path)
        assert not status, err
        assert said.count('Epoch(train) [1][2/2]') == 1
        assert said.count('loss_kd_intra') == 2
        weights = torch.load(path, weights_only=False)['state_dict']
        helpers.build(helpers.detector('retina')).load_state_dict(weights)


def test_a_run_of_fsdp_is_not_resumed(tmp_path):
    """MMEngine calls PyTorch's loader of the optimizer the wrong way."""
    cfg = strategy_config(tmp_path)
    cfg.update(resume=True, load_from='epoch_1.pth')
    with pytest.raises(ConfigError, match='FSDPStrategy cannot') as error:
        run(cfg, 'train')
    assert error.value.field == 'resume'
