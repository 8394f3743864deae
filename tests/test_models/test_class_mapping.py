"""Whose class is whose."""
import pytest

from mmdist.models.class_mapping import (check_class_names, check_named_map,
                                         class_map_of)
from tests.refusals import refused

COCO = ('person', 'bicycle', 'car', 'traffic_light', 'dog')


@pytest.mark.parametrize('spec,student,expected', [
    ('names', ('dog', 'Traffic light', 'person'), [4, 3, 0]),
    (['car', 'dog'], None, [2, 4]),
    ([2, 0], None, [2, 0]),
    (('car', 1), None, [2, 1]),
])
def test_maps(spec, student, expected):
    """Names of the training set, the teacher's names, and labels."""
    assert class_map_of(spec, COCO, student) == expected


@pytest.mark.parametrize('spec,teacher,student,message', [
    ('names', COCO,
     ('dog', 'zebra', 'cow'), "no class 'zebra', 'cow', but has "
     "'person', 'bicycle'"),
    ('names', COCO, None, 'needs the classes of the training set'),
    ('names', None, ('dog', ), 'neither the checkpoint nor the config'),
    (['zebra'], COCO, None, "no class 'zebra'"),
    (['dog'], None, None, 'list labels instead'),
    ([1, 1], COCO, None, 'has the class 1 of the teacher more than once'),
    ([-1], COCO, None, 'has -1, which is neither a name nor a label'),
    ([True], COCO, None, 'has True, which is neither'),
    ([0.5], COCO, None, 'has 0.5, which is neither'),
    ('name', COCO, None, "must be 'names' or a list"),
    (3, COCO, None, 'but is 3'),
    ([], COCO, None, r'but is \[\]'),
])
def test_impossible_maps_are_refused(spec, teacher, student, message):
    """One sentence that names the field and what does not match."""
    for field in ('model.teacher.class_map', '--class-map'):
        with refused(field, message):
            class_map_of(spec, teacher, student, field)


def test_names_in_one_order_pass():
    """Case and underscores do not matter; unknown names pass."""
    check_class_names(COCO,
                      ('Person', 'bicycle', 'car', 'traffic light', 'dog'))
    check_class_names(None, COCO)
    check_class_names(COCO, None)


def test_the_first_difference_is_named():
    """And the field that maps classes."""
    with refused('model.teacher.class_map',
                 "label 1 is 'bicycle' for the teacher and 'car' in the data"):
        check_class_names(COCO, ('person', 'car'))


def test_maps_by_names_must_not_swap():
    """Labels are the user's word; names of other data sets are, too."""
    check_named_map(['car', 'person'], COCO, ('car', 'person'))
    check_named_map(['car', 'dog'], COCO, ('van', 'puppy'))
    check_named_map([2, 0], COCO, ('person', 'car'))
    with refused('model.teacher.class_map', "'person' for label 0, .*'car'"):
        check_named_map(['person', 'car'], COCO, ('car', 'person'))
