"""The segmentation pairs, compared with the authors' settings."""
import os.path as osp
from glob import glob

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import Runner

from tests.segmentors import ZOO, build

CONFIGS = osp.join(
    osp.dirname(osp.dirname(osp.dirname(__file__))), 'configs', 'dist_seg')
PAIRS = sorted(
    osp.basename(path)[len('dist_'):] for path in glob(f'{CONFIGS}/dist_*.py'))
CITYSCAPES = [pair for pair in PAIRS if '8xb2-40k_cityscapes' in pair]
# as tools/make_config.py --features writes it
FEATURES = dict(type='mmdist.MimicLoss', loss_weight=1, where='head')
LOGITS = dict(
    dist=dict(type='mmdist.DISTLoss', beta=1, gamma=1, tau=1),
    kd=dict(type='mmdist.KDLoss', tau=1, loss_weight=1))
METHODS = (*LOGITS, 'dist-feat')
# pair: what is tapped, and the auxiliary head's weight
TAPPED = dict(
    pspnet=('pixels x {} (softmax), decode_head <- decode_head, '
            'auxiliary_head <- auxiliary_head'),
    deeplabv3=('pixels x {} (softmax), decode_head <- decode_head, '
               'auxiliary_head <- auxiliary_head'),
    ddrnet='pixels x {} (softmax), decode_head <- decode_head',
    segformer='pixels x {} (softmax), decode_head <- decode_head')


def load(method, pair):
    """A config of this folder."""
    return Config.fromfile(osp.join(CONFIGS, f'{method}_{pair}'))


def unscoped(part):
    """Without the mark that MMEngine leaves in bases of other packages."""
    if isinstance(part, dict):
        return {k: unscoped(v) for k, v in part.items() if k != '_scope_'}
    if isinstance(part, (list, tuple)):
        return [unscoped(v) for v in part]
    return part


def test_the_pairs_are_there():
    """Two on Cityscapes with the authors' schedule, and four more."""
    assert len(CITYSCAPES) == 2 and len(PAIRS) == 6
    for word in ('ade20k', 'voc12aug', 'ddrnet', 'segformer'):
        assert any(word in pair for pair in PAIRS)


@pytest.mark.parametrize('pair', CITYSCAPES)
@pytest.mark.parametrize('method', LOGITS)
def test_settings_are_the_authors(method, pair):
    """40k iterations of 8 x 2 images, 0.02 poly, crop 512 x 1024."""
    cfg = load(method, pair)
    assert cfg.train_cfg.max_iters == 40000
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(
        type='SGD', lr=0.02, momentum=0.9, weight_decay=0.0005)
    (schedule, ) = cfg.param_scheduler
    assert (schedule.type, schedule.power, schedule.begin,
            schedule.end) == ('PolyLR', 0.9, 0, 40000)
    assert tuple(cfg.crop_size) == (512, 1024)
    teacher = Config.fromfile(
        osp.join(ZOO,
                 cfg.model.teacher.config.partition('::')[2]))
    assert teacher.model.backbone.depth == 101
    assert cfg.model.student.backbone.depth == 18
    assert cfg.model.student.auxiliary_head.loss_decode.loss_weight == 0.4


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('method', METHODS)
def test_all_but_the_model_is_the_students_config(method, pair):
    """Data, schedule and runtime are those of the student alone."""
    cfg = unscoped(load(method, pair).to_dict())
    base = Config.fromfile(osp.join(CONFIGS, f'dist_{pair}'))
    with open(base.filename) as file:
        name = eval(file.read().partition('\ncustom')[0].partition('=')[2])
    path = osp.join(ZOO,
                    name.partition('::')[2]) if '::' in name else (osp.join(
                        CONFIGS, name))
    alone = unscoped(Config.fromfile(path).to_dict())
    model = cfg.pop('model')
    assert model['type'] == 'mmdist.DistillSegmentor'
    assert model['student'] == alone.pop('model')
    assert model['alpha'] == 1
    assert model['distill_loss'] == LOGITS[method.partition('-')[0]]
    assert model.get('feature_loss') == (
        FEATURES if 'feat' in method else None)
    # where the student's config is MMSegmentation's own
    for own in (cfg, alone):
        own.pop('custom_imports', None)
        own.pop('custom_hooks', None)
        own['default_hooks']['checkpoint'].pop('backend_args', None)
    assert cfg == alone


@pytest.mark.parametrize('pair', PAIRS)
def test_teacher_is_the_zoos(pair):
    """The URL is the one that MMSegmentation's own model index gives."""
    teacher = load('dist', pair).model.teacher
    path = osp.join(ZOO, teacher.config.partition('::')[2])
    with open(osp.join(osp.dirname(path), 'metafile.yaml')) as file:
        models = yaml.safe_load(file)['Models']
    stem = osp.splitext(osp.basename(path))[0]
    entry, = [m for m in models if m['Name'] == stem]
    # The fork's index names another host of the same files.
    files = [
        url.partition('/mmsegmentation/')[2]
        for url in (teacher.checkpoint, entry['Weights'])
    ]
    assert files[0] == files[1] != ''


@pytest.mark.slow
@pytest.mark.parametrize('pair', PAIRS)
def test_builds(pair, tmp_path):
    """In a runner: student and teacher pair, with random weights."""
    teacher = load('dist', pair).model.teacher.config
    path = tmp_path / 'random.pth'
    model = Config.fromfile(osp.join(ZOO, teacher.partition('::')[2])).model
    torch.save(build(model.to_dict()).state_dict(), path)
    for method in METHODS:
        cfg = load(method, pair)
        cfg.model.teacher.checkpoint = str(path)
        cfg.work_dir = str(tmp_path)
        model = Runner.from_cfg(cfg).model
        tapped = model.distillation.tap.describe(
            model, model.distillation.teacher.model)
        classes = model.num_classes
        assert tapped == TAPPED[pair.partition('_')[0]].format(classes)
    # The maps before the last convolutions; SegFormers have as many channels.
    features = model.distillation.features
    assert features.pairs == [(0, 0)]
    channels = {
        each.decode_head.conv_seg.in_channels
        for each in (model, model.distillation.teacher.model)
    }
    projected = isinstance(features.projections[0], torch.nn.Conv2d)
    assert projected == (len(channels) == 2) == ('segformer' not in pair)
    path.unlink()  # 350 MB
