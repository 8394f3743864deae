"""What tests of tools that look at two models share."""
import json
from pathlib import Path

import pytest
from mmengine.config import Config

from tests import helpers, segmentors

TASKS = dict(
    retina=(helpers, lambda: helpers.detector('retina'), helpers.write_coco),
    faster=(helpers, lambda: helpers.detector('faster'), helpers.write_coco),
    pspnet=(segmentors, lambda: segmentors.segmentor('pspnet'),
            segmentors.write_masks))


def without_annotations(config):
    """Take the annotations of a config's test data away."""
    cfg = Config.fromfile(str(config))
    dataset = cfg.test_dataloader.dataset
    if cfg.default_scope == 'mmseg':
        dataset.data_prefix.pop('seg_map_path')
    else:
        path = Path(dataset.data_root) / 'bare.json'
        coco = json.loads((path.parent / dataset.ann_file).read_text())
        coco.pop('annotations')
        path.write_text(json.dumps(coco))
        dataset.ann_file = path.name
    cfg.dump(str(config))


def teacher_of_more_classes(folder):
    """A RetinaNet that knows the classes of the toy data set, and others.

    Returns:
        tuple[str, str]: Its config and weights.
    """
    model = helpers.detector('retina', bbox_head=dict(num_classes=5))
    names = ['other', *helpers.CLASSES[::-1], 'more']
    saved = helpers.save_teacher(
        model, folder, seed=7, meta=dict(dataset_meta=dict(classes=names)))
    config = folder / 'more.py'
    Config(dict(model=model, default_scope='mmdet')).dump(str(config))
    return config, saved['checkpoint']


@pytest.fixture
def prepared(tmp_path):
    """A config, and weights of two models of it."""

    def prepare(name):
        task, model, write = TASKS[name]
        cfg = task.run_cfg(model(), write(tmp_path / 'data'), tmp_path, 1)
        cfg.val_dataloader = cfg.test_dataloader
        config = tmp_path / f'{name}.py'
        cfg.dump(str(config))
        return config, *(
            task.save_teacher(model(), tmp_path, seed=seed)['checkpoint']
            for seed in (1, 2))

    return prepare
