"""Class names of the data that a config trains on."""
import json

import cv2
import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS, DefaultScope

from mmdist.utils import (class_names_of, classes_in_training, data_classes_of,
                          load_config, names_in)
from tests.refusals import refused

RETINA = 'retinanet/retinanet_r50_fpn_1x_coco.py'
COCO_NAMES = 80
VOC = ('aeroplane', 'bicycle', 'bird')


def config_of(dataset, **others):
    """A config that trains on a data set."""
    return Config(
        dict(
            default_scope='mmdet',
            train_dataloader=dict(dataset=dataset),
            **others))


@pytest.mark.parametrize('name', [
    RETINA,
    'yolox/yolox_tiny_8xb8-300e_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py',
])
def test_class_names_of_the_zoos_coco_configs(name):
    """From the data set class, inside MultiImageMixDataset too."""
    names = class_names_of(load_config(f'mmdet::{name}', 'model.student'))
    assert len(names) == COCO_NAMES
    assert (names[0], names[-1]) == ('person', 'toothbrush')


def test_class_names_of_the_zoos_voc_config():
    """From the first data set of a ConcatDataset in a RepeatDataset."""
    name = 'mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py'
    names = class_names_of(load_config(name, 'model.student'))
    assert len(names) == 20 and names[:3] == VOC


def test_class_names_of_the_zoos_lvis_config():
    """From the data set that a ClassBalancedDataset resamples."""
    name = ('mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py')
    names = class_names_of(load_config(name, 'model.student'))
    assert len(names) == 1203


def test_metainfo_goes_before_the_data_sets_own_names():
    """As MMEngine's BaseDataset does."""
    dataset = dict(type='CocoDataset', metainfo=dict(classes=['a', 'b']))
    assert class_names_of(config_of(dataset)) == ('a', 'b')
    repeated = dict(type='RepeatDataset', times=3, dataset=dataset)
    assert class_names_of(config_of(repeated)) == ('a', 'b')


def test_metainfo_may_name_a_file(tmp_path):
    """With a name a line, as MMEngine reads it."""
    path = tmp_path / 'classes.txt'
    path.write_text('red cell\nwhite cell\n')
    metainfo = dict(classes=str(path))
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = DATASETS.build(
            dict(type='CocoDataset', lazy_init=True, metainfo=metainfo))
    cfg = config_of(dict(type='CocoDataset', metainfo=metainfo))
    assert class_names_of(cfg) == ('red cell', 'white cell')
    assert class_names_of(cfg) == tuple(dataset.metainfo['classes'])


def test_a_data_set_may_be_a_class():
    """As in configs that are Python modules."""
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type=CocoDataset))))
    assert len(class_names_of(cfg)) == COCO_NAMES


@pytest.mark.parametrize('cfg', [
    dict(),
    dict(train_dataloader=None),
    dict(train_dataloader=dict()),
    dict(train_dataloader=dict(dataset=dict(ann_file='a.json'))),
    dict(train_dataloader=dict(dataset=dict(type='BaseDataset'))),
    dict(train_dataloader=dict(dataset=dict(type='NoSuchDataset'))),
    dict(
        train_dataloader=dict(
            dataset=dict(
                type='CocoDataset', metainfo=dict(classes='no_such.txt')))),
])
def test_a_config_that_does_not_say_has_no_names(cfg):
    """Unknown is None, not an error."""
    assert class_names_of(Config(dict(cfg, default_scope='mmdet'))) is None


# Labels


def write_annotations(path, names, ids):
    """A COCO file with one image that holds an object of each category."""
    path.write_text(
        json.dumps(
            dict(
                images=[dict(id=1, file_name='1.png', width=64, height=64)],
                annotations=[
                    dict(
                        id=k + 1,
                        image_id=1,
                        category_id=i,
                        bbox=[0, 0, 8 + k, 8],
                        area=8 * (8 + k),
                        iscrowd=0) for k, i in enumerate(ids)
                ],
                categories=[
                    dict(id=i, name=name) for i, name in zip(ids, names)
                ])))
    return path


def coco(path, names, ids, kind='CocoDataset', **metainfo):
    """A data set of such a file."""
    return dict(
        type=kind,
        ann_file=str(write_annotations(path, names, ids)),
        data_prefix=dict(img=''),
        metainfo=metainfo,
        pipeline=[])


def build_data(cfg):
    """The training data set of a config, as MMEngine's runner builds it."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return DATASETS.build(cfg.train_dataloader.dataset)


@pytest.mark.parametrize('kind, expected', [
    ('CocoDataset', ('c', 'b', 'a')),
    ('Objects365V1Dataset', ('b', 'a', 'c')),
    ('Objects365V2Dataset', ('c', 'b', 'a')),
])
@pytest.mark.parametrize('wrapped', [False, True])
def test_labels_of_a_coco_file(tmp_path, kind, expected, wrapped):
    """The names are in the order of the labels that the data set gives."""
    dataset = coco(
        tmp_path / 'coco.json',
        'cba', (3, 1, 2),
        kind,
        classes=('a', 'b', 'c'))
    if wrapped:
        dataset = dict(
            type='RepeatDataset',
            times=2,
            dataset=dict(
                type='ConcatDataset',
                datasets=[
                    dict(
                        type='ClassBalancedDataset',
                        oversample_thr=1e-3,
                        dataset=dataset), dataset
                ]))
    cfg = config_of(dataset)
    classes = data_classes_of(cfg)
    assert classes.listed == ('a', 'b', 'c')
    assert classes.numbered == class_names_of(cfg) == expected
    objects = build_data(cfg).get_data_info(0)['instances']
    # objects stand in the file as its categories do, each a pixel wider
    for instance in objects:
        category = int(instance['bbox'][2] - instance['bbox'][0]) - 8
        assert expected[instance['bbox_label']] == 'cba'[category]


def test_labels_go_by_a_data_set_of_the_users_own(tmp_path):
    """Which numbers its categories backwards."""

    class Backwards(CocoDataset):

        def load_data_list(self):
            super().load_data_list()
            number = len(self.cat_ids)
            self.cat2label = {
                i: number - 1 - label
                for i, label in self.cat2label.items()
            }
            return []

    cfg = config_of(
        coco(
            tmp_path / 'coco.json',
            'abc', (1, 2, 3),
            Backwards,
            classes=('c', 'b', 'a')))
    assert data_classes_of(cfg).numbered == ('c', 'b', 'a')


def test_categories_that_a_file_lacks(tmp_path):
    """The last shift no label; the first shift all."""

    def numbered(*classes):
        dataset = coco(tmp_path / 'coco.json', 'ab', (1, 2), classes=classes)
        return data_classes_of(config_of(dataset)).numbered

    assert numbered('a', 'b', 'c') == ('a', 'b', 'c')
    assert numbered('x', 'a', 'b') == ('a', 'b')


def test_labels_of_voc(tmp_path):
    """By the order of ``metainfo``."""
    (tmp_path / 'Annotations').mkdir()
    (tmp_path / 'train.txt').write_text('1\n')
    boxes = ''.join(
        f'<object><name>{name}</name><difficult>0</difficult><bndbox>'
        '<xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>'
        '</object>' for name in 'ab')
    (tmp_path / 'Annotations' / '1.xml').write_text(
        f'<annotation><size><width>64</width><height>64</height></size>{boxes}'
        '</annotation>')
    cfg = config_of(
        dict(
            type='XMLDataset',
            data_root=str(tmp_path),
            data_prefix=dict(sub_data_root=''),
            ann_file='train.txt',
            img_subdir='',
            metainfo=dict(classes=('b', 'a')),
            pipeline=[]))
    assert data_classes_of(cfg).numbered == ('b', 'a')
    objects = build_data(cfg).get_data_info(0)['instances']
    assert [instance['bbox_label'] for instance in objects] == [1, 0]


@pytest.mark.parametrize('reduced', [False, True])
def test_labels_of_masks(tmp_path, reduced):
    """By the order of ``metainfo``: MMSegmentation maps the values of masks
    to it, after those of ``reduce_zero_label``."""
    from mmseg.datasets import BaseSegDataset

    class Scenes(BaseSegDataset):
        METAINFO = dict(
            classes=('a', 'b', 'c'), palette=[[i] * 3 for i in range(3)])

    for folder in ('images', 'masks'):
        (tmp_path / folder).mkdir()
    values = np.uint8([[0, 1, 2]] * 2) + reduced  # pixels of a, b and c
    cv2.imwrite(str(tmp_path / 'images' / '1.jpg'), values)
    cv2.imwrite(str(tmp_path / 'masks' / '1.png'), values)
    cfg = Config(
        dict(
            default_scope='mmseg',
            train_dataloader=dict(
                dataset=dict(
                    type=Scenes,
                    data_root=str(tmp_path),
                    data_prefix=dict(img_path='images', seg_map_path='masks'),
                    metainfo=dict(classes=('c', 'a')),
                    reduce_zero_label=reduced,
                    pipeline=[dict(type='mmseg.LoadAnnotations')]))))
    assert data_classes_of(cfg) == (('c', 'a'), ('c', 'a'))
    labels = build_data(cfg)[0]['gt_seg_map']
    assert labels.tolist() == [[1, 255, 0]] * 2


# Joined data sets and one class


def test_joined_data_sets_need_agree_on_classes_only(tmp_path):
    """Mmdet's metainfo is a list then (``ignore_keys`` was not given)."""
    parts = [
        coco(tmp_path / 'a.json', 'ab', (1, 2), classes=('a', 'b'), **more)
        for more in (dict(), dict(palette=[(0, 0, 0)] * 2))
    ]
    cfg = config_of(dict(type='ConcatDataset', datasets=parts))
    assert class_names_of(cfg) == ('a', 'b')
    metainfo = build_data(cfg).metainfo
    assert isinstance(metainfo, list) and names_in(metainfo) == ('a', 'b')


@pytest.mark.parametrize('classes, names', [(('a', 'c'), 'ab'),
                                            (('a', 'b'), 'ba')])
def test_joined_data_sets_of_different_classes_are_refused(
        tmp_path, classes, names):
    """Whether the names or the files are unlike."""
    parts = [
        coco(tmp_path / 'first.json', 'ab', (1, 2), classes=('a', 'b')),
        coco(tmp_path / 'second.json', names, (1, 2), classes=classes)
    ]
    cfg = config_of(dict(type='ConcatDataset', datasets=parts))
    with refused('train_dataloader.dataset',
                 'joins data sets of different classes: label '):
        data_classes_of(cfg)


def test_one_class_may_be_a_string(tmp_path):
    """As in MMEngine: a forgotten comma makes no letters of it."""
    cfg = config_of(
        coco(tmp_path / 'coco.json', ['disc'], (1, ), classes='disc'))
    assert data_classes_of(cfg) == (('disc', ), ('disc', ))
    assert names_in(build_data(cfg).metainfo) == ('disc', )


# While a runner trains


def test_classes_in_training(tmp_path):
    """Of what MMEngine's runner writes down, which may be incomplete."""
    dataset = coco(tmp_path / 'coco.json', 'ba', (1, 2), classes=('a', 'b'))
    cfg, metainfo = config_of(dataset), dataset['metainfo']
    assert classes_in_training() == (None, None)
    hub = MessageHub.get_current_instance()
    hub.update_info('dataset_meta', metainfo)
    assert classes_in_training() == (('a', 'b'), None)
    hub.update_info('cfg', cfg.pretty_text)
    assert classes_in_training() == (('a', 'b'), ('b', 'a'))
    hub.update_info('dataset_meta', dict(classes=('b', 'a')))
    assert classes_in_training() == (('b', 'a'), None)
    hub.update_info('cfg', 'train_dataloader = <a loader that was built>')
    assert classes_in_training() == (('b', 'a'), None)
