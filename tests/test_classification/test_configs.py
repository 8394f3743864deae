"""The classification pairs, compared with the paper's settings."""
import os.path as osp
from glob import glob
from urllib.parse import urlparse

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import DefaultScope

from tests.test_configs.test_runtime import assert_resumes_exactly
from .models import MODELS, batch, build

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
CONFIGS = osp.join(ROOT, 'configs', 'dist_cls')
PAIRS = sorted(
    osp.basename(path)[len('dist_'):] for path in glob(f'{CONFIGS}/dist_*.py'))
CIFAR = [pair for pair in PAIRS if 'cifar100' in pair]


def load(name):
    return Config.fromfile(osp.join(CONFIGS, name))


@pytest.mark.parametrize(
    'name', [osp.basename(path) for path in glob(f'{CONFIGS}/*.py')])
def test_killed_runs_resume_exactly(name):
    assert_resumes_exactly(osp.join(CONFIGS, name))


def test_the_pairs_are_there():
    """Six on CIFAR-100, 14 on ImageNet, and digits: the paper's rows."""
    assert len(CIFAR) == 6 and len(PAIRS) == 21


@pytest.mark.parametrize('pair', CIFAR)
def test_cifar_is_the_authors(pair):
    """240 epochs of 64 images; 0.05, a tenth at 150, 180 and 210."""
    for method in ('dist', 'kd'):
        cfg = load(f'{method}_{pair}')
        assert cfg.train_cfg.max_epochs == 240
        assert cfg.train_dataloader.batch_size == 64
        optimizer = cfg.optim_wrapper.optimizer
        lr = 0.01 if 'net-v' in pair else 0.05
        assert (optimizer.lr, optimizer.momentum,
                optimizer.weight_decay) == (lr, 0.9, 5e-4)
        assert cfg.param_scheduler.milestones == [150, 180, 210]
    model = load(f'dist_{pair}').model
    assert model.distill_loss == dict(
        type='mmdist.DISTLoss', beta=2, gamma=2, tau=4)
    assert model.alpha == 1


@pytest.mark.parametrize('pair', [p for p in PAIRS if 'in1k' in p])
def test_imagenet_is_the_authors(pair):
    """100 epochs of 256 images from 0.1, 450 of 768 from 0.048, and Swin's
    own 300 of 1,024."""
    cfg = load(f'dist_{pair}')
    epochs, images, lr = next(
        each for part, each in {
            '8xb32': (100, 8 * 32, 0.1),
            '8xb96': (450, 8 * 96, 0.048),
            '16xb64': (300, 16 * 64, 5e-4 * 1024 / 512)
        }.items() if part in pair)
    assert cfg.train_cfg.max_epochs == epochs
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(lr)
    assert cfg.train_dataloader.batch_size == int(
        pair.split('xb')[1].split('_')[0].split('-')[0])
    assert cfg.auto_scale_lr.base_batch_size == images
    assert cfg.model.distill_loss == dict(
        type='mmdist.DISTLoss', beta=2, gamma=2, tau=1)


@pytest.mark.parametrize('pair', PAIRS)
def test_kd_differs_in_the_losses_only(pair):
    dist, kd = load(f'dist_{pair}'), load(f'kd_{pair}')
    assert kd.model.distill_loss.type == 'mmdist.KDLoss'
    assert kd.model.distill_loss.tau == 4
    for cfg in (dist, kd):
        del cfg.model['distill_loss'], cfg.model['alpha']
    assert dist.to_dict() == kd.to_dict()


def path_of(url):
    """The fork of MMPretrain has the same files on a host of its own."""
    return urlparse(url).path


@pytest.mark.parametrize('pair', PAIRS)
def test_builds_and_pairs(pair, tmp_path):
    """With weights of its own teacher's config, which the zoo also has."""
    cfg = load(f'dist_{pair}')
    path = cfg.model.teacher.config
    teacher = Config.fromfile(path if '::' not in path else osp.join(
        osp.dirname(__import__('mmpretrain').__file__), '.mim', 'configs',
        path.partition('::')[2]))
    if '::' in path:
        metafile = osp.join(osp.dirname(teacher.filename), 'metafile.yml')
        with open(metafile) as file:
            weights = [
                path_of(m['Weights']) for m in yaml.safe_load(file)['Models']
                if m.get('Weights')
            ]
        assert path_of(cfg.model.teacher.checkpoint) in weights
    else:
        last = f'epoch_{teacher.train_cfg.max_epochs}.pth'
        assert osp.basename(cfg.model.teacher.checkpoint) == last
    model = teacher.model.to_dict()
    model['data_preprocessor'] = teacher.data_preprocessor.to_dict()
    checkpoint = str(tmp_path / 'teacher.pth')
    torch.save(build(model).state_dict(), checkpoint)
    cfg.model.teacher.update(
        config=path if '::' in path else osp.join(ROOT, path),
        checkpoint=checkpoint)
    cfg.model.data_preprocessor = cfg.data_preprocessor
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        wrapper = MODELS.build(cfg.model)
    # Swin has windows of 7x7 in a map of a 32nd.
    size = 224 if 'swin' in pair else 32
    pair, = wrapper.kd_pairs(*batch(wrapper, num=2, size=size))
    assert pair.student_activation == pair.teacher_activation == 'softmax'
    number = cfg.data_preprocessor.num_classes
    assert f'images x {number} (softmax)' in wrapper.distillation.tap.describe(
        wrapper, wrapper.distillation.teacher.model)
