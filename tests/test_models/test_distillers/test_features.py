"""Distillation of feature maps, of the three tasks' models."""
import copy

import numpy as np
import pytest
import torch
from mmdet.models import RetinaNet
from scipy.stats import pearsonr
from torch import nn

from mmdist.errors import ConfigError
from mmdist.registry import MODELS
from tests import helpers, segmentors
from tests.helpers import detector, gradients, prepared, total
from tests.refusals import refused

INTRA = dict(type='mmdist.DISTLoss', beta=0.0, gamma=1.0)
DIST = dict(type='mmdist.DISTLoss')


def make(tmp_path, student, teacher=None, **options):
    """A distilled detector, with features alone unless told otherwise."""
    saved = helpers.save_teacher(detector(teacher or student), tmp_path)
    return helpers.build_distiller(
        detector(student), saved, **{
            'distill_loss': None,
            'feature_loss': INTRA,
            **options
        })


def losses_of(model, name=''):
    inputs, samples = prepared(model, helpers.batch(name))
    torch.manual_seed(4)
    return model(inputs, samples, mode='loss')


def intra(student_maps, teacher_maps):
    """Mean over channels of 1 - r, by scipy, summed over the levels."""
    result = 0
    for s, t in zip(student_maps, teacher_maps):
        channels = [
            m.detach().double().transpose(0, 1).flatten(1).numpy()
            for m in (s, t)
        ]
        result += np.mean(
            [1 - pearsonr(a, b).statistic for a, b in zip(*channels)])
    return result


def test_intra_of_an_fpn_by_scipy(tmp_path):
    """Per channel over all positions of the batch, summed over levels."""
    model = make(tmp_path, 'retina')
    inputs, _ = prepared(model, helpers.batch())
    maps = [
        helpers.build(detector('retina'), seed).eval().extract_feat(inputs)
        for seed in (0, 1)
    ]
    model.eval()
    losses = losses_of(model)
    assert {k
            for k in losses if 'kd' in k
            } == {'loss_kd_feature_inter', 'loss_kd_feature_intra'}
    assert losses['loss_kd_feature_inter'] == 0
    assert float(losses['loss_kd_feature_intra']) == pytest.approx(
        intra(*maps), rel=1e-4)


def test_the_students_losses_are_its_own(tmp_path):
    """With weights of 0 nothing differs from the plain student."""
    plain = helpers.build(detector('faster'))
    model = make(tmp_path, 'faster', feature_loss=dict(DIST, beta=0, gamma=0))
    ours, theirs = losses_of(model), losses_of(plain)
    total(ours).backward()
    total(theirs).backward()
    own = {k: v for k, v in ours.items() if 'kd' not in k}
    helpers.assert_same(helpers.flat(own), helpers.flat(theirs))
    helpers.assert_same(gradients(model), gradients(plain))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize('student, teacher', [
    ('retina', 'faster'),
    ('fcos', 'cascade'),
    ('yolox', 'rtmdet'),
    ('faster', 'retina'),
])
def test_unlike_detectors_pair_by_stride(tmp_path, student, teacher):
    """A feature pyramid is a feature pyramid."""
    model = make(tmp_path, student, teacher, feature_loss=DIST)
    losses = losses_of(model, student)
    kd = sum(v for k, v in losses.items() if 'kd' in k)
    kd.backward()
    touched = {
        n.partition('.')[0]
        for n, g in gradients(model).items()
        if g is not None and g.abs().sum() > 0
    }
    assert {'backbone', 'neck'} <= touched <= {'backbone', 'neck', 'distiller'}


def test_beside_class_logits_and_mimic(tmp_path):
    """Each has its own names, and the sum of all is trained."""
    mimic = dict(type='mmdist.MimicLoss')
    alone = make(tmp_path, 'retina', distill_loss=DIST, feature_loss=None)
    both = make(
        tmp_path,
        'retina',
        distill_loss=DIST,
        feature_loss=DIST,
        mimic_loss=mimic)
    before, after = losses_of(alone), losses_of(both)
    assert after.keys() - before.keys() == {
        'loss_kd_feature_inter', 'loss_kd_feature_intra', 'loss_kd_mimic'
    }
    for name in ('loss_kd_inter', 'loss_kd_intra'):
        assert torch.equal(before[name], after[name])


def test_mimic_is_a_feature_loss(tmp_path):
    """Mean squared errors by hand."""
    model = make(
        tmp_path,
        'retina',
        feature_loss=dict(
            type='mmdist.MimicLoss', loss_weight=0.5, layers=[1, 2]))
    inputs, _ = prepared(model, helpers.batch())
    model.eval()
    s, t = (
        helpers.build(detector('retina'), seed).eval().extract_feat(inputs)
        for seed in (0, 1))
    expected = 0.5 * sum((s[i] - t[i]).square().mean() for i in (1, 2))
    torch.testing.assert_close(
        losses_of(model)['loss_kd_feature_mimic'], expected)


def test_projections_where_channels_differ(tmp_path):
    """They are trained, stand under ``distiller`` and leave the student of
    a seed alone."""
    wide = detector('retina', neck=dict(out_channels=24))
    wide['bbox_head']['in_channels'] = 24
    saved = helpers.save_teacher(wide, tmp_path)
    options = dict(distill_loss=None, feature_loss=DIST)
    model = helpers.build_distiller(detector('retina'), saved, **options)
    convs = model.distiller['feature'].projections
    assert [c.weight.shape[:2] for c in convs] == [(24, 16)] * 5
    plain = helpers.build(detector('retina')).state_dict()
    helpers.assert_same(
        {
            k: v
            for k, v in model.state_dict().items()
            if not k.startswith('distiller')
        }, plain)
    total(losses_of(model)).backward()
    assert all(c.weight.grad.abs().sum() > 0 for c in convs)
    with pytest.raises(ConfigError) as raised:
        options['feature_loss'] = dict(DIST, project=False)
        helpers.build_distiller(detector('retina'), saved, **options)
    assert raised.value.field == 'model.feature_loss.project'


def test_projections_where_they_are_asked_for(tmp_path):
    model = make(tmp_path, 'retina', feature_loss=dict(DIST, project=True))
    assert isinstance(model.distiller['feature'].projections[0], nn.Conv2d)
    assert not hasattr(make(tmp_path, 'retina'), 'distiller')


def test_copies_share_the_teacher(tmp_path):
    """An EMA's copy trains its own projections."""
    model = make(tmp_path, 'retina', feature_loss=dict(DIST, project=True))
    twin = copy.deepcopy(model)
    assert twin.distillation.teacher is model.distillation.teacher
    total(losses_of(twin)).backward()
    assert model.distiller['feature'].projections[0].weight.grad is None
    assert twin.distiller['feature'].projections[0].weight.grad is not None


def test_accumulated_gradients_are_those_of_one_batch(tmp_path):
    """Terms that are means over images or positions; intra, a relation over
    the positions of a batch, is none."""
    for loss in (dict(type='mmdist.MimicLoss'), dict(DIST, gamma=0.)):
        model = make(tmp_path, 'retina', feature_loss=loss).eval()
        inputs, samples = prepared(model,
                                   helpers.batch(sizes=[(64, 64), (64, 64)]))
        found = []
        for parts in ([slice(2)], [slice(1), slice(1, 2)]):
            model.zero_grad()
            for part in parts:
                losses = model.loss(inputs[part], samples[part])
                kd = sum(v for k, v in losses.items() if 'kd' in k)
                (kd / len(parts)).backward()
            found.append({
                name: grad
                for name, grad in gradients(model).items() if grad is not None
            })
        assert found[0].keys() == found[1].keys()
        for name, grad in found[0].items():
            torch.testing.assert_close(
                found[1][name],
                grad,
                rtol=1e-4,
                atol=1e-5 * float(grad.abs().max()))


def test_a_scale_of_0_switches_it_off(tmp_path):
    """As DistillScheduleHook does; the curves end at 0, DDP is content."""
    model = make(tmp_path, 'retina', feature_loss=dict(DIST, project=True))
    names = losses_of(model).keys()
    model.distillation.scale = 0.
    losses = losses_of(model)
    assert losses.keys() == names
    assert sum(float(v) for k, v in losses.items() if 'kd' in k) == 0
    total(losses).backward()
    weight = model.distiller['feature'].projections[0].weight
    assert weight.grad is not None and weight.grad.abs().sum() == 0


@pytest.mark.parametrize('where', ['neck', 'backbone'])
def test_detectors_have_two_places(tmp_path, where):
    """The backbone's maps are those that the neck gets."""
    model = make(
        tmp_path,
        'retina',
        feature_loss=dict(type='mmdist.MimicLoss', where=where)).eval()
    inputs, _ = prepared(model, helpers.batch())
    s, t = (helpers.build(detector('retina'), seed).eval() for seed in (0, 1))
    read = (lambda m: m.extract_feat(inputs)) if where == 'neck' else (
        lambda m: m.backbone(inputs))
    expected = sum((a - b).square().mean() for a, b in zip(read(s), read(t)))
    torch.testing.assert_close(
        losses_of(model)['loss_kd_feature_mimic'], expected)


def segmentor(tmp_path, **options):
    """A distilled PSPNet."""
    pytest.importorskip('mmseg')
    saved = segmentors.save_teacher(segmentors.segmentor('pspnet'), tmp_path)
    return segmentors.build_distiller(
        segmentors.segmentor('pspnet'), saved, **options)


@pytest.mark.parametrize('distill_loss', [None, DIST])
@pytest.mark.parametrize('where', [None, 'backbone', 'head'])
def test_segmentors(tmp_path, where, distill_loss):
    """Backbone's stages, or the map before the last convolution."""
    feature_loss = dict(type='mmdist.MimicLoss')
    if where:
        feature_loss['where'] = where
    model = segmentor(
        tmp_path, distill_loss=distill_loss, feature_loss=feature_loss).eval()
    inputs, samples = segmentors.prepared(model, segmentors.batch())
    expected = 0
    plain = [
        segmentors.build(segmentors.segmentor('pspnet'), seed).eval()
        for seed in (0, 1)
    ]
    if where == 'head':
        maps = [[m.decode_head._forward_feature(m.extract_feat(inputs))]
                for m in plain]
    else:
        maps = [m.extract_feat(inputs) for m in plain]
    expected = sum((s - t).square().mean() for s, t in zip(*maps))
    losses = model.loss(inputs, samples)
    torch.testing.assert_close(losses['loss_kd_feature_mimic'], expected)
    assert ('loss_kd_intra' in losses) == bool(distill_loss)


@pytest.mark.parametrize('name', segmentors.SEGMENTORS)
def test_every_kind_of_segmentor(name, tmp_path):
    """DDRNet and PIDNet return further maps in training; heads of cascades
    need the output of the one before."""
    cfg = segmentors.segmentor(name)
    saved = segmentors.save_teacher(cfg, tmp_path)
    for where in (None, 'head'):
        model = segmentors.build_distiller(
            cfg,
            saved,
            distill_loss=None,
            feature_loss=dict(INTRA, where=where)).train()
        inputs, samples = segmentors.prepared(model, segmentors.batch())
        loss = model.loss(inputs, samples)['loss_kd_feature_intra']
        # Levels that are resized from one pixel have no relation: 1 each.
        assert 0 < loss <= 2 * len(model.distillation.features.pairs)
        loss.backward()
        found = [g for g in gradients(model).values() if g is not None]
        assert all(g.isfinite().all() for g in found)
        assert any(g.abs().sum() > 0 for g in found)


@pytest.mark.parametrize('fields, field', [
    (dict(type='mmdist.KDLoss'), 'model.feature_loss.type'),
    (dict(DIST, where='fpn'), 'model.feature_loss.where'),
    (dict(DIST, where='head'), 'model.feature_loss.where'),
    (dict(DIST, layers=[7]), 'model.feature_loss.layers'),
    (dict(DIST, layers=[]), 'model.feature_loss.layers'),
    (dict(DIST, layers=2), 'model.feature_loss.layers'),
    (dict(DIST, project='yes'), 'model.feature_loss.project'),
    (dict(DIST, gama=1), 'model.feature_loss'),
])
def test_bad_fields_are_refused(tmp_path, fields, field):
    with pytest.raises(ConfigError) as raised:
        make(tmp_path, 'retina', feature_loss=fields)
    assert raised.value.field == field


def test_a_student_that_extracts_no_features_is_refused(tmp_path):
    """Nothing would be learnt, in silence."""

    @MODELS.register_module(force=True)
    class SecretiveRetinaNet(RetinaNet):

        def loss(self, inputs, samples):
            return self.bbox_head.loss(
                self.neck(self.backbone(inputs)), samples)

    saved = helpers.save_teacher(detector('retina'), tmp_path)
    student = dict(detector('retina'), type='mmdist.SecretiveRetinaNet')
    model = helpers.build_distiller(
        student, saved, distill_loss=None, feature_loss=INTRA)
    with refused('model.feature_loss', 'without the maps of its neck'):
        losses_of(model)


def test_what_needs_class_logits_is_refused(tmp_path):
    """``alpha`` and ``tap`` mean nothing without them."""
    for options in (dict(alpha=0.5), dict(tap=dict(anchors_as_rows=True))):
        with pytest.raises(ConfigError) as raised:
            make(tmp_path, 'retina', **options)
        assert raised.value.field == f'model.{next(iter(options))}'
    with pytest.raises(ValueError, match='distill_loss'):
        make(tmp_path, 'retina', feature_loss=None)
