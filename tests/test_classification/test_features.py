"""Distillation of a classifier's features."""
import runpy
import sys
from pathlib import Path

import pytest
import torch

from tests.refusals import refused
from .models import batch, build, build_distiller, models, resnet, save_teacher
from .test_classifier import pearson

DIST = dict(type='mmdist.DISTLoss')


@pytest.mark.parametrize('where, distance', [
    (None, lambda s, t: pearson(s, t, 1)),
    ('backbone',
     lambda s, t: pearson(*(m.movedim(1, -1).flatten(0, 2)
                            for m in (s, t)), 1)),
])
def test_pooled_vectors_and_maps_by_hand(where, distance, tmp_path):
    """By default the vector that the head gets, a row per image."""
    model = build_distiller(
        resnet(),
        save_teacher(resnet(14), tmp_path),
        distill_loss=None,
        feature_loss=dict(DIST, where=where, gamma=0.)).eval()
    inputs, samples = batch(model)
    stage = 'backbone' if where else 'neck'
    maps = [
        plain.eval().extract_feat(inputs, stage)[0].double()
        for plain in (build(resnet()), build(resnet(14), 1))
    ]
    losses = model.loss(inputs, samples)
    torch.testing.assert_close(
        losses['loss_kd_feature_inter'].double(),
        distance(*maps),
        rtol=1e-5,
        atol=0)


# LeNet's backbone ends in its logits.
@pytest.mark.parametrize('name', [n for n in models() if n != 'lenet'])
def test_every_kind(name, tmp_path):
    """The terms are finite and reach the backbone."""
    model = models()[name]
    model = build_distiller(
        model, save_teacher(model, tmp_path), feature_loss=DIST).train()
    losses = model.loss(*batch(model))
    terms = [v for k, v in losses.items() if 'feature' in k]
    assert len(terms) == 2 and all(v.isfinite() and v > 0 for v in terms)
    sum(terms).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0
               for p in model.backbone.parameters())


def test_make_config_has_no_setting_for_classifiers(monkeypatch):
    """Nothing was tried; a feature_loss in a config is the user's choice."""
    root = Path(__file__).resolve().parents[2]
    config = root / 'configs/dist_cls/resnet8-w2_1xb32-10e_digits.py'
    tool = str(root / 'tools' / 'make_config.py')
    monkeypatch.setattr(
        sys, 'argv',
        [tool, *map(str, (config, config, 'x.pth', '--features'))])
    with refused('--features', 'no recommended .* mmdist.DistillClass'):
        runpy.run_path(tool, run_name='__main__')
