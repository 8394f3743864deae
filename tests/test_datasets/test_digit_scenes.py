"""Digit scenes: exact annotations, disjoint pools, the same from a seed."""
import json
import os
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmdist.datasets import digit_scenes, folder
from mmdist.datasets.digit_scenes import (SPLITS, digit_pools, draw_scene,
                                          iter_scenes, write_digit_scenes)
from mmdist.errors import ConfigError
from tests.refusals import refused

SMALL = dict(num_train=6, num_val=4, seed=3, size=160)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    """A small data set on disk."""
    out = tmp_path_factory.mktemp('data') / 'digits'
    assert write_digit_scenes(out, **SMALL)
    return out


def files(folder):
    """Bytes of every file under a folder, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob('*')) if path.is_file()
    }


def test_same_seed_same_bytes(dataset, tmp_path):
    assert write_digit_scenes(tmp_path / 'again', **SMALL)
    assert files(tmp_path / 'again') == files(dataset)


def test_other_seed_other_pictures(dataset, tmp_path):
    write_digit_scenes(tmp_path / 'other', **{**SMALL, 'seed': 4})
    old, new = files(dataset), files(tmp_path / 'other')
    assert old.keys() == new.keys()
    assert all(old[name] != new[name] for name in old)


def test_scene_does_not_depend_on_how_many_are_made():
    few = list(iter_scenes('train', 2, seed=5))
    many = list(iter_scenes('train', 4, seed=5))
    for a, b in zip(few, many):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('seed', [0, 1])
def test_pools_are_disjoint_and_complete(seed):
    pools = digit_pools(seed)
    train, val = (set(pools[split].indices.tolist()) for split in SPLITS)
    assert not train & val
    assert train | val == set(range(1797))
    assert set(pools['val'].labels) == set(range(10))


def test_scenes_draw_from_their_own_pool_only():
    pools = digit_pools(0)
    for split in SPLITS:
        allowed = set(pools[split].indices.tolist())
        drawn = np.concatenate(
            [scene.samples for scene in iter_scenes(split, 30)])
        assert set(drawn.tolist()) <= allowed


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ConfigError, match=r"install 'mmdist\[demo\]'"):
        digit_pools(0)


def test_labels_are_those_of_sklearn():
    from sklearn.datasets import load_digits
    target = load_digits().target
    for scene in iter_scenes('val', 10):
        assert np.array_equal(scene.labels, target[scene.samples])


@pytest.mark.parametrize('split', SPLITS)
def test_boxes_are_tight_around_the_mask(split):
    """Of every box, each side touches ink; outside boxes there is none."""
    for scene in iter_scenes(split, 40, seed=1):
        rest = scene.mask.copy()
        for (x, y, w, h), label in zip(scene.boxes, scene.labels):
            ink = scene.mask[y:y + h, x:x + w]
            assert ink.shape == (h, w)
            assert set(np.unique(ink)) <= {0, label + 1}
            for side in (ink[0], ink[-1], ink[:, 0], ink[:, -1]):
                assert side.any()
            rest[y:y + h, x:x + w] = 0
        assert not rest.any()


def test_mask_is_where_the_image_changes(monkeypatch):
    """Draw the same scenes with invisible ink: the rest stays as it was."""
    pool = digit_pools(0)['train']
    for index in range(10):
        scene = draw_scene(pool, np.random.default_rng(index))
        with monkeypatch.context() as patch:
            patch.setattr(digit_scenes, '_paint_ink', lambda *_: None)
            blank = draw_scene(pool, np.random.default_rng(index))
        changed = (scene.image != blank.image).any(-1)
        assert not (changed & (scene.mask == 0)).any()
        # Where ink and paper happen to be alike nothing shows.
        assert changed[scene.mask > 0].mean() > 0.95


def test_scenes_are_varied():
    scenes = list(iter_scenes('train', 60))
    boxes = np.concatenate([scene.boxes for scene in scenes])
    labels = np.concatenate([scene.labels for scene in scenes])
    assert 3 < len(boxes) / len(scenes) < 7
    assert set(labels) == set(range(10))
    assert boxes[:, 3].min() < 16 < 45 < boxes[:, 3].max()


@pytest.mark.parametrize('split', SPLITS)
def test_pycocotools_reads_the_annotations(dataset, split):
    from pycocotools.coco import COCO
    coco = COCO(str(dataset / 'annotations' / f'instances_{split}.json'))
    scenes = list(iter_scenes(split, SMALL[f'num_{split}'], SMALL['seed']))
    assert len(coco.getImgIds()) == len(scenes)
    names = [c['name'] for c in coco.loadCats(coco.getCatIds())]
    assert names == list('0123456789')
    for image, scene in zip(coco.loadImgs(coco.getImgIds()), scenes):
        path = dataset / 'images' / split / image['file_name']
        assert np.array_equal(cv2.imread(str(path)), scene.image)
        found = coco.loadAnns(coco.getAnnIds(image['id']))
        assert [a['bbox'] for a in found] == scene.boxes.tolist()
        assert [names[a['category_id'] - 1]
                for a in found] == [str(label) for label in scene.labels]


@pytest.mark.parametrize('split', SPLITS)
def test_masks_on_disk_have_eleven_classes(dataset, split):
    for path in sorted((dataset / 'masks' / split).iterdir()):
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask.dtype == np.uint8 and mask.shape == (160, 160)
        assert mask.max() <= 10
        assert (dataset / 'images' / split / path.name).is_file()


def test_mmdet_reads_the_data_set(dataset, repo):
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    register_all_modules()
    cfg = Config.fromfile(
        f'{repo}/configs/_base_/datasets/digit_scenes_detection.py')
    for split in SPLITS:
        loader = cfg[f'{split}_dataloader'].dataset
        loader.data_root = str(dataset)
        built = DATASETS.build(loader)
        assert len(built) == SMALL[f'num_{split}']
        assert built.metainfo['classes'] == tuple('0123456789')
        assert built[0]['inputs'].shape == (3, 160, 160)


def test_complete_data_set_is_kept(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob('*')}
    assert not write_digit_scenes(dataset, **SMALL)
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob('*')} == before


def test_other_parameters_are_refused(dataset):
    before = files(dataset)
    with refused('out_dir', 'other parameters'):
        write_digit_scenes(dataset, **{**SMALL, 'num_train': 7})
    assert files(dataset) == before


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / 'mine.txt').write_text('keep')
    with refused('out_dir', 'holds no digit scenes'):
        write_digit_scenes(tmp_path, **SMALL)
    assert files(tmp_path) == {'mine.txt': b'keep'}


def test_interruption_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupt(*args):
        calls.append(args)
        if len(calls) > 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(digit_scenes, 'write_png', interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_digit_scenes(tmp_path / 'digits', **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_data_set_made_meanwhile_is_kept(tmp_path, monkeypatch):
    """Two processes write the same scenes: the second finds the first's."""

    def late(root, out):
        monkeypatch.undo()
        assert write_digit_scenes(out, **SMALL)
        os.rename(root, out)

    monkeypatch.setattr(folder.os, 'rename', late)
    assert not write_digit_scenes(tmp_path / 'digits', **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['digits']


def test_manifest_says_what_was_asked(dataset):
    manifest = json.loads((dataset / 'manifest.json').read_text())
    assert {key: manifest[key] for key in SMALL} == SMALL
