"""Pairs trained here: what distillation changes in a student's config."""
import os.path as osp

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

import mmdist  # noqa: F401

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
# student alone; one of the distilled configs, where the other has {}
PAIRS = {
    'align_boxes/retinanet_r18-w16_fpn_5e_digits.py':
    'align_boxes/{}_retinanet_r18-w16_faster-rcnn-w32_5e_digits.py',
    'align_boxes/sparse-rcnn_r18-w16_fpn_12e_digits.py':
    'align_boxes/{}_sparse-rcnn_r18-w16_retinanet-w32_12e_digits.py',
    'bccd/faster-rcnn_r18-w8_fpn_12e_bccd.py':
    'bccd/{}_faster-rcnn_r18-w8-w32_fpn_12e_bccd.py',
    'bccd/retinanet_r18-w16_fpn_12e_bccd.py':
    'bccd/{}_retinanet_r18-w16-w32_fpn_12e_bccd.py',
    'camvid/fpn_lite0_20e_camvid-180x240.py':
    'camvid/{}_fpn_lite0-lite2_20e_camvid-180x240.py',
    'camvid/pspnet_r18-w8-d8_1xb8-1k_camvid-180x240.py':
    'camvid/{}_pspnet_r18-w8-deeplabv3-w24_1xb8-1k_camvid-180x240.py',
    'cards/retinanet_lite0_fpn_20e_cards.py':
    'cards/{}_retinanet_lite0-lite2_fpn_20e_cards.py',
    'experiments/faster-rcnn_r18-w8_fpn_4e_digits-96.py':
    'experiments/{}_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
    'experiments/fpn_r18-w12_5e_digits.py':
    'experiments/{}_fpn_r18-w12-w24_5e_digits.py',
}
pytestmark = pytest.mark.parametrize('alone, distilled', PAIRS.items())


def load(name):
    return Config.fromfile(osp.join(ROOT, 'configs', name))


def test_distilling_changes_the_model_only(alone, distilled):
    """Vanilla KD and DIST: data, schedule and seed are the student's."""
    alone = load(alone).to_dict()
    assert alone['custom_imports']['imports'] == ['mmdist']
    student = alone.pop('model')
    losses = []
    for method in ('kd', 'dist'):
        cfg = load(distilled.format(method)).to_dict()
        model = cfg.pop('model')
        losses.append(model.pop('distill_loss'))
        assert model['student'] == student and model['alpha'] == 1
        assert cfg == alone
    kd, dist = losses
    assert kd == dict(type='mmdist.KDLoss', tau=1.0, loss_weight=1.0)
    assert dist == dict(type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0)


def test_teacher_is_the_last_checkpoint_of_its_config(alone, distilled):
    model = load(distilled.format('dist')).model
    teacher = Config.fromfile(osp.join(ROOT, model.teacher.config))
    train = teacher.train_cfg
    last = f'epoch_{train.max_epochs}' if 'max_epochs' in train else \
        f'iter_{train.max_iters}'
    assert osp.basename(model.teacher.checkpoint) == f'{last}.pth'


def test_builds(alone, distilled, tmp_path, monkeypatch):
    """With the checkpoint of a teacher, and the student's keys."""
    monkeypatch.chdir(ROOT)
    cfg = load(distilled.format('dist'))
    teacher = Config.fromfile(cfg.model.teacher.config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        weights = MODELS.build(teacher.model).state_dict()
        student = MODELS.build(cfg.model.student)
    cfg.work_dir = str(tmp_path)
    cfg.model.teacher.checkpoint = str(tmp_path / 'teacher.pth')
    torch.save(dict(state_dict=weights), cfg.model.teacher.checkpoint)
    distiller = Runner.from_cfg(cfg).model
    assert distiller.state_dict().keys() == student.state_dict().keys()
    features = osp.join(ROOT, 'configs', distilled.format('dist-feat'))
    if osp.isfile(features):  # the same, and a loss on feature maps
        cfg.model.feature_loss = Config.fromfile(features).model.feature_loss
        assert Runner.from_cfg(cfg).model.distillation.features
