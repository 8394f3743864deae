"""The paper's detection pairs, compared with the authors' settings."""
import os.path as osp

import pytest
import torch
import yaml
from mmengine.config import Config

from tests.helpers import ZOO, build

CONFIGS = osp.join(
    osp.dirname(osp.dirname(osp.dirname(__file__))), 'configs', 'dist_det')
# pair: (stock 2x config, teacher, learning rate of 8 x 2 pictures)
PAIRS = {
    'faster-rcnn_r50-cascade-mask-x101':
    ('faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py',
     'cascade_rcnn/cascade-mask-rcnn_x101-64x4d_fpn_20e_coco.py', 0.02),
    'retinanet_r50-x101':
    ('retinanet/retinanet_r50_fpn_2x_coco.py',
     'retinanet/retinanet_x101-64x4d_fpn_1x_coco.py', 0.01),
}
METHODS = ('dist', 'kd', 'dist-mimic', 'dist-feat')
# pair: (student, teacher) of PKD
PKD_PAIRS = {
    'retinanet_r50-x101':
    PAIRS['retinanet_r50-x101'][:2],
    'retinanet_r50-mask-rcnn-swin-s':
    ('retinanet/retinanet_r50_fpn_2x_coco.py',
     'swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'),
    'fcos_r50-mask-rcnn-swin-s':
    ('fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_'
     'coco.py', 'swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py'),
}
LOGITS = dict(
    dist=dict(type='mmdist.DISTLoss', beta=1, gamma=1, tau=1),
    kd=dict(type='mmdist.KDLoss', tau=1, loss_weight=1))


def load(method, pair):
    """A config of this folder."""
    name = f'{method}_{pair}_fpn_2x_coco.py'
    return Config.fromfile(osp.join(CONFIGS, name))


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('method', METHODS)
def test_settings_are_the_authors(method, pair):
    """24 epochs, 2 pictures a GPU, the rate, and all weights 1."""
    cfg, lr = load(method, pair), PAIRS[pair][2]
    assert cfg.train_cfg.max_epochs == 24
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(
        type='SGD', lr=lr, momentum=0.9, weight_decay=0.0001)
    assert cfg.param_scheduler[1].milestones == [16, 22]
    assert cfg.model.alpha == 1
    assert cfg.model.distill_loss == LOGITS[method.partition('-')[0]]
    mimic = dict(type='mmdist.MimicLoss', loss_weight=1)
    features = dict(type='mmdist.DISTLoss', beta=0, gamma=1)
    assert cfg.model.get('mimic_loss') == (
        mimic if 'mimic' in method else None)
    assert cfg.model.get('feature_loss') == (
        features if 'feat' in method else None)


def unscoped(part):
    """Without the mark that MMEngine leaves in bases of other packages."""
    if isinstance(part, dict):
        return {k: unscoped(v) for k, v in part.items() if k != '_scope_'}
    return [unscoped(v) for v in part] if isinstance(part, list) else part


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('method', METHODS)
def test_all_but_the_model_is_the_stock_config(method, pair):
    """The student, data, schedule and runtime are MMDetection's."""
    cfg = unscoped(load(method, pair).to_dict())
    stock = Config.fromfile(osp.join(ZOO, PAIRS[pair][0])).to_dict()
    model = cfg.pop('model')
    assert model['type'] == 'mmdist.DistillDetector'
    assert model['student'] == stock.pop('model')
    assert cfg.pop('custom_imports') == dict(imports=['mmdist'])
    assert cfg.pop('custom_hooks') == [dict(type='mmdist.SeedHook')]
    assert cfg['default_hooks']['checkpoint'].pop('backend_args') == dict(
        backend='mmdist.whole')
    assert cfg == stock


@pytest.mark.parametrize('method, pair, name', [
    *[('dist', pair, PAIRS[pair][1]) for pair in PAIRS],
    *[('pkd', pair, PKD_PAIRS[pair][1]) for pair in PKD_PAIRS],
])
def test_teacher_is_the_zoos(method, pair, name):
    """The URL is the one that MMDetection's own model index gives."""
    teacher = load(method, pair).model.teacher
    assert teacher.config == f'mmdet::{name}'
    metafile = osp.join(ZOO, osp.dirname(name), 'metafile.yml')
    with open(metafile) as file:
        models = yaml.safe_load(file)['Models']
    stem = osp.splitext(osp.basename(name))[0]
    entry, = [m for m in models if m['Name'] == stem]
    assert teacher.checkpoint == entry['Weights']


@pytest.fixture(scope='module', params=PAIRS)
def local_teacher(request, tmp_path_factory):
    """A pair, and random weights of its whole teacher."""
    pair = request.param
    path = tmp_path_factory.mktemp('teacher') / 'random.pth'
    model = Config.fromfile(osp.join(ZOO, PAIRS[pair][1])).model.to_dict()
    torch.save(build(model).state_dict(), path)
    yield pair, str(path)
    path.unlink()  # 400 MB


@pytest.mark.slow
@pytest.mark.parametrize('method', METHODS)
def test_builds(local_teacher, method):
    """Student and teacher pair; mimic has a 1x1 conv on each of 5 levels."""
    pair, path = local_teacher
    cfg = load(method, pair)
    cfg.model.teacher.checkpoint = path
    model = build(cfg.model.to_dict())
    rows = dict(faster='RoIs x 81', retina='locations x 720')
    tapped = model.distillation.tap.describe(model,
                                             model.distillation.teacher.model)
    assert tapped.startswith(rows[pair[:6]] + ' ')
    convs = [p.shape for n, p in model.named_parameters() if 'distiller' in n]
    mimic = [(256, 256, 1, 1), (256, )] * 5
    assert convs == (mimic if method == 'dist-mimic' else [])


@pytest.mark.parametrize('pair', PKD_PAIRS)
def test_settings_are_those_of_pkd(pair):
    """24 epochs; weight 6 on four levels, class logits left alone."""
    cfg = load('pkd', pair)
    stock = Config.fromfile(osp.join(ZOO, PKD_PAIRS[pair][0])).to_dict()
    assert cfg.train_cfg.max_epochs == 24
    assert cfg.param_scheduler[1].milestones == [16, 22]
    model = unscoped(cfg.model.to_dict())
    assert model['student'] == stock['model']
    assert not model.get('distill_loss')
    assert model['feature_loss'] == dict(
        type='mmdist.DISTLoss', beta=0, gamma=6, layers=[0, 1, 2, 3])


@pytest.mark.slow
@pytest.mark.parametrize('pair', PKD_PAIRS)
def test_pkd_builds(pair, tmp_path):
    """Levels of strides 8 to 64 pair, and need no projection."""
    cfg = load('pkd', pair)
    teacher = Config.fromfile(osp.join(ZOO, PKD_PAIRS[pair][1])).model
    cfg.model.teacher.checkpoint = str(tmp_path / 'random.pth')
    torch.save(
        build(teacher.to_dict()).state_dict(), cfg.model.teacher.checkpoint)
    model = build(cfg.model.to_dict())
    shift = 1 if 'swin' in pair else 0  # its FPN begins at stride 4
    assert model.distillation.features.pairs == [(i, i + shift)
                                                 for i in range(4)]
    assert not hasattr(model, 'distiller')
