"""RoI heads: both models scored on the student's sampled RoIs."""
import copy
import itertools

import pytest
import torch
from mmdet.structures.bbox import bbox2roi

from mmdist.models.losses import DISTLoss
from mmdist.models.taps import build_tap, pair_logits, watch_heads
from mmdist.models.teacher import TeacherBatch
from tests.helpers import (NUM_CLASSES, TWO_STAGE, batch, build,
                           build_distiller, detector, pearson_dist, prepared,
                           save_teacher)
from tests.refusals import refused

PAIRS = list(itertools.product(TWO_STAGE, TWO_STAGE))


def models(student, teacher, **changes):
    """A student in train mode and a teacher in eval mode."""
    return (build(detector(student, **changes),
                  seed=0).train(), build(detector(teacher), seed=1).eval())


def watched_pairs(student, teacher, inputs, samples):
    """Pairs as mmdist makes them, and the student's losses."""
    tap = build_tap(student)
    tap.connect(student, teacher)
    torch.manual_seed(5)
    with watch_heads(tap, student) as calls:
        losses = student.loss(inputs, copy.deepcopy(samples))
    return pair_logits(tap, calls, TeacherBatch(teacher, inputs,
                                                samples)), losses


def as_list(modules):
    """The stages of a RoI head; one if it is no cascade."""
    return list(modules) if hasattr(modules, '__len__') else [modules]


def sampled_rois(student, inputs, samples):
    """The boxes that plain MMDetection samples, a table per stage."""
    results = []
    for stage, sampler in enumerate(as_list(student.roi_head.bbox_sampler)):

        def sample(*args, stage=stage, original=sampler.sample, **kwargs):
            results.append((stage, original(*args, **kwargs)))
            return results[-1][1]

        sampler.sample = sample
    torch.manual_seed(5)
    student.loss(inputs, copy.deepcopy(samples))
    stages = range(1 + max(stage for stage, _ in results))
    return [
        bbox2roi([result.priors for at, result in results if at == stage])
        for stage in stages
    ]


@torch.no_grad()
def scores(model, stage, inputs, rois):
    """Class logits by the plain RoI extractor and box head."""
    extractor = as_list(model.roi_head.bbox_roi_extractor)[stage]
    head = as_list(model.roi_head.bbox_head)[stage]
    features = model.extract_feat(inputs)[:extractor.num_inputs]
    return head(extractor(features, rois))[0]


@pytest.mark.parametrize('student_name,teacher_name', PAIRS)
def test_both_are_scored_on_the_sampled_rois(student_name, teacher_name):
    """Rows, background column, stages and weights of all combinations."""
    student, teacher = models(student_name, teacher_name)
    inputs, samples = prepared(student, batch(student_name))
    plain = copy.deepcopy(student)
    rois = sampled_rois(plain, inputs, samples)
    pairs, _ = watched_pairs(student, teacher, inputs, samples)
    assert len(pairs) == len(rois) == (3 if student_name == 'cascade' else 1)
    for stage, (pair, boxes) in enumerate(zip(pairs, rois)):
        twin = stage if teacher_name == 'cascade' else 0
        assert pair.student.shape == (len(boxes), NUM_CLASSES + 1)
        assert torch.equal(pair.student, scores(plain, stage, inputs, boxes))
        assert torch.equal(pair.teacher, scores(teacher, twin, inputs, boxes))
        assert pair.weight == [1, 0.5, 0.25][stage]
        assert pair.student_activation == pair.teacher_activation == 'softmax'


def test_the_nearest_stage_where_the_teacher_has_fewer():
    """Stages 1 and 2 of a student learn from stage 1 of two."""
    two = detector('cascade')
    two['roi_head'].update(num_stages=2, stage_loss_weights=[1, 0.5])
    two['roi_head']['bbox_head'] = two['roi_head']['bbox_head'][:2]
    two['train_cfg']['rcnn'] = two['train_cfg']['rcnn'][:2]
    student, teacher = build(detector('cascade')), build(two, seed=1).eval()
    inputs, samples = prepared(student, batch())
    rois = sampled_rois(copy.deepcopy(student), inputs, samples)
    pairs, _ = watched_pairs(student, teacher, inputs, samples)
    for pair, twin, boxes in zip(pairs, (0, 1, 1), rois):
        assert torch.equal(pair.teacher, scores(teacher, twin, inputs, boxes))


def test_dist_of_a_cascade_by_hand(tmp_path):
    """loss_kd_* are the stages' DIST terms times 1, 0.5 and 0.25."""
    teacher_cfg = save_teacher(detector('cascade'), tmp_path)
    wrapper = build_distiller(detector('cascade'), teacher_cfg).train()
    student, teacher = models('cascade', 'cascade')
    inputs, samples = prepared(student, batch())
    rois = sampled_rois(student, inputs, samples)
    expected = torch.zeros(2, dtype=torch.float64)
    for stage, weight in enumerate([1, 0.5, 0.25]):
        tables = [
            scores(model, stage, inputs, rois[stage]).softmax(1)
            for model in (student, teacher)
        ]
        expected += weight * torch.stack(pearson_dist(*tables))
    torch.manual_seed(5)
    losses = wrapper.loss(inputs, copy.deepcopy(samples))
    terms = torch.stack([losses['loss_kd_inter'], losses['loss_kd_intra']])
    # float32 against float64
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', TWO_STAGE)
def test_gradient_reaches_what_makes_the_class_logits(name):
    """Class layers, neck and backbone learn; box, mask and RPN layers not."""
    student, teacher = models(name, name)
    inputs, samples = prepared(student, batch(name))
    buffers = copy.deepcopy(dict(teacher.named_buffers()))
    pairs, _ = watched_pairs(student, teacher, inputs, samples)
    sum(DISTLoss()(pair.student, pair.teacher) for pair in pairs).backward()
    trained = {n for n, p in student.named_parameters() if p.grad is not None}
    for n, p in student.named_parameters():
        other = any(part in n for part in ('fc_reg', 'rpn_head', 'mask_head'))
        assert (n in trained) == (p.requires_grad and not other), n
    assert all(p.grad is None for p in teacher.parameters())
    for n, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[n])


def test_teacher_twin_needs_no_gradient():
    """The teacher's logits hold no graph, though its weights ask for one."""
    student, teacher = models('faster', 'cascade')
    inputs, samples = prepared(student, batch())
    pair = watched_pairs(student, teacher, inputs, samples)[0][0]
    assert pair.student.requires_grad and not pair.teacher.requires_grad


def with_box_head(name, **changes):
    """A detector with another box head."""
    return detector(name, roi_head=dict(bbox_head=changes))


def test_differing_class_counts_are_refused():
    """The message names model.teacher, model.student and num_classes."""
    student = build(detector('faster'))
    teacher = build(with_box_head('faster', num_classes=7))
    with refused(
            'model.teacher.class_map', 'predicts 7 classes '
            'but model.student predicts 3.*num_classes'):
        build_tap(student).connect(student, teacher)


def test_differing_class_counts_of_a_later_stage_are_refused():
    """Every stage is compared with its twin."""
    model = detector('cascade')
    model['roi_head']['bbox_head'][2]['num_classes'] = 5
    student, teacher = build(detector('cascade')), build(model)
    with refused('model.teacher.class_map', 'predicts 5 classes'):
        build_tap(student).connect(student, teacher)


def test_a_sigmoid_box_head_pairs_with_a_softmax_one():
    """A BBoxHead has a background column whatever its loss."""
    sigmoid = with_box_head(
        'faster', loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True))
    student = build(sigmoid).train()
    teacher = build(detector('faster'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    pair = watched_pairs(student, teacher, inputs, samples)[0][0]
    assert pair.student.shape == pair.teacher.shape
    assert pair.student_activation == 'sigmoid'
    assert pair.teacher_activation == 'softmax'


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_columns_that_are_no_classes_are_refused(side):
    """A head of the user's may count its columns otherwise."""
    pair = dict(zip(('student', 'teacher'), models('faster', 'faster')))
    pair[side].roi_head.bbox_head.fc_cls = torch.nn.Linear(32, NUM_CLASSES + 2)
    field = dict(student='model.student', teacher='model.teacher.config')
    with refused(field[side], 'scores a RoI with 5 numbers'):
        build_tap(pair['student']).connect(**pair)


def test_a_dense_teacher_is_refused():
    """A RetinaNet scores no RoIs."""
    student, teacher = build(detector('faster')), build(detector('retina'))
    with refused('model.teacher.config', 'is a RetinaNet.*RoIs.*FasterRCNN'):
        build_tap(student).connect(student, teacher)


def seesaw():
    """A detector whose loss splits its logits into classes and objectness."""
    return detector(
        'faster',
        roi_head=dict(
            bbox_head=dict(
                loss_cls=dict(type='SeesawLoss', num_classes=NUM_CLASSES))))


@pytest.mark.parametrize('own', [seesaw, lambda: detector('faster')])
def test_the_two_distributions_of_seesaw_become_one(own):
    """Softmax over classes times objectness, and its complement."""
    student = build(own()).train()
    teacher = build(seesaw(), seed=1).eval()
    inputs, samples = prepared(student, batch())
    rois = sampled_rois(copy.deepcopy(student), inputs, samples)
    pair = watched_pairs(student, teacher, inputs, samples)[0][0]
    raw = scores(teacher, 0, inputs, rois[0]).double()
    classes, objectness = raw.split([NUM_CLASSES, 2], dim=1)
    objectness = objectness.softmax(1)
    expected = torch.cat(
        [classes.softmax(1) * objectness[:, :1], objectness[:, 1:]], 1)
    torch.testing.assert_close(
        pair.teacher.softmax(1).double(), expected, rtol=1e-5, atol=1e-6)
    assert pair.student.shape == pair.teacher.shape


def test_what_else_a_teacher_scores_rois_with_is_computed():
    """E.g. HTC's semantic branch, which its RoI head runs to predict."""
    student, teacher = models('faster', 'faster')
    plain = copy.deepcopy(teacher)
    roi_head = teacher.roi_head

    class WithSemantics(type(roi_head)):

        def _bbox_forward(self, x, rois, semantic_feat):
            return super()._bbox_forward(
                [level + semantic_feat for level in x], rois)

        def predict_bbox(self, x, metas, proposals, *args, **kwargs):
            assert [len(p) > 0 for p in proposals] == [True, True]
            self._bbox_forward(x, bbox2roi([p.bboxes for p in proposals]), 2.)

    roi_head.__class__ = WithSemantics
    inputs, samples = prepared(student, batch())
    rois = sampled_rois(copy.deepcopy(student), inputs, samples)
    pair = watched_pairs(student, teacher, inputs, samples)[0][0]
    extract = plain.extract_feat
    plain.extract_feat = lambda images: [x + 2 for x in extract(images)]
    assert torch.equal(pair.teacher, scores(plain, 0, inputs, rois[0]))


def test_rois_of_multiplied_images_are_those_of_the_originals():
    """TridentNet puts copies of its images behind them."""
    student, teacher = models('faster', 'faster')
    inputs, samples = prepared(student, batch())
    tap = build_tap(student)
    tap.connect(student, teacher)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    rois = calls[0].arguments['rois']
    pairs = [pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))]
    calls[0].arguments['rois'] = rois + torch.tensor([4., 0, 0, 0, 0])
    pairs += [pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))]
    assert torch.equal(pairs[0][0].teacher, pairs[1][0].teacher)


def test_pisa_is_read_though_it_has_a_loss_of_its_own():
    """PISA calls the box head's loss directly."""
    student = build(detector('pisa')).train()
    teacher = build(detector('faster'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    pairs, _ = watched_pairs(student, teacher, inputs, samples)
    assert [pair.student.shape[1] for pair in pairs] == [NUM_CLASSES + 1]
