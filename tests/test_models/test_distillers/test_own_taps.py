"""A tap of a user's own for a toy head, in a file outside the package."""
import sys

import pytest
import torch
from mmengine.config import Config

from mmdist.models.taps import DenseTap
from mmdist.registry import TAPS
from tests.helpers import batch, build, detector, distiller_cfg, save_teacher
from tests.refusals import refused

MODULE = """
from mmdet.models.dense_heads import FCOSHead
from mmdet.registry import MODELS

from mmdist.models.taps import LogitPair, LogitTap, LossCall
from mmdist.registry import TAPS


def rate(cls_scores):
    return sum(level.mean((2, 3)) for level in cls_scores)


@MODELS.register_module()
class RatingHead(FCOSHead):
    \"\"\"Also rates, for each class, how much of it an image has.\"\"\"

    def loss_by_feat(self, cls_scores, *args, **kwargs):
        losses = super().loss_by_feat(cls_scores, *args, **kwargs)
        losses['loss_rating'] = self.loss_of_ratings(rate(cls_scores))
        return losses

    def loss_of_ratings(self, ratings):
        return ratings.square().mean()


@TAPS.register_module()
class RatingTap(LogitTap):
    priority = {priority}
    reads = (LossCall('loss_of_ratings', ('ratings', )), )
    rows = 'images'

    def pairs(self, call, batch):
        twin = self.heads[call.path]
        outputs = batch.head_outputs([twin])[twin]
        return [
            LogitPair(
                call.arguments['ratings'],
                rate(outputs[0]),
                student_activation='sigmoid',
                teacher_activation='sigmoid',
                num_classes=call.head.num_classes)
        ]
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the module and a config that imports it, and reads the config."""
    # FCOS itself is a dense head: the priorities decide who reads it.
    model = detector('fcos')
    model['bbox_head']['type'] = 'RatingHead'

    def load(priority):
        name = f'rating_tap_{priority}'
        (tmp_path / f'{name}.py').write_text(
            MODULE.replace('{priority}', str(priority)))
        monkeypatch.syspath_prepend(tmp_path)
        teacher = dict(config=model, checkpoint=str(tmp_path / 'teacher.pth'))
        cfg = Config(
            dict(
                custom_imports=dict(imports=['mmdist', name]),
                model=distiller_cfg(model, teacher)))
        cfg.dump(tmp_path / 'config.py')
        cfg = Config.fromfile(tmp_path / 'config.py')
        saved = save_teacher(model, tmp_path)
        cfg.model.teacher.checkpoint = saved['checkpoint']
        return cfg

    yield load
    from mmdet.registry import MODELS
    for registry, name in ((TAPS, 'RatingTap'), (MODELS, 'RatingHead')):
        registry.module_dict.pop(name)
    for name in [name for name in sys.modules if 'rating_tap' in name]:
        sys.modules.pop(name)


def test_a_tap_of_ones_own_trains(config):
    """It is found before those of the package, and its head learns."""
    model = build(config(40).model.to_dict()).train()
    tap = model.distillation.tap
    assert type(tap).__name__ == 'RatingTap'
    assert tap.heads == dict(bbox_head='bbox_head')
    before = model.bbox_head.conv_cls.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = model.data_preprocessor(batch(), True)
    losses = model.loss(**data)
    pair, = model.kd_pairs(**data)
    terms = model.distillation.loss.pair_terms(pair)
    for name, term in terms.items():
        torch.testing.assert_close(losses[f'loss_kd_{name}'], term)
        assert term > 0
    (losses['loss_kd_inter'] + losses['loss_kd_intra']).backward()
    optimizer.step()
    assert not torch.equal(model.bbox_head.conv_cls.weight, before)
    assert pair.student.shape == pair.teacher.shape == (2, 3)


def test_a_tap_that_pairs_nothing_is_named(config, monkeypatch):
    """Nothing would be learnt, in silence."""
    model = build(config(40).model.to_dict()).train()
    monkeypatch.setattr(TAPS.get('RatingTap'), 'pairs', lambda *_: [])
    with refused('model.student', 'RatingTap found nothing'):
        model.loss(**model.data_preprocessor(batch(), True))


def test_the_priority_decides(config):
    """With a higher number than those of the package, it is not asked."""
    model = build(config(95).model.to_dict())
    assert type(model.distillation.tap) is DenseTap
