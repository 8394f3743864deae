"""Ramping distillation up, and ending it."""
import copy
import json
from pathlib import Path

import pytest
import torch

from mmdist.engine import DistillScheduleHook
from mmdist.errors import ConfigError
from tests.helpers import (batch, build, build_distiller, detector,
                           distiller_cfg, flat, make_runner, prepared,
                           save_teacher, train, write_coco)

MIMIC = dict(type='mmdist.MimicLoss')


@pytest.mark.parametrize('options, scales', [
    (dict(), {
        0: 1,
        7: 1
    }),
    (dict(ramp=4), {
        0: 0,
        1: 0.25,
        3: 0.75,
        4: 1,
        9: 1
    }),
    (dict(begin=2, ramp=2, end=6), {
        1.9: 0,
        2: 0,
        3: 0.5,
        5.9: 1,
        6: 0
    }),
    (dict(end=3), {
        0: 1,
        2.99: 1,
        3: 0,
        100: 0
    }),
])
def test_the_scale_by_hand(options, scales):
    hook = DistillScheduleHook(**options)
    assert {time: hook.scale_at(time) for time in scales} == scales


@pytest.mark.parametrize(
    'options', [dict(begin=-1),
                dict(ramp=-2),
                dict(begin=1, ramp=2, end=2)])
def test_numbers_in_no_order_are_refused(options):
    with pytest.raises(ConfigError, match='begin and ramp') as info:
        DistillScheduleHook(**options)
    assert info.value.field == 'DistillScheduleHook of custom_hooks'


@pytest.fixture
def teacher(tmp_path):
    return save_teacher(detector('retina'), tmp_path)


def test_terms_are_scaled(teacher):
    """All of them, the task's losses not."""
    wrapper = build_distiller(
        detector('retina'), teacher, mimic_loss=MIMIC).train()
    data = prepared(wrapper, batch())
    whole = flat(wrapper.loss(*copy.deepcopy(data)))
    wrapper.distillation.scale = 0.25
    part = flat(wrapper.loss(*copy.deepcopy(data)))
    assert whole.keys() == part.keys()
    for name, loss in whole.items():
        factor = 0.25 if name.startswith('loss_kd_') else 1
        torch.testing.assert_close(part[name], factor * loss)


def test_nothing_due_is_the_plain_student(teacher):
    """The teacher does not compute; what mimic trains has a gradient of 0."""
    wrapper = build_distiller(
        detector('retina'), teacher, mimic_loss=MIMIC).train()
    wrapper.distillation.scale = 0.

    def compute(*_):
        raise AssertionError('the teacher computes')

    wrapper.distillation.teacher.model.backbone.register_forward_pre_hook(
        compute)
    plain = build(detector('retina')).train()
    data = prepared(plain, batch())
    expected = flat(plain.loss(*copy.deepcopy(data)))
    found = flat(wrapper.loss(*copy.deepcopy(data)))
    assert found.pop('loss_kd_mimic.0') == 0
    assert expected.keys() == found.keys()
    for name, loss in expected.items():
        assert torch.equal(loss, found[name])
    sum(flat(wrapper.loss(*data)).values()).backward()
    for parameter in wrapper.distiller.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def logged(work_dir, key):
    """What a run logged, iteration by iteration."""
    path, = Path(work_dir).rglob('scalars.json')
    lines = map(json.loads, path.read_text().splitlines())
    return [line.get(key) for line in lines if 'loss' in line]


def test_a_run_ramps_and_ends_and_resumes(teacher, tmp_path):
    """Of three iterations an epoch; resumed, it goes on as it would have."""
    root = write_coco(tmp_path / 'data')
    hooks = [dict(type='mmdist.DistillScheduleHook', begin=1, ramp=1, end=3)]
    args = distiller_cfg(detector('retina'), teacher), root
    train(
        *args,
        tmp_path / 'whole',
        epochs=4,
        custom_hooks=hooks,
        log_processor=dict(window_size=1))
    scales = [0, 0, 0, 0, 1 / 3, 2 / 3, 1, 1, 1, 0, 0, 0]
    assert logged(tmp_path / 'whole', 'kd_scale') == pytest.approx(scales)
    inter = logged(tmp_path / 'whole', 'loss_kd_inter')
    assert [bool(value) for value in inter] == [s > 0 for s in scales]
    resumed = tmp_path / 'resumed'
    train(
        *args,
        resumed,
        epochs=4,
        custom_hooks=hooks,
        load_from=str(tmp_path / 'whole' / 'epoch_2.pth'),
        resume=True)
    assert logged(resumed, 'kd_scale') == pytest.approx(scales[6:])


@pytest.mark.parametrize('kind', ['plain', 'alpha', 'iterations'])
def test_models_that_it_does_not_suit_are_refused(kind, teacher, tmp_path):
    """Before anything is trained."""
    root = write_coco(tmp_path / 'data')
    model, words = detector('retina'), 'take the hook out'
    if kind == 'alpha':
        model, words = distiller_cfg(model, teacher, alpha=0.), 'model.alpha'
    more = {}
    if kind == 'iterations':
        model, words = distiller_cfg(model, teacher), 'by_epoch=False'
        more = dict(train_cfg=dict(by_epoch=False, max_iters=2))
    runner = make_runner(
        model,
        root,
        tmp_path / 'run',
        epochs=1,
        **more,
        custom_hooks=[dict(type='mmdist.DistillScheduleHook', end=1)])
    with pytest.raises(ConfigError, match=words):
        runner.train()
    assert runner.iter == 0
