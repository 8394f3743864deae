"""RoI heads: both models scored on the student's sampled RoIs."""
import copy
import itertools

import pytest
import torch
from mmdet.structures.bbox import bbox2roi

from mmdist.models.losses import DISTLoss
from mmdist.models.taps import build_tap
from tests.helpers import (NUM_CLASSES, TWO_STAGE, batch, build,
                           build_distiller, detector, pearson_dist, prepared,
                           save_teacher)

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
    with tap.watch(student) as calls:
        losses = student.loss(inputs, copy.deepcopy(samples))
    with torch.no_grad():
        features = teacher.extract_feat(inputs)
    return tap.pairs(calls, student, teacher, features), losses


def as_list(modules):
    """The stages of a RoI head; one if it is no cascade."""
    return list(modules) if hasattr(modules, '__len__') else [modules]


def sampled_rois(student, inputs, samples):
    """The boxes that plain MMDetection samples, a table a stage."""
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
    with pytest.raises(
            ValueError,
            match='model.teacher predicts 7 classes '
            'but model.student predicts 3.*num_classes'):
        build_tap(student).connect(student, teacher)


def test_differing_class_counts_of_a_later_stage_are_refused():
    """Every stage is compared with its twin."""
    model = detector('cascade')
    model['roi_head']['bbox_head'][2]['num_classes'] = 5
    student, teacher = build(detector('cascade')), build(model)
    with pytest.raises(ValueError, match='model.teacher predicts 5 classes'):
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


def test_differing_columns_are_refused():
    """A head of the user's may count its columns otherwise."""
    student, teacher = models('faster', 'faster')
    teacher.roi_head.bbox_head.fc_cls = torch.nn.Linear(32, NUM_CLASSES + 2)
    with pytest.raises(
            ValueError, match='with 5 numbers but model.student '
            'with 4'):
        build_tap(student).connect(student, teacher)


def test_a_dense_teacher_is_refused():
    """A RetinaNet scores no RoIs."""
    student, teacher = build(detector('faster')), build(detector('retina'))
    with pytest.raises(
            ValueError,
            match='model.teacher.config is a '
            'RetinaNet.*RoIs.*FasterRCNN'):
        build_tap(student).connect(student, teacher)


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_two_distributions_in_one_table_are_refused(side):
    """Seesaw's logits hold an objectness beside the classes."""
    seesaw = detector(
        'faster',
        roi_head=dict(
            bbox_head=dict(
                loss_cls=dict(type='SeesawLoss', num_classes=NUM_CLASSES))))
    sides = dict(student=detector('faster'), teacher=detector('faster'))
    sides[side] = seesaw
    student, teacher = (build(sides[s]) for s in ('student', 'teacher'))
    with pytest.raises(ValueError, match=f'model.{side} .*SeesawLoss'):
        build_tap(student).connect(student, teacher)


def test_a_teacher_with_a_semantic_branch_is_refused():
    """HTC scores RoIs with more than the neck's outputs."""
    teacher = build(detector('cascade'))
    htc = type('HTC', (type(teacher.roi_head), ), {})
    teacher.roi_head.__class__ = htc
    htc.with_semantic = True
    htc._bbox_forward = lambda self, stage, x, rois, semantic_feat=None: None
    student = build(detector('faster'))
    with pytest.raises(ValueError, match='with its semantic branch'):
        build_tap(student).connect(student, teacher)


def test_a_student_that_multiplies_its_pictures_is_refused():
    """RoIs of pictures that the teacher has no features of (TridentNet)."""
    student, teacher = models('faster', 'faster')
    inputs, samples = prepared(student, batch())
    tap = build_tap(student)
    tap.connect(student, teacher)
    with tap.watch(student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    features = teacher.extract_feat(inputs[:1])
    with pytest.raises(ValueError, match='2 pictures but .* features of 1'):
        tap.pairs(calls, student, teacher, features)
