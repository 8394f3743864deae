"""Watching a head's loss call, and choosing the tap."""
import copy

import pytest
import torch
from mmdet.models.dense_heads import FCOSHead
from mmdet.registry import MODELS
from mmengine.config import Config

from mmdist.models.taps import (DenseTap, RoITap, build_tap, pair_logits,
                                watch_heads, watch_method)
from mmdist.models.teacher import TeacherBatch
from tests.helpers import (DENSE, TWO_STAGE, assert_same, batch, build,
                           detector, flat, prepared)
from tests.refusals import refused


class Counter:
    """Something with a method."""

    def __init__(self):
        self.seen = []

    def add(self, amount, times=1, *, sign=1):
        self.seen.append(amount)
        if amount < 0:
            raise RuntimeError('negative')
        return sign * amount * times


def test_watch_method_reads_arguments_by_name():
    """Positional and keyword arguments arrive alike, with the result."""
    counter, record = Counter(), []
    with watch_method(counter, 'add', lambda *read: record.append(read)):
        assert counter.add(2, 3) == 6
        assert counter.add(amount=2, sign=-1) == -2
    assert record == [(dict(amount=2, times=3), 6),
                      (dict(amount=2, sign=-1), -2)]


@pytest.mark.parametrize('amount', [1, -1])
def test_watch_method_restores_the_instance(amount):
    """After a call and after an exception nothing is left behind."""
    counter, record = Counter(), []
    try:
        with watch_method(counter, 'add', lambda *read: record.append(read)):
            counter.add(amount)
    except RuntimeError:
        assert record == []
    assert counter.__dict__ == dict(seen=[amount])
    counter.add(5)
    assert len(record) == (amount > 0)


def test_watch_method_restores_an_override_of_the_instance():
    """A method that a user set on the instance comes back as it was."""
    counter, record = Counter(), []

    def mine(amount):
        return amount + 100

    counter.add = mine
    with watch_method(counter, 'add', lambda *read: record.append(read)):
        assert counter.add(1) == 101
    assert counter.__dict__['add'] is mine and len(record) == 1


def test_watch_method_watches_one_instance():
    """Another object of the class is not recorded."""
    counter, other, record = Counter(), Counter(), []
    with watch_method(counter, 'add', lambda *read: record.append(read)):
        other.add(1)
    assert record == []


@pytest.mark.parametrize('name', TWO_STAGE + DENSE)
def test_tap_is_chosen_from_the_head(name):
    """Two-stage models are read off box heads, the others off dense heads."""
    tap = build_tap(build(detector(name)))
    heads = dict(
        faster=['roi_head.bbox_head'],
        mask=['roi_head.bbox_head'],
        cascade=[f'roi_head.bbox_head.{i}' for i in range(3)])
    assert list(tap.heads) == heads.get(name, ['bbox_head'])
    assert type(tap) is (RoITap if name in TWO_STAGE else DenseTap)


@pytest.mark.parametrize('name', TWO_STAGE + DENSE)
def test_watching_leaves_the_losses_alone(name):
    """The watched losses are the plain ones, bit for bit."""
    plain, watched = build(detector(name)), build(detector(name))
    inputs, samples = prepared(plain, batch(name))
    torch.manual_seed(0)
    expected = plain.train().loss(inputs, copy.deepcopy(samples))
    torch.manual_seed(0)
    with watch_heads(build_tap(watched), watched.train()) as calls:
        losses = watched.loss(inputs, copy.deepcopy(samples))
    assert_same(flat(losses), flat(expected))
    assert len(calls) == (3 if name == 'cascade' else 1)


@pytest.mark.parametrize('name', ['faster', 'cascade', 'retina'])
def test_heads_are_restored_when_the_loss_fails(name):
    """An exception in the student's loss leaves no watched head behind."""
    student = build(detector(name))
    inputs, samples = prepared(student, batch(name))
    del samples[0].gt_instances.labels
    tap = build_tap(student)
    before = [set(m.__dict__) for m in student.modules()]
    with pytest.raises(AttributeError), watch_heads(tap, student):
        student.loss(inputs, samples)
    assert [set(m.__dict__) for m in student.modules()] == before
    head = student.get_submodule(next(iter(tap.heads)))
    assert tap.reads[0].method not in head.__dict__


def test_a_copy_of_the_student_is_watched_by_a_copy_of_the_tap():
    """EMA copies the model with its tap; the tap works on either."""
    student = build(detector('retina'))
    tap = build_tap(student)
    twin, twin_tap = copy.deepcopy((student, tap))
    inputs, samples = prepared(student, batch())
    with watch_heads(tap, student) as calls, watch_heads(twin_tap,
                                                         twin) as twin_calls:
        twin.loss(inputs, samples)
    assert len(calls) == 0 and len(twin_calls) == 1


def test_a_head_of_the_user_needs_no_entry():
    """A head that mmdist has never heard of is found by its loss call."""

    @MODELS.register_module(force=True)
    class MyOwnHead(FCOSHead):
        pass

    model = detector('fcos')
    model['bbox_head']['type'] = 'MyOwnHead'
    student = build(model)
    inputs, samples = prepared(student, batch())
    with watch_heads(build_tap(student), student) as calls:
        student.loss(inputs, samples)
    assert [call.path for call in calls] == ['bbox_head']


def test_a_proposal_network_has_nothing_to_distil():
    """An RPN knows objects but no classes."""
    rpn = build(_rpn())
    with refused('model.student', 'a RPN'):
        build_tap(rpn)


def _rpn():
    model = detector('faster')
    model['type'] = 'RPN'
    del model['roi_head']
    for key in ('train_cfg', 'test_cfg'):
        model[key].pop('rcnn')
    return Config(dict(model=model)).model.to_dict()


def test_a_frozen_head_is_refused():
    """Nothing can be distilled into it."""
    student = build(detector('retina'))
    student.bbox_head.requires_grad_(False)
    with refused('model.student', 'heads are frozen'):
        build_tap(student)


def test_losses_of_other_images_are_refused():
    """A teacher's heads are asked about one batch; RoIs may be of any."""
    student = build(detector('retina'))
    inputs, samples = prepared(student, batch())
    tap = build_tap(student)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, samples)
    teacher = build(detector('retina'), seed=1).eval()
    tap.connect(student, teacher)
    other = TeacherBatch(teacher, dict(sup=inputs), samples)
    with refused('model.student', 'several batches in a step'):
        pair_logits(tap, calls, other)


@pytest.mark.parametrize('name', ['faster', 'retina'])
def test_unknown_option_is_refused(name):
    """An option that the tap does not know is named."""
    with refused('model.tap', 'anchor_rows'):
        build_tap(build(detector(name)), anchor_rows=True)


def test_option_of_another_tap_is_refused():
    """RoIs have no anchors: the option belongs to dense heads."""
    with refused('model.tap', 'RoITap'):
        build_tap(build(detector('faster')), anchors_as_rows=True)
