"""Teachers of another family: both are asked about the student's boxes."""
import copy

import pytest
import torch
from mmdet.structures.bbox import bbox2roi, bbox_overlaps
from mmengine.config import ConfigDict

from mmdist.models.taps import BoxTap, build_tap, pair_logits, watch_heads
from mmdist.models.taps.box_alignment import DenseBoxes, decoded_boxes
from mmdist.models.taps.dense import ClassMaps
from mmdist.models.teacher import TeacherBatch
from tests.helpers import (DENSE, NUM_CLASSES, batch, build, build_distiller,
                           detector, prepared, save_teacher, total)
from tests.refusals import refused


def model_of(name):
    """A narrow detector's model dict."""
    if name != 'softmax':
        return detector(name)
    # SSD itself cannot predict in MMDetection 3.3: its head has no loss_cls.
    model = detector('retina')
    model['bbox_head']['loss_cls'] = dict(
        type='CrossEntropyLoss', use_sigmoid=False)
    return model


def models(student, teacher):
    """A student in train mode and a teacher in eval mode."""
    pair = [build(model_of(n), i) for i, n in enumerate((student, teacher))]
    for model in pair:
        # Transformers leave some weights unset until then.
        model.init_weights()
    return pair[0].train(), pair[1].eval()


def paired(student, teacher, **options):
    """The pairs of a batch, the calls, the tap and the batch."""
    tap = build_tap(student, align='boxes', **options)
    tap.connect(student, teacher)
    inputs, samples = prepared(student, batch())
    torch.manual_seed(3)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    teacher_batch = TeacherBatch(teacher, inputs, samples)
    return pair_logits(tap, calls, teacher_batch), calls, tap, teacher_batch


def metas_of(samples):
    return [sample.metainfo for sample in samples]


@pytest.mark.parametrize('name', DENSE + ('softmax', ))
def test_every_location_has_its_box(name):
    """A box of the plain prediction is that of the location with its score."""
    model = build(model_of(name)).eval()
    inputs, samples = prepared(model, batch())
    head = model.bbox_head
    with torch.no_grad():
        outputs = head(model.extract_feat(inputs))
    side = ClassMaps(head, 'cls_scores')
    boxes = decoded_boxes(side, outputs, metas_of(samples))
    everything = dict(score_thr=0., min_bbox_size=-1, nms_pre=10**9)
    plain = head.predict_by_feat(
        *outputs,
        batch_img_metas=metas_of(samples),
        cfg=ConfigDict({
            **head.test_cfg,
            **everything
        }),
        with_nms=False)
    for rows, ours, theirs in zip(side.rows(outputs), boxes, plain):
        assert len(ours) == len(rows)
        p = rows.softmax(1)[:, :-1] if name == 'softmax' else rows.sigmoid()
        if name in ('fcos', 'atss', 'yolox'):  # scores have another factor
            assert torch.equal(ours.unique(dim=0), theirs.bboxes.unique(dim=0))
            continue
        for index in range(0, len(theirs), 97):
            location = p[:, theirs.labels[index]] == theirs.scores[index]
            assert theirs.bboxes[index] in ours[location]


def test_a_dense_student_asks_a_roi_head():
    """Its boxes are pooled and scored as the teacher's own proposals."""
    student, teacher = models('retina', 'cascade')
    (pair, ), calls, tap, teacher_batch = paired(
        student, teacher, num_boxes=50)
    assert isinstance(tap, BoxTap)
    own = DenseBoxes.own(calls[0], 50, teacher_batch)
    assert [len(boxes) for boxes in own.boxes] == [50, 50]
    features = teacher.extract_feat(calls[0].images)
    rois = bbox2roi(own.boxes)
    with torch.no_grad():
        plain = teacher.roi_head._bbox_forward(0, features, rois)['cls_score']
    # sigmoids beside a softmax: the teacher's probabilities of the classes
    torch.testing.assert_close(
        pair.teacher.sigmoid(),
        plain.softmax(1)[:, :NUM_CLASSES],
        rtol=1e-5,
        atol=2e-6)
    assert pair.student.shape == (100, NUM_CLASSES)


def test_a_dense_student_chooses_its_highest_scores():
    """They are chosen among all anchors of an image."""
    student, teacher = models('retina', 'faster')
    (pair, ), calls, _, _ = paired(student, teacher, num_boxes=20)
    rows = ClassMaps(student.bbox_head,
                     'cls_scores').rows(list(calls[0].arguments.values()))
    for ours, table in zip(pair.student.split(20), rows):
        highest = table.amax(1).sort(descending=True).values[:20]
        assert torch.equal(ours.amax(1), highest)


@pytest.mark.parametrize('teacher_name', ['retina', 'fcos', 'gfl'])
def test_a_two_stage_student_asks_the_best_location(teacher_name):
    """The location whose decoded box overlaps most with the RoI."""
    student, teacher = models('faster', teacher_name)
    (pair, ), calls, _, teacher_batch = paired(student, teacher)
    inputs, samples = calls[0].images, teacher_batch.samples
    rois = calls[0].arguments['rois']
    with torch.no_grad():
        outputs = teacher.bbox_head(teacher.extract_feat(inputs))
    side = ClassMaps(teacher.bbox_head, 'cls_scores')
    boxes = decoded_boxes(side, outputs, metas_of(samples))
    rows = side.rows(outputs)
    # a background of 1 - max p beside the classes, normalised
    for row, roi in zip(pair.teacher.softmax(1), rois):
        image = int(roi[0])
        overlaps = bbox_overlaps(roi[None, 1:], boxes[image])[0]
        p = rows[image][overlaps.argmax()].sigmoid()
        expected = torch.cat([p, 1 - p.max()[None]])
        torch.testing.assert_close(
            row, expected / expected.sum(), rtol=1e-4, atol=1e-5)


ANY = ('retina', 'fcos', 'faster', 'cascade', 'dino', 'sparse_rcnn', 'detr')


@pytest.mark.parametrize('teacher_name', ANY)
@pytest.mark.parametrize('student_name', ANY)
def test_any_box_family_learns_from_any_other(student_name, teacher_name):
    """Both sides have one shape, and the student's class layers learn."""
    student, teacher = models(student_name, teacher_name)
    before = copy.deepcopy(teacher.state_dict())
    pairs, _, tap, _ = paired(student, teacher)
    assert pairs
    for pair in pairs:
        assert pair.student.shape == pair.teacher.shape
        assert len(pair.student) > 0 and pair.teacher.isfinite().all()
    sum(pair.student.square().sum() for pair in pairs).backward()
    head = student.get_submodule(list(tap.heads)[-1])
    assert any(p.grad is not None and p.grad.abs().max() > 0
               for p in head.parameters())
    assert all(
        torch.equal(before[n], t) for n, t in teacher.state_dict().items())


def test_asking_changes_nothing_of_the_student(tmp_path):
    """Its running statistics are those of the plain model's loss."""
    teacher = save_teacher(detector('faster'), tmp_path)
    plain = build(detector('rtmdet')).train()
    wrapper = build_distiller(
        detector('rtmdet'), teacher, tap=dict(align='boxes')).train()
    inputs, samples = prepared(plain, batch())
    losses = []
    for model in (plain, wrapper):
        torch.manual_seed(0)
        losses.append(model.loss(inputs, copy.deepcopy(samples)))
    for name, loss in losses[0].items():
        assert torch.equal(total({name: loss}), total({name: losses[1][name]}))
    for name, value in plain.state_dict().items():
        assert torch.equal(wrapper.state_dict()[name], value), name
    assert all(module.training for module in wrapper.modules())
    assert float(losses[1]['loss_kd_inter']) > 0


@pytest.mark.parametrize('options,field,message', [
    (dict(align='box'), 'model.tap.align', "'boxes' or left out, .* 'box'"),
    (dict(align='boxes', num_boxes=0), 'model.tap.num_boxes', 'whole number'),
    (dict(align='boxes',
          anchors_as_rows=True), 'model.tap', 'anchors_as_rows'),
])
def test_wrong_options_are_refused(options, field, message):
    """One sentence that names the field."""
    with refused(field, message):
        build_tap(build(detector('retina')), **options)


def test_objects_apart_are_multiplied_in():
    """YOLOX predicts classes given an object; its boxes' scores are both."""
    student, teacher = models('faster', 'yolox')
    (pair, ), calls, _, teacher_batch = paired(student, teacher)
    with torch.no_grad():
        outputs = teacher.bbox_head(teacher.extract_feat(calls[0].images))
    boxes = decoded_boxes(
        ClassMaps(teacher.bbox_head, 'cls_scores'), outputs,
        metas_of(teacher_batch.samples))
    tables = [
        torch.cat([level.flatten(2).transpose(1, 2) for level in part], dim=1)
        for part in (outputs[0], outputs[2])
    ]
    p = tables[0].sigmoid() * tables[1].sigmoid()
    for row, roi in zip(pair.teacher.softmax(1), calls[0].arguments['rois']):
        image = int(roi[0])
        best = bbox_overlaps(roi[None, 1:], boxes[image])[0].argmax()
        score = p[image, best]
        expected = torch.cat([score, 1 - score.max()[None]])
        torch.testing.assert_close(
            row, expected / expected.sum(), rtol=1e-4, atol=1e-5)


def test_many_boxes_may_share_a_query():
    """RoIs of one object all learn from the query of that object."""
    student, teacher = models('faster', 'detr')
    (pair, ), calls, _, _ = paired(student, teacher)
    assert len(pair.student) == len(calls[0].arguments['rois'])


def test_a_head_that_decodes_in_its_own_way_is_refused():
    """PAA's prediction takes no scores of another order."""
    student, teacher = models('faster', 'retina')

    def predict(*args, **kwargs):
        raise AssertionError('not like this')

    teacher.bbox_head.predict_by_feat = predict
    with refused('model.tap.align', 'RetinaHead .*not like this'):
        paired(student, teacher)


@pytest.mark.parametrize('pair', [('maskformer', 'detr'),
                                  ('detr', 'maskformer')])
def test_models_without_boxes_are_refused(pair):
    """MaskFormer predicts masks."""
    student, teacher = models(*pair)
    tap = build_tap(student, align='boxes')
    side = 'student' if pair[0] == 'maskformer' else 'teacher.config'
    with refused(f'model.{side}', 'boxes cannot be read'):
        tap.connect(student, teacher)
