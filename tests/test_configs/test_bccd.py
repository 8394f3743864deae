"""The blood cell configs: data, and what distillation changes in them."""
import json
import os.path as osp

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
CONFIGS = osp.join(ROOT, 'configs', 'bccd')
PAIRS = (('faster-rcnn', 'w8'), ('retinanet', 'w16'))


@pytest.fixture(autouse=True)
def mmdet_scope():
    init_default_scope('mmdet')


def load(name):
    return Config.fromfile(osp.join(CONFIGS, f'{name}_bccd.py'))


def test_data_root_from_environment(monkeypatch):
    monkeypatch.setenv('MMDIST_BCCD', '/somewhere/else')
    cfg = load('retinanet_r18-w16_fpn_12e')
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_root == '/somewhere/else'
        assert dataset.ann_file == f'{split}.json'
    assert cfg.val_evaluator.ann_file == '/somewhere/else/val.json'
    assert cfg.test_evaluator.ann_file == '/somewhere/else/test.json'
    monkeypatch.delenv('MMDIST_BCCD')
    cfg = load('retinanet_r18-w16_fpn_12e')
    assert cfg.train_dataloader.dataset.data_root == 'data/bccd'


def test_category_ids_begin_at_zero(tmp_path):
    """MMDetection labels the classes in the order of the file, from 0."""
    from mmdet.registry import DATASETS
    names = {0: 'RBC', 1: 'WBC', 2: 'Platelets'}
    boxes = [
        dict(
            id=i + 1,
            image_id=0,
            category_id=i,
            bbox=[10, 10, 20, 20],
            area=400,
            iscrowd=0) for i in names
    ]
    (tmp_path / 'train.json').write_text(
        json.dumps(
            dict(
                images=[dict(id=0, file_name='0.jpg', width=64, height=64)],
                annotations=boxes,
                categories=[dict(id=i, name=n) for i, n in names.items()])))
    cfg = load('retinanet_r18-w16_fpn_12e').train_dataloader.dataset
    cfg.update(data_root=str(tmp_path), pipeline=[])
    dataset = DATASETS.build(cfg)
    labels = [i['bbox_label'] for i in dataset.get_data_info(0)['instances']]
    names_of_labels = [dataset.metainfo['classes'][i] for i in labels]
    assert names_of_labels == list(names.values())


@pytest.mark.parametrize('detector, width', PAIRS)
@pytest.mark.parametrize('method', ('kd', 'dist'))
def test_distilling_changes_the_model_only(detector, width, method):
    alone = load(f'{detector}_r18-{width}_fpn_12e').to_dict()
    distilled = load(f'{method}_{detector}_r18-{width}-w32_fpn_12e').to_dict()
    assert distilled['model']['student'] == alone.pop('model')
    assert distilled.pop('model')['alpha'] == 1
    assert distilled.pop('custom_imports')['imports'] == ['mmdist']
    assert distilled == alone


@pytest.mark.parametrize('detector, width', PAIRS)
@pytest.mark.parametrize('method', ('kd', 'dist'))
def test_builds(detector, width, method, tmp_path, monkeypatch):
    from mmdet.registry import MODELS

    import mmdist  # noqa: F401
    monkeypatch.chdir(ROOT)
    cfg = load(f'{method}_{detector}_r18-{width}-w32_fpn_12e').model
    teacher = Config.fromfile(cfg.teacher.config)
    assert osp.dirname(cfg.teacher.checkpoint) == osp.join(
        'work_dirs', 'bccd',
        osp.basename(cfg.teacher.config)[:-3])
    checkpoint = str(tmp_path / 'teacher.pth')
    torch.save(
        dict(state_dict=MODELS.build(teacher.model).state_dict()), checkpoint)
    cfg.teacher.checkpoint = checkpoint
    student = MODELS.build(cfg.student)
    distiller = MODELS.build(cfg)
    assert distiller.state_dict().keys() == student.state_dict().keys()
