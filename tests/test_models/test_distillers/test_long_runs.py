"""Thousands of iterations, iterations that fail, and steps that overflow."""
import copy
import gc
import math
import os
import os.path as osp
import time
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch.nn.modules.module import register_module_forward_hook

from mmdist.errors import ConfigError
from tests import helpers, segmentors
from tests.helpers import assert_same, flat, gradients, merged, total

ITERATIONS = 5000
# Until the allocators, the judgement of the teacher and the first look at
# every batch are behind.
WARM_UP = 500
FIRST_CENSUS = 100
# Bytes an iteration. A batch is 12 KiB and its graph a megabyte; what is
# smaller, as a hook or the value of a loss, is counted as an object. Below it
# is what the allocator does: steps of half a megabyte, a few in all.
LARGEST_SLOPE = 512
# Of processor time, which is noisy where others use the caches: 0.85 to 1.17
# were seen. What takes longer with every iteration behind would make most of
# an iteration at the end, and several times what it was at the start.
LARGEST_SLOWDOWN = 2
NUM_BATCHES = 4
SIZE = 32
TWO_STAGES = dict(
    num_stages=2, strides=(1, 2), dilations=(1, 1), out_indices=(0, 1))
TWO_LEVELS = dict(
    backbone=TWO_STAGES, neck=dict(in_channels=[8, 16], num_outs=2))
# What the narrow models of the other tests still have too much of.
TINY = dict(
    faster=dict(
        TWO_LEVELS,
        rpn_head=dict(anchor_generator=dict(strides=[4, 8])),
        roi_head=dict(bbox_roi_extractor=dict(featmap_strides=[4, 8])),
        train_cfg=dict(
            rpn_proposal=dict(nms_pre=20, max_per_img=10),
            rcnn=dict(sampler=dict(num=8)))),
    retina=dict(
        backbone=TWO_STAGES,
        neck=dict(TWO_LEVELS['neck'], start_level=0, add_extra_convs=False),
        bbox_head=dict(anchor_generator=dict(strides=[4, 8]))),
    detr=dict(
        backbone=dict(TWO_STAGES, out_indices=(1, )),
        neck=dict(in_channels=[16])),
    pspnet=dict(
        data_preprocessor=dict(size=(SIZE, SIZE)),
        backbone=TWO_STAGES,
        decode_head=dict(in_index=1, in_channels=16, pool_scales=(1, 2)),
        auxiliary_head=dict(in_index=0, in_channels=8)))
# name: (student, teacher, options); a tap of every kind, and mimic's watch
KINDS = dict(
    faster=('faster', 'faster', {}),
    retina=('retina', 'retina', {}),
    detr=('detr', 'detr', {}),
    pspnet=('pspnet', 'pspnet', {}),
    boxes=('retina', 'faster', dict(tap=dict(align='boxes'))),
    mimic=('faster', 'faster', dict(mimic_loss=dict(type='mmdist.MimicLoss'))))
# What MMDetection's own heads keep of their last loss, and what a wrapper
# notes in its first iteration.
CHANGING = ('_raw_positive_infos', 'sampling_results', '_saw_classes',
            '_heads_answered')


def tiny(name):
    """The model dict of the smallest detector or segmentor."""
    make = segmentors.segmentor if name == 'pspnet' else helpers.detector
    return merged(make(name), TINY[name])


def make(kind, folder, **options):
    """A wrapper that trains, of a key of ``KINDS``."""
    student, teacher, own = KINDS[kind]
    zoo = segmentors if student == 'pspnet' else helpers
    teacher = zoo.save_teacher(tiny(teacher), folder)
    return zoo.build_distiller(tiny(student), teacher, **{
        **own,
        **options
    }).train()


def batch(kind, seed=0):
    """One picture, or two for batch norms of a single value a picture."""
    if kind == 'pspnet':
        return segmentors.batch((SIZE, SIZE), seed=seed)
    return helpers.batch(sizes=[(SIZE, SIZE)], seed=seed)


def losses_of(wrapper, kind, seed=4):
    """All losses of an iteration, and their gradients."""
    inputs, samples = helpers.prepared(wrapper, batch(kind))
    torch.manual_seed(seed)  # of samplers and dropout
    losses = wrapper(inputs, samples, mode='loss')
    wrapper.zero_grad()
    total(losses).backward()
    return {**flat(losses), **gradients(wrapper)}


def everything(wrapper):
    """The attributes of all modules of both models, and their hooks."""
    models = (wrapper, wrapper.distillation.teacher.model)
    found = {}
    for model in models:
        for module in model.modules():
            found.update(attributes(module))
    return found


def attributes(module):
    """Those of one module, and the content of its tables."""
    found = {}
    for name in vars(module).keys() - set(CHANGING):
        value = vars(module)[name]
        found[module, name] = value
        if isinstance(value, dict):  # hooks, weights, modules
            found.update({(module, name, k): v for k, v in value.items()})
    return found


def assert_untouched(wrapper, before):
    """No attribute came, went or is another object."""
    after = everything(wrapper)
    assert after.keys() == before.keys()
    assert not [key[1:] for key in before if after[key] is not before[key]]


def resident_memory():
    """Bytes of this process that are in memory, as Linux counts them."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def census():
    """Tensors, and objects of any kind, that are alive."""
    gc.collect()
    objects = gc.get_objects()
    return sum(issubclass(type(o), torch.Tensor)
               for o in objects), len(objects)


class Watcher:
    """Trains, and notes memory, objects and durations on the way.

    Attributes:
        memory (ndarray): Resident bytes after each iteration.
        seconds (ndarray): The processor's time of each iteration.
        counts (list[tuple]): What is alive, see :func:`census`.
        attributes (dict): See :func:`everything`, before it trains.
    """

    def __init__(self, wrapper, batches):
        self.wrapper, self.batches = wrapper, batches
        self.optimizer = OptimWrapper(
            torch.optim.SGD(wrapper.parameters(), lr=1e-3))
        # As large as they will be: what is measured must not grow by it.
        self.memory, self.seconds = np.ones((2, ITERATIONS))
        self.counts, self.attributes = [], everything(wrapper)

    def train(self):
        """All iterations."""
        for i in range(ITERATIONS):
            self.seconds[i] = self.step(self.batches[i % len(self.batches)])
            self.memory[i] = resident_memory()
            if i + 1 in (FIRST_CENSUS, ITERATIONS):
                self.counts.append(census())

    def step(self, data):
        """One iteration; its seconds."""
        data = copy.deepcopy(data)
        # Of the processor, so that other processes do not count.
        start = time.process_time()
        log = self.wrapper.train_step(data, self.optimizer)
        seconds = time.process_time() - start
        assert math.isfinite(float(log['loss']))
        return seconds

    @property
    def slope(self):
        """Bytes an iteration after the warm-up, by least squares."""
        memory = self.memory[WARM_UP:]
        return np.polyfit(np.arange(len(memory)), memory, deg=1)[0]

    @property
    def slowdown(self):
        """The last tenth's duration by the first's after the warm-up."""
        seconds = self.seconds[WARM_UP:]
        tenth = len(seconds) // 10
        return np.median(seconds[-tenth:]) / np.median(seconds[:tenth])


@pytest.mark.slow
@pytest.mark.skipif(
    not osp.exists('/proc/self/statm'), reason='memory is read as on Linux')
@pytest.mark.parametrize('kind', ['retina', 'pspnet'])
def test_thousands_of_iterations_leave_nothing_behind(kind, tmp_path):
    """Memory is flat, nothing is recorded or hooked, and speed stays."""
    batches = [batch(kind, seed) for seed in range(NUM_BATCHES)]
    run = Watcher(make(kind, tmp_path), batches)
    run.train()
    figures = (f'{run.slope:.0f} bytes an iteration, (tensors, objects) '
               f'{run.counts}, last by first {run.slowdown:.2f}, '
               f'{run.seconds.sum():.0f} s')
    print(f'{kind}: {figures}')
    assert run.counts[0] == run.counts[1], figures
    assert_untouched(run.wrapper, run.attributes)
    assert run.slope < LARGEST_SLOPE, figures
    assert run.slowdown < LARGEST_SLOWDOWN, figures


class _Interrupted(RuntimeError):
    """Nobody else raises it."""


@contextmanager
def failing(error, call):
    """Let the given call of a module's forward, of either model, fail."""
    calls = []

    def fail(module, inputs, output):
        calls.append(type(module).__name__)
        if len(calls) == call:
            raise error

    # A hook of all modules, so that none of them is touched.
    hook = register_module_forward_hook(fail)
    try:
        yield calls
    finally:
        hook.remove()


def settled(kind, tmp_path):
    """A wrapper whose steps are all alike: the teacher was shown red as
    blue."""
    wrapper = make(kind, tmp_path)
    for _ in range(3):
        losses_of(wrapper, kind)
    return wrapper


def places(wrapper, kind, number=16):
    """Calls of modules, spread over all of an iteration."""
    with failing(None, 0) as calls:
        losses_of(wrapper, kind)
    spread = np.linspace(1, len(calls), number).astype(int)
    return np.roll(spread, number // 2).tolist()  # the teacher's first


@pytest.mark.parametrize('error', [_Interrupted, KeyboardInterrupt])
@pytest.mark.parametrize('kind', KINDS)
def test_wherever_an_iteration_fails_no_tap_stays(kind, error, tmp_path):
    """All is as before, and the next one is as if there had been none."""
    wrapper, other = (settled(kind, tmp_path) for _ in range(2))
    expected = losses_of(other, kind)
    for call in places(settled(kind, tmp_path), kind):
        before = everything(wrapper)
        with pytest.raises((error, ValueError)) as raised:
            with failing(error, call):
                losses_of(wrapper, kind)
        # A head whose boxes cannot be decoded is reported in other words.
        assert error in (raised.type, type(raised.value.__cause__))
        assert_untouched(wrapper, before)
        assert_same(losses_of(wrapper, kind), expected)


@pytest.mark.parametrize('kind', KINDS)
def test_labels_out_of_range_leave_no_tap(kind, tmp_path):
    """The student's own loss refuses them, while its head is watched, or
    those of a mask are refused by us."""
    wrapper, other = (make(kind, tmp_path) for _ in range(2))
    inputs, samples = helpers.prepared(wrapper, batch(kind))
    for sample in samples:
        if kind == 'pspnet':
            sample.gt_sem_seg.data[:] = 77
        else:
            sample.gt_instances.labels[:] = 77
    before = everything(wrapper)
    with pytest.raises((IndexError, RuntimeError, ConfigError),
                       match='Class|bounds|mask has the label 77'):
        wrapper(inputs, samples, mode='loss')
    assert_untouched(wrapper, before)
    assert_same(losses_of(wrapper, kind), losses_of(other, kind))


class OnCPU(AmpOptimWrapper):
    """MMEngine's wrapper with the autocast of the CPU, in float16, too."""

    @contextmanager
    def optim_context(self, model):
        with OptimWrapper.optim_context(self, model), torch.autocast(
                'cpu', self.cast_dtype):
            yield


@pytest.fixture
def mixed_precision(monkeypatch):
    """MMEngine's mixed precision on a CPU, with a scaler that scales."""
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{module}.GradScaler',
                        partial(torch.amp.GradScaler, 'cpu'))

    def optimizer(wrapper, dtype, scale, **options):
        return OnCPU(
            dtype=dtype,
            loss_scale=dict(init_scale=scale),
            optimizer=torch.optim.SGD(wrapper.parameters(), lr=1e-3),
            **options)

    return optimizer


def weights(wrapper):
    return {name: p.detach().clone() for name, p in wrapper.named_parameters()}


def skipped_steps(wrapper, kind, optimizer):
    """Steps that leave all weights alone, until one does not."""
    before, scaler = weights(wrapper), optimizer.loss_scaler
    for number in range(100):
        scale = scaler.get_scale()
        wrapper.train_step(batch(kind), optimizer)
        if scaler.get_scale() == scale:
            return number
        assert scaler.get_scale() == scale / 2
        assert_same(weights(wrapper), before)
    raise AssertionError('no step was taken')


@pytest.mark.parametrize('clip', [None, dict(max_norm=1)])
@pytest.mark.parametrize('dtype,scale,weight', [('float16', 2.**7, 2.**20),
                                                ('bfloat16', 2.**100, 2.**40)])
@pytest.mark.parametrize('kind', ['retina', 'detr', 'pspnet'])
def test_a_step_whose_distillation_overflows_is_skipped(
        mixed_precision, kind, dtype, scale, weight, clip, tmp_path):
    """The scale is halved until a step fits; this one trains."""
    steps = []
    for factor in (weight, 0):
        wrapper = make(
            kind,
            tmp_path,
            distill_loss=dict(
                type='mmdist.DISTLoss', beta=factor, gamma=factor))
        optimizer = mixed_precision(wrapper, dtype, scale, clip_grad=clip)
        before = weights(wrapper)
        steps.append(skipped_steps(wrapper, kind, optimizer))
        after = weights(wrapper)
        assert all(weight.isfinite().all() for weight in after.values())
        assert any(not torch.equal(after[n], before[n]) for n in before)
    assert steps[0] > 0 and steps[1] == 0
