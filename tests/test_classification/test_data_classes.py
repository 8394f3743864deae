"""Class names of folders of images, in label order."""
import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmdist.utils import data_classes_of

pytest.importorskip(
    'mmpretrain',
    reason='MMPretrain is not installed: make test MMDIST_STACK=cls')


@pytest.mark.parametrize('listed, numbered', [
    (None, ('ant', 'bee', 'cat')),
    (('cat', 'bee', 'ant'), ('ant', 'bee', 'cat')),
    (('Ameise', 'Biene', 'Katze'), ('Ameise', 'Biene', 'Katze')),
])
def test_labels_of_folders(tmp_path, listed, numbered):
    """In alphabetical order, whatever the order of ``metainfo``; names that
    are none of folders are other names for them."""
    for folder in ('cat', 'ant', 'bee'):
        (tmp_path / folder).mkdir()
        cv2.imwrite(
            str(tmp_path / folder / '1.png'), np.zeros((8, 8, 3), np.uint8))
    dataset = dict(
        type='CustomDataset',
        data_prefix=str(tmp_path),
        metainfo=listed and dict(classes=listed),
        pipeline=[])
    cfg = Config(
        dict(
            default_scope='mmpretrain',
            train_dataloader=dict(dataset=dataset)))
    assert data_classes_of(cfg) == (listed, numbered)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        built = DATASETS.build(cfg.train_dataloader.dataset)
    for i in range(3):
        image = built.get_data_info(i)
        folder = image['img_path'].split('/')[-2]
        assert ('ant', 'bee', 'cat')[image['gt_label']] == folder
