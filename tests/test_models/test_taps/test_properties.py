"""Images of any size and content, with any number of objects."""
import functools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import helpers, segmentors
from tests.helpers import assert_same, flat, gradients, total

# Values that fill an image; floats, as a pipeline may deliver.
FILLS = dict(
    noise=lambda size, rng: rng.integers(0, 256, size),
    black=lambda size, rng: np.zeros(size),
    white=lambda size, rng: np.full(size, 255),
    constant=lambda size, rng: np.full(size, rng.integers(1, 255)),
    stripes=lambda size, rng: np.broadcast_to(255 *
                                              (np.arange(size[2]) % 2), size),
    huge=lambda size, rng: 1e6 * rng.standard_normal(size))
SETTINGS = settings(deadline=None, derandomize=True, max_examples=10)


@functools.lru_cache(None)
def wrapper_of(kind, loss):
    """A wrapper with a teacher of other weights, built once."""
    pspnet = kind == 'pspnet'
    zoo = segmentors if pspnet else helpers
    model = zoo.segmentor(kind) if pspnet else zoo.detector(kind)
    with tempfile.TemporaryDirectory() as folder:
        teacher = zoo.save_teacher(model, Path(folder))
        return zoo.build_distiller(
            model, teacher, distill_loss=dict(type=f'mmdist.{loss}')).train()


@st.composite
def detection_batches(draw):
    """Images of different sizes, and from no object to several."""
    sizes = draw(
        st.lists(
            st.tuples(st.integers(8, 80), st.integers(8, 80)),
            min_size=1,
            max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    numbers = [draw(st.integers(0, 4)) for _ in sizes]
    return dict(
        inputs=[image(draw, size, rng) for size in sizes],
        data_samples=[
            helpers.sample(size, rng, False, number)
            for size, number in zip(sizes, numbers)
        ])


@st.composite
def segmentation_batches(draw):
    """Images of one size, as crops are; the labels may all be ignored."""
    size = tuple(8 * draw(st.integers(1, 8)) for _ in range(2))
    rng = np.random.default_rng(draw(st.integers(0, 2**20)))
    # Batch norms of one value per image need two.
    samples = [
        segmentors.sample(size, rng) for _ in range(draw(st.integers(2, 3)))
    ]
    if draw(st.booleans()):
        samples[0].gt_sem_seg.data[:] = segmentors.IGNORED
    return dict(
        inputs=[image(draw, size, rng) for _ in samples], data_samples=samples)


def image(draw, size, rng):
    fill = FILLS[draw(st.sampled_from(sorted(FILLS)))]
    return torch.from_numpy(np.array(fill((3, *size), rng), np.float32))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def check(kind, loss, data):
    """Everything is a number, also backward, and the teacher is the same."""
    wrapper = wrapper_of(kind, loss)
    teacher = wrapper.distillation.teacher.model
    before = state(teacher)
    wrapper.zero_grad()
    zoo = segmentors if kind == 'pspnet' else helpers
    with torch.autograd.detect_anomaly():
        losses = wrapper(*zoo.prepared(wrapper, data), mode='loss')
        total(losses).backward()
    assert any('loss_kd' in name for name in losses)
    for name, value in {**flat(losses), **gradients(wrapper)}.items():
        assert value is None or value.isfinite().all(), name
    assert_same(state(teacher), before)
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize('loss', ['DISTLoss', 'KDLoss'])
@pytest.mark.parametrize('kind', ['faster', 'retina', 'detr'])
@given(data=detection_batches())
@SETTINGS
def test_a_detector_of_any_images(kind, loss, data):
    """All losses and gradients are finite, and the teacher does not learn."""
    check(kind, loss, data)


@pytest.mark.parametrize('loss', ['DISTLoss', 'KDLoss'])
@given(data=segmentation_batches())
@SETTINGS
def test_a_segmentor_of_any_images(loss, data):
    """All losses and gradients are finite here, too."""
    check('pspnet', loss, data)
