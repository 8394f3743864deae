"""The data of the CamVid configs."""
import os
import os.path as osp

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from tests.segmentors import register_all_modules  # noqa: F401

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
NAME = 'pspnet_r18-w8-d8_1xb8-1k_camvid-180x240.py'


@pytest.fixture
def load(monkeypatch):
    """A function that reads the config with a data folder."""

    def load(root=None, name=NAME):
        monkeypatch.delenv('MMDIST_CAMVID', raising=False)
        if root:
            monkeypatch.setenv('MMDIST_CAMVID', str(root))
        return Config.fromfile(osp.join(ROOT, 'configs', 'camvid', name))

    return load


def build(dataset):
    with DefaultScope.overwrite_default_scope('mmseg'):
        return DATASETS.build(dataset)


@pytest.mark.parametrize('root', ['data/camvid', '/somewhere/else'])
def test_data_root_from_environment(load, root):
    cfg = load(None if root == 'data/camvid' else root)
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == root


def test_masks_are_read_as_they_are(load, tmp_path):
    """Class 0 is a class, 255 is ignored, both at the picture's full size."""
    mask = np.zeros((360, 480), np.uint8)
    mask[:100], mask[100:200] = 10, 255
    for folder, name, content in (('images', 'a.jpg', mask), ('annotations',
                                                              'a.png', mask)):
        path = tmp_path / folder / 'val'
        path.mkdir(parents=True)
        cv2.imwrite(str(path / name), content)
    dataset = build(load(tmp_path).val_dataloader.dataset)
    item = dataset[0]
    assert item['inputs'].shape == (3, 180, 240)
    read = item['data_samples'].gt_sem_seg.data[0].numpy()
    assert (read == mask).all()
    assert dataset.metainfo['classes'][10] == 'bicyclist'


def test_shared_frames(load, shared):
    """All frames are found, with labels of the 11 classes only."""
    root = osp.join(shared, 'data', 'camvid')
    if not osp.isdir(root):
        pytest.skip(f'{root} is missing')
    cfg = load(root)
    datasets = [
        build(cfg[f'{s}_dataloader'].dataset) for s in ('train', 'val')
    ]
    assert [len(dataset) for dataset in datasets] == [367, 101]
    labels = set()
    for index in range(0, 101, 20):
        sample = datasets[1][index]['data_samples']
        labels |= set(sample.gt_sem_seg.data.unique().tolist())
    assert labels <= {*range(11), 255} and len(labels) > 8


def test_validation_is_the_end_of_each_training_video(load, shared):
    """Neighbouring frames look alike, and no split shares a test frame."""
    root = osp.join(shared, 'data', 'camvid')
    if not osp.isdir(root):
        pytest.skip(f'{root} is missing')
    cfg = load(root, 'fpn_lite0_20e_camvid-180x240.py')
    names = {}
    for split, size in dict(train=294, val=73, test=101).items():
        dataset = build(cfg[f'{split}_dataloader'].dataset)
        paths = [
            dataset.get_data_info(i)['img_path'] for i in range(len(dataset))
        ]
        names[split] = {osp.basename(path) for path in paths}
        assert len(names[split]) == size
    videos = {name.partition('_')[0] for name in names['train']}
    assert len(videos) == 3
    for video in videos:
        train, val = ({n
                       for n in names[split] if n.startswith(video)}
                      for split in ('train', 'val'))
        assert max(train) < min(val) and len(val) > 0.18 * len(train)
    assert names['train'] | names['val'] == set(
        os.listdir(osp.join(root, 'images', 'train')))
    assert names['test'] == set(os.listdir(osp.join(root, 'images', 'val')))
