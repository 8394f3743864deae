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
    """Three on CIFAR-100, two on ImageNet, and digits."""
    assert len(CIFAR) == 3 and len(PAIRS) == 6


@pytest.mark.parametrize('pair', CIFAR)
def test_cifar_is_the_authors(pair):
    """240 epochs of 64 pictures; 0.05, a tenth at 150, 180 and 210."""
    for method in ('dist', 'kd'):
        cfg = load(f'{method}_{pair}')
        assert cfg.train_cfg.max_epochs == 240
        assert cfg.train_dataloader.batch_size == 64
        optimizer = cfg.optim_wrapper.optimizer
        assert (optimizer.lr, optimizer.momentum,
                optimizer.weight_decay) == (0.05, 0.9, 5e-4)
        assert cfg.param_scheduler.milestones == [150, 180, 210]
    model = load(f'dist_{pair}').model
    assert model.distill_loss == dict(
        type='mmdist.DISTLoss', beta=2, gamma=2, tau=4)
    assert model.alpha == 1


def test_imagenet_is_the_authors():
    """100 epochs of 256 pictures from 0.1; and 450 of 768 from 0.048."""
    cfg = load('dist_resnet18-resnet34_8xb32_in1k.py')
    assert cfg.train_cfg.max_epochs == 100
    assert cfg.optim_wrapper.optimizer.lr == 0.1
    assert 8 * cfg.train_dataloader.batch_size == 256
    strong = load('dist_resnet18-resnet50-rsb_8xb96-450e_in1k.py')
    assert strong.train_cfg.max_epochs == 450
    assert strong.optim_wrapper.optimizer.lr == 0.048
    assert 8 * strong.train_dataloader.batch_size == 768
    for each in (cfg, strong):
        assert each.model.distill_loss == dict(
            type='mmdist.DISTLoss', beta=2, gamma=2, tau=1)


def path_of(url):
    """The fork of MMPretrain has the same files on a host of its own."""
    return urlparse(url).path


@pytest.mark.parametrize('pair', PAIRS)
@pytest.mark.parametrize('method', ['dist', 'kd'])
def test_builds_and_pairs(pair, method, tmp_path):
    """With weights of its own teacher's config, which the zoo also has."""
    cfg = load(f'{method}_{pair}')
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
    pair, = wrapper.kd_pairs(*batch(wrapper, num=2))
    assert pair.student_activation == pair.teacher_activation == 'softmax'
    number = cfg.data_preprocessor.num_classes
    assert f'images x {number} (softmax)' in wrapper.distillation.tap.describe(
        wrapper, wrapper.distillation.teacher.model)
