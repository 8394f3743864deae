"""Query heads: queries are matched one to one with the teacher's."""
import copy
import itertools

import pytest
import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps

from mmdist.models.taps import QueryTap, build_tap, pair_logits, watch_heads
from mmdist.models.taps.columns import Columns
from mmdist.models.taps.matching import Queries, match_queries
from mmdist.models.taps.query import student_queries
from mmdist.models.teacher import TeacherBatch
from tests.helpers import (NUM_CLASSES, QUERIES, batch, build, detector,
                           prepared)
from tests.refusals import refused

SIGMOID = Columns(NUM_CLASSES, 'sigmoid', False)
SOFTMAX = Columns(NUM_CLASSES, 'softmax', True)
NUM_QUERIES = 6


def queries(seed, num=NUM_QUERIES, columns=SIGMOID, masks=False):
    """Random predictions for two images."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, num, columns.number, generator=rng)
    boxes = torch.rand(2, num, 4, generator=rng) / 2 + 0.2
    if masks:
        masks = torch.randn(2, num, 1, 8, 8, generator=rng)
        return Queries(logits, columns, masks=masks)
    return Queries(logits, columns, boxes)


def shuffled(predictions, order):
    """The same queries in another order."""
    return Queries(*(p[:, order] if isinstance(p, torch.Tensor) else p
                     for p in predictions))


@pytest.mark.parametrize('masks', [False, True])
@pytest.mark.parametrize('columns', [SIGMOID, SOFTMAX])
def test_the_same_queries_find_each_other(columns, masks):
    """In whatever order they are."""
    teacher = queries(0, columns=columns, masks=masks)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for own, theirs in match_queries(shuffled(teacher, order), teacher):
        assert torch.equal(order[own], theirs)


def cost(student, teacher, image, i, j):
    """2 * half the absolute difference of class probabilities, 5 * L1 of
    the boxes and 2 * (1 - GIoU), written out."""
    p, q = (x.logits[image, k].sigmoid()
            for x, k in ((student, i), (teacher, j)))
    a, b = student.boxes[image, i], teacher.boxes[image, j]
    giou = bbox_overlaps(
        bbox_cxcywh_to_xyxy(a[None]), bbox_cxcywh_to_xyxy(b[None]), 'giou')
    return float((p - q).abs().sum() + 5 * (a - b).abs().sum() + 2 *
                 (1 - giou))


@pytest.mark.parametrize('num_teacher', [4, 5])
def test_the_match_is_the_cheapest(num_teacher):
    """The least cost of all matches of four queries with four or five."""
    student, teacher = queries(1, num=4), queries(2, num=num_teacher)
    matches = match_queries(student, teacher)
    for image, match in enumerate(matches):
        costs = {
            order:
            sum(
                cost(student, teacher, image, i, j)
                for i, j in enumerate(order))
            for order in itertools.permutations(range(num_teacher), 4)
        }
        assert tuple(match[1].tolist()) == min(costs, key=costs.get)
        assert match[0].tolist() == [0, 1, 2, 3]


def watched(student, teacher, name):
    """The tap, its pairs and the prepared batch."""
    tap = build_tap(student)
    tap.connect(student, teacher)
    inputs, samples = prepared(student, batch(name))
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    teacher_batch = TeacherBatch(teacher, inputs, samples)
    return tap, pair_logits(tap, calls, teacher_batch), inputs, samples


def models(student, teacher):
    """A student in train mode and a teacher in eval mode."""
    pair = [build(detector(n), i) for i, n in enumerate((student, teacher))]
    for model in pair:
        # Transformers leave some weights unset until then.
        model.init_weights()
    return pair[0].train(), pair[1].eval()


def sorted_rows(table):
    return table[torch.argsort(table[:, 0])]


@pytest.mark.parametrize('name', QUERIES)
def test_rows_are_all_queries_of_the_last_layer(name):
    """The student's without denoising queries, and the teacher's that
    plain MMDetection predicts with."""
    student, teacher = models(name, name)
    tap, (pair, ), inputs, samples = watched(student, teacher, name)
    assert type(tap) is QueryTap
    number = 2 * 8  # queries of two images
    assert pair.student.shape == pair.teacher.shape == (
        number, NUM_CLASSES + (pair.student_activation == 'softmax'))
    assert pair.student.requires_grad and not pair.teacher.requires_grad
    if name != 'sparse_rcnn':
        with torch.no_grad():
            plain = teacher(inputs, samples, mode='tensor')[0][-1]
        torch.testing.assert_close(
            sorted_rows(pair.teacher), sorted_rows(plain.flatten(0, 1)))


def test_denoising_queries_are_left_out():
    """DINO's head gets them in front of the others."""
    student, teacher = models('dino', 'dino')
    tap = build_tap(student)
    inputs, samples = prepared(student, batch())
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    arguments = calls[0].arguments
    number = arguments['dn_meta']['num_denoising_queries']
    assert number > 0
    logits = student_queries(calls[0]).logits
    assert torch.equal(logits, arguments['all_layers_cls_scores'][-1][:,
                                                                      number:])


PAIRS = [('detr', 'dino'), ('dino', 'detr'), ('detr', 'sparse_rcnn'),
         ('sparse_rcnn', 'deformable')]


@pytest.mark.parametrize('student_name,teacher_name', PAIRS)
def test_query_detectors_learn_from_others(student_name, teacher_name):
    """Softmax with a background from sigmoids, and the other way round."""
    student, teacher = models(student_name, teacher_name)
    pair = watched(student, teacher, student_name)[1][0]
    assert pair.student.shape == pair.teacher.shape
    softmax = student_name == 'detr'
    assert pair.teacher_activation == ('softmax' if softmax else 'sigmoid')
    if softmax and teacher_name == 'dino':
        with torch.no_grad():
            inputs, samples = prepared(student, batch())
            plain = teacher(inputs, samples, mode='tensor')[0][-1]
        p = plain.flatten(0, 1).sigmoid()
        table = torch.cat([p, 1 - p.amax(1, keepdim=True)], 1)
        expected = table / table.sum(1, keepdim=True)
        torch.testing.assert_close(
            sorted_rows(pair.teacher.softmax(1)),
            sorted_rows(expected),
            rtol=1e-4,
            atol=1e-5)


def test_mask_queries_of_both_kinds_learn_from_each_other():
    """Mask2Former from MaskFormer, whose masks have another size."""
    student, teacher = models('mask2former', 'maskformer')
    pair = watched(student, teacher, 'mask2former')[1][0]
    assert pair.student.shape == pair.teacher.shape == (16, NUM_CLASSES + 1)


@pytest.mark.parametrize('names', [('detr', 'mask2former'),
                                   ('maskformer', 'dino')])
def test_boxes_and_masks_are_not_matched(names):
    """Nothing says which queries of the two are one object."""
    student, teacher = (build(detector(name)) for name in names)
    with refused('model.teacher.config', 'matches its queries by'):
        build_tap(student).connect(student, teacher)


def test_masks_of_ones_match_in_half_precision():
    """65,536 pixels of 1 are more than float16 can count."""
    masks = torch.full((1, 2, 1, 256, 256), 20.)
    masks[:, 1, :, :, :128] = -20.
    same = Queries(torch.zeros(1, 2, NUM_CLASSES), SIGMOID, masks=masks)
    swapped = shuffled(same, [1, 0])
    with torch.autocast('cpu', torch.float16):
        (own, theirs), = match_queries(same, swapped)
    assert own.tolist() == [0, 1] and theirs.tolist() == [1, 0]


def test_masks_of_a_video_match_in_all_frames():
    """Two queries that differ in the last frame alone."""
    masks = torch.full((1, 2, 3, 8, 8), 20.)
    masks[:, 1, 2] = -20.
    same = Queries(torch.zeros(1, 2, NUM_CLASSES), SIGMOID, masks=masks)
    (own, theirs), = match_queries(same, shuffled(same, [1, 0]))
    assert own.tolist() == [0, 1] and theirs.tolist() == [1, 0]


def test_several_may_have_one_match_if_asked():
    """RoIs of one object, for example; each takes the cheapest."""
    student, teacher = queries(1, num=6), queries(2, num=3)
    matches = match_queries(student, teacher, one_to_one=False)
    for image, (own, theirs) in enumerate(matches):
        assert own.tolist() == list(range(6))
        for i, j in zip(own, theirs):
            costs = [cost(student, teacher, image, i, k) for k in range(3)]
            assert costs.index(min(costs)) == j


def test_a_dense_teacher_is_refused():
    """RetinaNet has no queries."""
    with refused('model.teacher.config', 'RetinaNet.*for queries.*DETR'):
        build_tap(build(detector('detr'))).connect(*models('detr', 'retina'))


def test_differing_class_counts_are_refused():
    student = build(detector('detr'))
    teacher = build(detector('detr', bbox_head=dict(num_classes=5)))
    with refused('model.teacher.class_map', 'predicts 5 classes but .* 3'):
        build_tap(student).connect(student, teacher)


def test_a_class_map_chooses_columns():
    """Two classes of the teacher's three, beside its background."""
    student = build(detector('detr', bbox_head=dict(num_classes=2)))
    teacher = build(detector('detr'), seed=1).eval()
    tap = build_tap(student)
    tap.connect(student, teacher, [2, 0])
    inputs, samples = prepared(student, batch())
    for sample in samples:
        sample.gt_instances.labels %= 2
    with watch_heads(tap, student) as calls:
        student.loss(inputs, samples)
    pair = pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))[0]
    with torch.no_grad():
        plain = teacher(inputs, samples, mode='tensor')[0][-1]
    p = plain.flatten(0, 1).softmax(1)
    # what the student does not know is background
    expected = torch.stack([p[:, 2], p[:, 0], p[:, 1] + p[:, 3]], dim=1)
    torch.testing.assert_close(
        sorted_rows(pair.teacher.softmax(1)), sorted_rows(expected))
