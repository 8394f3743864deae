"""The labels of rows, against the ground truth of the images."""
import pytest
import torch
from mmdet.models import BBoxHead
from mmengine.structures import InstanceData

from mmdist.models.taps.labels import (Objects, labels_at, labels_of_boxes,
                                       objects_of)
from tests.helpers import (NUM_CLASSES, batch, build_distiller, detector,
                           prepared, save_teacher)


def pairs_of(name, tmp_path, **options):
    """The pairs of a step, and the ground truth."""
    model = detector(name)
    wrapper = build_distiller(model, save_teacher(model, tmp_path), **options)
    wrapper.train()
    seen = []
    wrapper.distillation.monitor.watch = lambda pairs, *_: seen.extend(pairs)
    inputs, samples = prepared(wrapper, batch(name))
    wrapper.loss(inputs, samples)
    return seen, objects_of(samples)


@pytest.mark.parametrize('name', ['faster', 'cascade', 'retina', 'fcos'])
def test_labels_are_those_of_the_rows(name, tmp_path):
    """One label per row, of classes that the images have."""
    pairs, objects = pairs_of(name, tmp_path)
    present = set(torch.cat([o.labels for o in objects]).tolist())
    found = set()
    for pair in pairs:
        labels = pair.labels()
        shape = pair.student.shape
        assert labels.shape == (shape[0], *shape[2:])
        assert pair.num_classes == NUM_CLASSES
        found |= set(labels.unique().tolist())
    assert found == present | {-1}


@pytest.mark.parametrize('name', ['retina', 'fcos', 'detr', 'deformable'])
def test_areas_are_those_of_the_objects(name, tmp_path):
    """Every labelled row has the area of an object of its class."""
    pairs, objects = pairs_of(name, tmp_path)
    truth = {(int(label), int((x2 - x1) * (y2 - y1)))
             for o in objects
             for label, (x1, y1, x2, y2) in zip(o.labels, o.boxes)}
    found = set()
    for pair in pairs:
        labels, areas = pair.labels(), pair.areas()
        assert labels.shape == areas.shape
        known = labels >= 0
        found |= set(zip(labels[known].tolist(), areas[known].tolist()))
    assert found and found <= truth


def test_rois_have_their_own_areas(tmp_path, monkeypatch):
    """The areas that NumPy computes from the head's boxes."""
    seen = []
    head = 'mmdet.models.BBoxHead.loss_and_target'
    original = BBoxHead.loss_and_target

    def remember(self, cls_score, bbox_pred, rois, *args, **kwargs):
        seen.append(rois.detach().double().numpy())
        return original(self, cls_score, bbox_pred, rois, *args, **kwargs)

    monkeypatch.setattr(head, remember)
    pair, = pairs_of('faster', tmp_path)[0]
    _, left, top, right, bottom = seen[0].T
    expected = (right - left) * (bottom - top)
    assert abs(pair.areas().numpy() - expected).max() <= 1


def test_boxes_that_answer_have_the_area_of_their_object(tmp_path):
    pairs, objects = pairs_of('fcos', tmp_path, tap=dict(align='boxes'))
    truth = {(int(label), int((x2 - x1) * (y2 - y1)))
             for o in objects
             for label, (x1, y1, x2, y2) in zip(o.labels, o.boxes)}
    labels, areas = pairs[0].labels(), pairs[0].areas()
    known = labels >= 0
    assert labels.shape == areas.shape
    assert set(zip(labels[known].tolist(), areas[known].tolist())) <= truth


@pytest.mark.parametrize('name', ['detr', 'deformable', 'maskformer'])
def test_an_object_has_one_query(name, tmp_path):
    """The one whose teacher is nearest; two objects may share it."""
    pairs, objects = pairs_of(name, tmp_path)
    labels = pairs[0].labels()
    assert labels.shape == (len(pairs[0].student), )
    number = sum(len(o.labels) for o in objects)
    assert 0 < int((labels >= 0).sum()) <= number


def test_boxes_have_the_label_of_what_they_overlap(tmp_path):
    """Half of a box is enough, less is not."""
    truth = Objects(
        torch.tensor([[0., 0., 10., 10.], [20., 20., 40., 40.]]),
        torch.tensor([2, 1]), None, (64, 64))
    boxes = torch.tensor([[0., 0., 10., 6.], [0., 0., 10., 4.],
                          [20., 20., 40., 40.], [50., 50., 60., 60.]])
    assert labels_of_boxes([truth], [boxes]).tolist() == [2, -1, 1, -1]
    none = truth._replace(boxes=truth.boxes[:0], labels=truth.labels[:0])
    assert labels_of_boxes([none], [boxes]).tolist() == [-1] * 4


def test_objects_are_at_the_level_of_their_size():
    """45 pixels are 5.6 strides of 8; 180 of 32. The centre is the place."""
    truth = Objects(
        torch.tensor([[16., 8., 61., 53.], [64., 64., 244., 244.]]),
        torch.tensor([0, 1]), None, (256, 512))
    levels = [
        labels_at([truth], (256 // s, 512 // s), (8, 16, 32), i, 0.5)[0]
        for i, s in enumerate((8, 16, 32))
    ]
    assert (levels[0] >= 0).nonzero().tolist() == [[3, 4]]
    assert levels[0][3, 4] == 0
    assert (levels[1] == -1).all()
    assert (levels[2] >= 0).nonzero().tolist() == [[4, 4]]
    assert levels[2][4, 4] == 1


def test_corners_are_places_and_stay_within_the_level():
    """CornerNet's, whose right bottom corner may be that of the image."""
    truth = Objects(
        torch.tensor([[8., 16., 64., 32.]]), torch.tensor([3]), None, (32, 64))
    for place, spot in ((0., [4, 2]), (1., [7, 15])):
        labels = labels_at([truth], (8, 16), (), 0, place)[0]
        assert (labels >= 0).nonzero().tolist() == [spot]


def test_masks_may_be_tensors():
    """BoxInst's preprocessor leaves such, which dense heads do not need."""
    sample = batch('mask')['data_samples'][0]
    masks = torch.zeros(len(sample.gt_instances), 8, 8)
    sample.gt_instances.masks = masks
    assert objects_of([sample])[0].masks is masks


def test_images_without_boxes_say_nothing():
    """Samples of segmentors, and inputs that are no list of samples."""
    assert objects_of(dict(sup=[])) is None
    assert objects_of([InstanceData()]) is None


ONE = dict(num_classes=1)
ONE_CLASS = dict(
    retina=dict(bbox_head=ONE),
    fcos=dict(bbox_head=ONE),
    rtmdet=dict(bbox_head=ONE),
    yolox=dict(bbox_head=ONE),
    faster=dict(roi_head=dict(bbox_head=ONE)),
    cascade=dict(roi_head=dict(bbox_head=[ONE] * 3)),
    detr=dict(bbox_head=ONE),
    deformable=dict(bbox_head=ONE))


def one_class_pairs(name, folder, **options):
    """Pairs of detectors of one class, of images with objects of it."""
    model = detector(name, **ONE_CLASS[name])
    wrapper = build_distiller(model, save_teacher(model, folder), **options)
    wrapper.train()
    data = batch(name)
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
    return wrapper.kd_pairs(*prepared(wrapper, data))


@pytest.mark.parametrize(
    'name, background, thresholds',
    [
        ('retina', False, (0.05, 0.05)),
        ('fcos', False, (0.05, 0.05)),
        ('rtmdet', False, (0.05, 0.05)),  # not its 0.001
        ('faster', True, (0.05, 0.05)),
        ('cascade', True, (0.05, 0.05)),
        ('detr', True, None),
        ('deformable', False, None),
        ('yolox', False, None),
    ])
def test_one_class_is_told_from_the_background(name, background, thresholds,
                                               tmp_path):
    """A column says so, or the threshold above which the head counts a box.

    YOLOX says apart whether there is an object: its classes do not tell.
    """
    for pair in one_class_pairs(name, tmp_path):
        assert pair.num_classes == 1 and pair.background == background
        assert pair.thresholds == thresholds
        assert pair.num_answers == (2 if background or thresholds else 0)
        labels, truth = pair.labels(), pair.truth()
        if not pair.num_answers:
            assert truth is None
            continue
        assert ((labels == 0) == (truth == 0)).all()
        assert ((labels == -1) == (truth == 1)).all()
        if background:
            assert pair.student.shape[1] == 2


def test_boxes_that_answer_for_one_class(tmp_path):
    """The student's columns, and either detector's threshold."""
    student = detector('retina', **ONE_CLASS['retina'])
    model = detector('faster', **ONE_CLASS['faster'])
    model['test_cfg']['rcnn']['score_thr'] = 0.2
    wrapper = build_distiller(
        student, save_teacher(model, tmp_path), tap=dict(align='boxes'))
    data = batch()
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
    pair, = wrapper.train().pairs(*prepared(wrapper, data))
    assert not pair.background and pair.thresholds == (0.05, 0.2)
    assert pair.student.shape[1] == pair.teacher.shape[1] == 1
