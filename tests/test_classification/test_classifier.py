"""The wrapper of classifiers: the plain student, and the teacher's lessons."""
import copy

import pytest
import torch
from mmengine.runner.checkpoint import get_state_dict, load_state_dict

from ..refusals import refused
from .models import (NUM_CLASSES, PREPROCESSOR, batch, build, build_distiller,
                     linear, models, of_timm, outputs_of, resnet, save_teacher)

CLOSE = dict(rtol=1e-4, atol=1e-5)


def pearson(x, y, dim):
    """The mean of ``1 - rho``, written out."""
    x, y = (z - z.mean(dim, keepdim=True) for z in (x, y))
    rho = (x * y).sum(dim) / (x.norm(dim=dim) * y.norm(dim=dim) + 1e-8)
    return 1 - rho.mean()


def gradients(model):
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters() if p.grad is not None
    }


def test_losses_by_hand(tmp_path):
    """The paper's on CIFAR-100: 2 tau^2 times each mean distance."""
    teacher = save_teacher(resnet(14), tmp_path)
    loss = dict(type='mmdist.DISTLoss', beta=2., gamma=2., tau=4.)
    wrapper = build_distiller(resnet(), teacher, distill_loss=loss).eval()
    inputs, samples = batch(wrapper)
    losses = wrapper.loss(inputs, samples)
    p, q = ((outputs_of(model, inputs)[0].double() / 4).softmax(1)
            for model in (build(resnet()).eval(), build(resnet(14), 1).eval()))
    for term, dim in (('loss_kd_inter', 1), ('loss_kd_intra', 0)):
        torch.testing.assert_close(
            losses[term].double(), 32 * pearson(p, q, dim), rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', [n for n in models() if n != 'conformer'])
def test_weights_of_zero_are_the_plain_student(name, tmp_path):
    """Losses and gradients, bit for bit, in train mode."""
    model = models()[name]
    loss = dict(type='mmdist.DISTLoss', beta=0., gamma=0.)
    wrapper = build_distiller(
        model, save_teacher(model, tmp_path), distill_loss=loss).train()
    plain = build(model).train()
    for seed in range(3):
        results = []
        for each in (plain, wrapper):
            inputs, samples = batch(each, seed=seed)
            torch.manual_seed(seed)
            each.zero_grad()
            losses = each.loss(inputs, samples)
            sum(v for k, v in losses.items() if 'loss' in k).backward()
            results.append((losses['loss'], gradients(each)))
        (loss_p, grads_p), (loss_w, grads_w) = results
        assert torch.equal(loss_p, loss_w) and grads_p.keys() == grads_w.keys()
        for key, grad in grads_p.items():
            assert torch.equal(grad, grads_w[key]), key


@pytest.mark.parametrize('name', models())
def test_the_student_learns_and_the_teacher_does_not(name, tmp_path):
    model = models()[name]
    wrapper = build_distiller(
        model, save_teacher(model, tmp_path), alpha=0.).train()
    teacher = wrapper.distillation.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    inputs, samples = batch(
        wrapper, num=3, size=224 if name == 'conformer' else 32)
    losses = wrapper.loss(inputs, samples)
    assert losses['loss'] == 0
    for term in ('loss_kd_inter', 'loss_kd_intra'):
        assert losses[term].isfinite() and losses[term] > 0
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    learnt = sum(g.abs().sum() for g in gradients(wrapper).values())
    assert learnt > 0 and all(p.grad is None for p in teacher.parameters())
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])


def test_an_identical_teacher_has_no_divergence(tmp_path):
    loss = dict(type='mmdist.KDLoss', tau=4.)
    wrapper = build_distiller(
        resnet(), save_teacher(resnet(), tmp_path, seed=0),
        distill_loss=loss).eval()
    losses = wrapper.loss(*batch(wrapper))
    assert losses['loss_kd_kl'].abs() < 1e-6


def test_checkpoints_are_the_students(tmp_path):
    """Both ways, strictly; predictions are the student's."""
    wrapper = build_distiller(resnet(), save_teacher(resnet(14), tmp_path))
    plain = build(resnet(), seed=5)
    plain.load_state_dict(wrapper.state_dict(), strict=True)
    wrapper.load_state_dict(build(resnet(), seed=7).state_dict(), strict=True)
    plain.load_state_dict(wrapper.state_dict())
    inputs, samples = batch(wrapper, training=False)
    found = [
        m.eval()(inputs, copy.deepcopy(samples), mode='predict')
        for m in (plain, wrapper)
    ]
    for one, other in zip(*found):
        assert torch.equal(one.pred_score, other.pred_score)


@pytest.mark.parametrize('teacher', ['timm', 'resnet'])
def test_a_model_that_is_its_own_head(teacher, tmp_path):
    """Its checkpoint has the plain model's keys, and restores all of them;
    as a teacher it computes once a step."""
    timm = of_timm()
    saved = save_teacher(dict(timm=timm, resnet=resnet())[teacher], tmp_path)
    wrapper = build_distiller(timm, saved).train()
    wrapper.distillation.monitor.judged = True
    if teacher == 'timm':
        calls = []
        wrapper.distillation.teacher.model.model.layer1.register_forward_hook(
            lambda *_: calls.append(1))
    for seed in range(3):
        losses = wrapper.loss(*batch(wrapper, seed=seed))
        assert losses['loss_kd_inter'] > 0
    assert teacher != 'timm' or len(calls) == 3
    state = get_state_dict(wrapper)
    assert state.keys() == get_state_dict(build(timm)).keys()
    other = build_distiller(timm, saved, seed=9)
    load_state_dict(other, state, strict=True)
    for one, two in zip(wrapper.parameters(), other.parameters()):
        assert torch.equal(one, two)


def test_a_teacher_that_is_its_own_head(tmp_path):
    saved = save_teacher(of_timm(), tmp_path)
    wrapper = build_distiller(resnet(), saved).train()
    for seed in range(3):
        assert wrapper.loss(*batch(wrapper, seed=seed))['loss_kd_inter'] > 0


def test_several_tasks_are_refused(tmp_path):
    """Nothing says which of the teacher's is which of the student's."""
    tasks = resnet()
    tasks['head'] = dict(
        type='MultiTaskHead',
        task_heads={name: linear(16)
                    for name in ('one', 'two')})
    for student, teacher, field in ((tasks, resnet(), 'model.student'),
                                    (resnet(), tasks, 'model.teacher')):
        with pytest.raises(ValueError, match=f'{field}.* several heads'):
            build_distiller(student, save_teacher(teacher, tmp_path))


def test_mimic_of_vectors_is_refused(tmp_path):
    with pytest.raises(ValueError, match='one vector for an image'):
        build_distiller(
            resnet(),
            save_teacher(resnet(), tmp_path),
            mimic_loss=dict(type='mmdist.MimicLoss'))


@pytest.mark.parametrize(
    'class_map, words',
    [([15, *range(9)], 'names the class 15'),
     ([0, 1, 2], 'class_map: it has 3 classes but model.student predicts 10')])
def test_impossible_maps_are_refused(class_map, words, tmp_path):
    """Also where neither model says how many classes it has."""
    timm = of_timm()
    saved = dict(save_teacher(timm, tmp_path), class_map=class_map)
    torch.save(
        dict(
            state_dict=torch.load(saved['checkpoint']),
            meta=dict(dataset_meta=dict(classes=[str(i) for i in range(16)]))),
        saved['checkpoint'])
    wrapper = build_distiller(timm, saved)
    with refused('model.teacher.class_map', words):
        wrapper.loss(*batch(wrapper))


def test_the_teacher_sees_its_own_normalisation(tmp_path):
    """Other statistics and order of channels."""
    other = dict(
        PREPROCESSOR, mean=[1., 2., 3.], std=[9., 8., 7.], to_rgb=False)
    teacher = dict(resnet(14), data_preprocessor=other)
    wrapper = build_distiller(resnet(), save_teacher(teacher, tmp_path)).eval()
    plain = build(teacher, 1).eval()
    inputs, samples = batch(wrapper)
    ask = wrapper.distillation.teacher.batch(inputs, samples)
    answer = ask.head_outputs(['head'])['head']
    expected, = outputs_of(plain, batch(plain)[0])
    torch.testing.assert_close(answer, expected, **CLOSE)


def test_both_see_mixed_pictures(tmp_path):
    """Mixup is drawn once, before either model."""
    mixed = dict(
        PREPROCESSOR,
        batch_augments=dict(augments=dict(type='Mixup', alpha=1.)))
    student = dict(resnet(), data_preprocessor=mixed)
    wrapper = build_distiller(student, save_teacher(resnet(),
                                                    tmp_path)).train()
    inputs, samples = batch(wrapper)
    assert 'gt_score' in samples[0]
    seen = wrapper.distillation.teacher.batch(inputs,
                                              samples).renormalised(inputs)
    assert torch.equal(seen, inputs)
    assert wrapper.loss(inputs, samples)['loss_kd_inter'].isfinite()


def test_others_are_refused(tmp_path):
    """What learns without labels is no classifier."""
    learner = dict(
        type='SimSiam',
        backbone=resnet()['backbone'],
        neck=dict(
            type='NonLinearNeck',
            in_channels=16,
            hid_channels=8,
            out_channels=8,
            with_avg_pool=True),
        head=dict(
            type='LatentPredictHead',
            loss=dict(type='CosineSimilarityLoss'),
            predictor=dict(
                type='NonLinearNeck',
                in_channels=8,
                hid_channels=8,
                out_channels=8,
                with_avg_pool=False)))
    with refused('model.student', 'is a SimSiam'):
        build_distiller(learner, save_teacher(resnet(), tmp_path))


def test_a_random_teacher_is_noticed(tmp_path):
    """By the labels of the pictures, within ten iterations."""
    wrapper = build_distiller(
        resnet(), save_teacher(resnet(14), tmp_path), strict_teacher=True)
    with refused('model.teacher', 'chance'):
        for seed in range(10):
            wrapper.train().loss(*batch(wrapper, NUM_CLASSES, seed))
