"""The data of the configs of playing cards."""
import json
import os.path as osp

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
CARDS = osp.join(osp.dirname(ROOT), 'shared', 'data', 'cards')


@pytest.mark.skipif(
    not osp.isdir(CARDS), reason='the photographs of cards are not here')
def test_validation_is_a_fifth_of_the_training_photographs(monkeypatch):
    """Neither is trained on, nor of the test split; labels are by name."""
    from mmdet.registry import DATASETS
    monkeypatch.setenv('MMDIST_CARDS', CARDS)
    cfg = Config.fromfile(
        osp.join(ROOT, 'configs/cards/retinanet_lite0_fpn_20e_cards.py'))
    init_default_scope('mmdet')
    names = {}
    for split, size in dict(train=237, val=59, test=67).items():
        dataset = DATASETS.build(cfg[f'{split}_dataloader'].dataset)
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        names[split] = {osp.basename(info['img_path']) for info in infos}
        assert len(dataset) == len(names[split]) == size
    assert not names['train'] & names['val']
    with open(osp.join(CARDS, 'train.json')) as file:
        coco = json.load(file)
    all_names = {image['file_name'] for image in coco['images']}
    assert names['train'] | names['val'] == all_names
    classes = [category['name'] for category in coco['categories']]
    assert list(dataset.metainfo['classes']) == classes
