"""The data of the blood cell configs."""
import json
import os.path as osp

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
CONFIGS = osp.join(ROOT, 'configs', 'bccd')


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
