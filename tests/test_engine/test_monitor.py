"""The monitor of the teacher: what wastes a night is said, or stops."""
import copy
import logging

import pytest
import torch
from mmengine.logging import MessageHub

from mmdist.engine import TeacherMonitor
from mmdist.engine.terms import gradient_norm
from mmdist.models.taps.base import LogitPair
from mmdist.models.taps.columns import classes_of
from tests.refusals import refused
from tests.segmentors import (IGNORED, NUM_CLASSES, batch, binary, build,
                              build_distiller, one_column, prepared,
                              save_teacher, segmentor)

# BGR; red and blue exchanged, each is the colour of another class.
COLOURS = torch.tensor([[210, 120, 40], [40, 120, 210], [220, 30, 120],
                        [120, 30, 220]])


def painted(seed):
    """Pictures whose colours are their classes."""
    data = batch(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for i, sample in enumerate(data['data_samples']):
        labels = sample.gt_sem_seg.data[0]
        # blocks of 32 pixels, four logits wide
        labels = labels[:16, :16].repeat_interleave(4, 0)
        labels = labels.repeat_interleave(4, 1)
        sample.gt_sem_seg.data = labels[None]
        known = torch.where(labels == IGNORED, 0, labels)
        noise = torch.randint(-25, 26, (3, *labels.shape), generator=generator)
        picture = COLOURS[known].permute(2, 0, 1) + noise
        data['inputs'][i] = picture.clamp(0, 255).to(torch.uint8)
    return data


@pytest.fixture(scope='module')
def trained():
    """A teacher that has learnt the colours: its config and weights."""
    return taught(segmentor('pspnet'), painted)


@pytest.fixture(scope='module')
def trained_column():
    """A teacher of one column, which has learnt two of the colours."""
    return taught(one_column(), lambda seed: binary(painted(seed)))


def taught(cfg, images):
    """A config, and the weights of a model that has learnt from images."""
    model = build(cfg, 1).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    # Long enough for any initial weights: rounding differs between machines.
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1., 0., 300)
    for seed in range(300):
        losses = model.loss(*prepared(model, images(seed)))
        optimizer.zero_grad()
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        decay.step()
    return cfg, model.state_dict()


def distil(trained,
           folder,
           steps=10,
           change=lambda cfg, weights: None,
           **options):
    """Compute the losses of some steps with a teacher that was changed."""
    cfg, weights = copy.deepcopy(trained)
    change(cfg, weights)
    path = str(folder / 'teacher.pth')
    torch.save(dict(state_dict=weights), path)
    wrapper = build_distiller(
        segmentor('pspnet'), dict(config=cfg, checkpoint=path), **options)
    wrapper.train()
    for seed in range(steps):
        wrapper.loss(*prepared(wrapper, painted(1000 + seed)))
    return wrapper


def other_mean(cfg, weights):
    cfg['data_preprocessor'].update(mean=[0.] * 3, std=[1.] * 3)


def swapped(cfg, weights):
    cfg['data_preprocessor'].update(bgr_to_rgb=False)


def permuted(cfg, weights):
    for name, weight in weights.items():
        if 'conv_seg' in name:
            weights[name] = weight.roll(2, 0)


def untrained(cfg, weights):
    weights.update(build(cfg, 5).state_dict())


def not_a_number(cfg, weights):
    weights['decode_head.conv_seg.weight'] *= 1e38


def warnings_in(log):
    return [r.message for r in log.records if r.levelno >= logging.WARNING]


def test_a_good_teacher_is_praised(trained, tmp_path, log):
    """One line with both accuracies, and no warning."""
    distil(trained, tmp_path, strict_teacher=True)
    judged, = (r.message for r in log.records if 'is right' in r.message)
    assert float(judged.split('right about ')[1][:5]) > 0.7
    assert not warnings_in(log)


@pytest.mark.parametrize(
    'change, match, field',
    [(other_mean, 'correct mean and std', 'model.teacher.config'),
     (swapped, 'correct bgr_to_rgb', 'model.teacher.config'),
     (permuted, 'class_map', 'model.teacher'),
     (untrained, 'was not trained', 'model.teacher'),
     (not_a_number, 'no number', 'model.teacher.checkpoint')])
def test_a_bad_teacher_is_noticed(trained, tmp_path, log, change, match,
                                  field):
    """By a warning that names the causes; strictly, by the end of the run."""
    distil(trained, tmp_path, change=change)
    warning, = (w for w in warnings_in(log) if 'teacher' in w)
    assert match in warning
    with refused(field, 'strict_teacher'):
        distil(trained, tmp_path, change=change, strict_teacher=True)


@pytest.mark.parametrize('shift, named', [(1, True), (0, False)])
def test_classes_in_another_order_are_not_taken_for_colours(shift, named, log):
    """Below chance both are named; at chance the channels alone."""
    labels = torch.arange(60) % 3
    truth = torch.nn.functional.one_hot(labels).float()
    right = torch.arange(60) < 20  # a third, which is chance
    wrong = truth.roll(1, 1)
    teacher = wrong if shift else torch.where(right[:, None], truth, wrong)
    pair, swapped = (
        LogitPair(truth, logits, num_classes=3, labels=lambda: labels)
        for logits in (teacher, truth))
    monitor = TeacherMonitor(iters=1)
    with torch.no_grad():
        monitor.watch([pair], [truth], {}, {}, [swapped])
    warning, = warnings_in(log)
    assert 'correct bgr_to_rgb' in warning
    assert ('class_map' in warning) == named


def test_a_student_that_is_better_is_noticed(trained, tmp_path, log):
    """As when the checkpoints of student and teacher were exchanged."""
    monitor = TeacherMonitor()
    labels = torch.arange(40) % 2
    logits = torch.nn.functional.one_hot(labels).float()
    wrong = logits.clone()
    wrong[:12] = wrong[:12].flip(1)  # 0.7 are right
    pair = LogitPair(
        logits.requires_grad_(), wrong, num_classes=2, labels=lambda: labels)
    for step in range(10):
        term = (logits - wrong).square().mean() * (step + 1)
        monitor.watch([pair], [logits], dict(loss_kd_kl=term), {})
    assert any('worse than the student' in w for w in warnings_in(log))


def test_terms_that_teach_nothing_are_noticed(trained, tmp_path, log):
    """A weight of 0: the terms stay the same and have no gradient."""
    distil(
        trained,
        tmp_path,
        distill_loss=dict(type='mmdist.DISTLoss', beta=0., gamma=0.))
    warned = ' '.join(warnings_in(log))
    assert 'had a gradient' in warned


def test_a_constant_term_is_noticed(log):
    """One that should have changed, as its gradient says."""
    logits = torch.randn(6, NUM_CLASSES, requires_grad=True)
    monitor = TeacherMonitor()
    for _ in range(10):
        monitor.watch([], [logits], dict(loss_kd_kl=0 * logits.sum() + 1), {})
    assert any('learns nothing' in w for w in warnings_in(log))


@pytest.mark.parametrize('weights', [dict(beta=0.), dict(gamma=0.)])
def test_a_term_of_weight_0_is_meant(trained, tmp_path, log, weights):
    """It stays the same, which neither warns nor stops a strict run."""
    distil(
        trained,
        tmp_path,
        steps=12,
        strict_teacher=True,
        distill_loss=dict(type='mmdist.DISTLoss', **weights))
    assert not warnings_in(log)


@pytest.mark.parametrize('columns', [1, 2])
def test_a_term_that_is_constant_by_design_is_meant(tmp_path, log, columns):
    """Inter of one column, or of two whose probabilities sum to 1."""
    model = segmentor('pspnet')
    for head in ('decode_head', 'auxiliary_head'):
        model[head].update(num_classes=2, out_channels=columns)
        model[head]['loss_decode']['use_sigmoid'] = columns == 1
    model['decode_head'].update(threshold=0.5)
    wrapper = build_distiller(model, save_teacher(model, tmp_path)).train()
    for seed in range(12):
        data = painted(seed)
        for sample in data['data_samples']:
            labels = sample.gt_sem_seg.data
            labels[labels != IGNORED] %= 2
        wrapper.loss(*prepared(wrapper, data))
    assert not [w for w in warnings_in(log) if 'loss_kd' in w]


def test_the_ratio_of_gradients_is_logged(trained, tmp_path):
    """Of both losses' gradients on the logits, computed by hand."""
    logits = torch.randn(6, NUM_CLASSES, requires_grad=True)
    monitor = TeacherMonitor()
    term, own = logits.square().sum(), 3 * logits.square().sum()
    monitor.watch([], [logits], dict(loss_kd=term), dict(loss_ce=own))
    scalar = MessageHub.get_current_instance().get_scalar(
        'train/kd_grad_ratio')
    assert scalar.current() == pytest.approx(1 / 3, rel=1e-5)


def test_no_ratio_without_gradients_of_the_student(trained, tmp_path):
    """With alpha=0 nothing but distillation may reach the logits."""
    logits = torch.randn(6, NUM_CLASSES, requires_grad=True)
    TeacherMonitor().watch([], [logits], dict(loss_kd=logits.square().sum()),
                           dict(loss_ce=0 * logits.sum()))
    assert 'train/kd_grad_ratio' not in \
        MessageHub.get_current_instance().log_scalars


def test_gradients_are_left_as_they_were(trained, tmp_path):
    """Looking at gradients writes none, and a backward is still possible."""
    wrapper = distil(trained, tmp_path, steps=1)
    assert all(p.grad is None for p in wrapper.parameters())
    losses = wrapper.loss(*prepared(wrapper, painted(7)))
    sum(v for k, v in losses.items() if 'loss' in k).backward()


def test_classes_of_columns():
    """With a background, and of several anchors."""
    logits = torch.tensor([[1., 5., 2., 9.], [3., 0., 1., 9.]])
    assert classes_of(logits, 3).tolist() == [1, 0]  # and a background
    assert classes_of(logits, 2).tolist() == [1, 1]  # of two anchors
    assert gradient_norm([], [logits]) == 0


def distil_column(trained_column, folder, change=None):
    """Judge a teacher of one column, which was changed."""
    cfg, weights = copy.deepcopy(trained_column)
    if change:
        change(cfg, weights)
    path = str(folder / 'teacher.pth')
    torch.save(dict(state_dict=weights), path)
    wrapper = build_distiller(
        one_column(), dict(config=cfg, checkpoint=path),
        strict_teacher=True).train()
    for seed in range(10):
        data = binary(painted(1000 + seed))
        inputs, samples = prepared(wrapper, data)
        wrapper.distillation.monitor.watch(
            wrapper.kd_pairs(inputs, samples), [], {}, {})


def test_a_good_teacher_of_one_column_is_praised(trained_column, tmp_path,
                                                 log):
    """The class and what is not of it are told apart by the threshold."""
    distil_column(trained_column, tmp_path)
    judged, = (r.message for r in log.records if 'is right' in r.message)
    assert float(judged.split('right about ')[1][:5]) > 0.7
    assert 'of one class and the background' in judged
    assert 'chance: 0.500' in judged


def test_a_bad_teacher_of_one_column_is_noticed(trained_column, tmp_path):
    """One that was not trained says the same of every pixel."""
    with refused('model.teacher', 'was not trained'):
        distil_column(trained_column, tmp_path, untrained)


def test_one_class_without_a_threshold_is_not_judged(log):
    """The sentence says why: labels are known."""
    logits = torch.randn(40, 1)
    pair = LogitPair(
        logits,
        logits,
        'sigmoid',
        'sigmoid',
        num_classes=1,
        labels=lambda: torch.zeros(40, dtype=torch.long))
    TeacherMonitor(iters=1).watch([pair], [logits], {}, {})
    said, = (r.message for r in log.records)
    assert 'its one class has no threshold' in said


def test_one_class_is_there_above_its_threshold():
    """Or where it beats the background."""
    logits = torch.tensor([[-1., 1.], [-2., -1.]])
    assert classes_of(logits, 1, threshold=0.5).tolist() == [0, 1]
    assert classes_of(logits, 1, threshold=0.2).tolist() == [0, 0]
    assert classes_of(logits, 1, background=True).tolist() == [1, 1]
    assert classes_of(-logits, 1, background=True).tolist() == [0, 0]
