"""Decode heads: the pixels of the logits at the head's own size."""
import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import point_sample

from mmdist.models.taps import PixelTap, build_tap, pair_logits, watch_heads
from mmdist.models.teacher import TeacherBatch
from tests.refusals import refused
from tests.segmentors import (IGNORED, NUM_CLASSES, SEGMENTORS, batch, binary,
                              build, one_column, prepared, segmentor)


def models(student, teacher=None, **changes):
    """A student in train mode and a teacher in eval mode."""
    student = build(segmentor(student)) if isinstance(
        student, str) else (build(student))
    teacher = segmentor(teacher) if isinstance(teacher, str) else teacher
    return student.train(), build(teacher, seed=1).eval()


def watched_pairs(student, teacher, data=None, **options):
    """Pairs as mmdist makes them, and what they are made of."""
    tap = build_tap(student, **options)
    tap.connect(student, teacher)
    inputs, samples = prepared(student, data or batch())
    torch.manual_seed(5)  # dropout
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    return pair_logits(tap, calls, TeacherBatch(teacher, inputs,
                                                samples)), inputs, samples


@torch.no_grad()
def head_logits(model, inputs, path='decode_head', *previous):
    """Logits of a head of the plain model, before they are resized."""
    head = model.get_submodule(path)
    return head.forward(model.extract_feat(inputs), *previous)


@pytest.mark.parametrize('name', SEGMENTORS)
def test_pairs_of_every_kind_of_head(name):
    """Number, weights and classes; STDC's boundary head is none of them."""
    student, teacher = models(name, name)
    pairs, inputs, _ = watched_pairs(student, teacher)
    assert tuple(pair.weight for pair in pairs) == SEGMENTORS[name][2]
    for pair in pairs:
        assert pair.student.shape == pair.teacher.shape
        assert pair.student.shape[:2] == (2, NUM_CLASSES)
        # pixels of a smaller grid, or PointRend's points
        assert pair.student[0, 0].numel() < inputs[0, 0].numel()
        assert pair.student.requires_grad and not pair.teacher.requires_grad
        assert pair.student_activation == pair.teacher_activation == 'softmax'


@pytest.mark.parametrize('name', ['pspnet', 'deeplabv3'])
def test_logits_are_those_of_the_plain_heads(name):
    """Decode head with decode head, auxiliary head with auxiliary head."""
    student, teacher = models(name, name)
    plain = copy.deepcopy(student)
    pairs, inputs, _ = watched_pairs(student, teacher)
    for pair, path in zip(pairs, ('decode_head', 'auxiliary_head')):
        assert torch.equal(pair.teacher, head_logits(teacher, inputs, path))
    torch.manual_seed(5)
    assert torch.equal(pairs[0].student, head_logits(plain, inputs))


def test_stages_of_a_cascade_are_paired():
    """OCRNet's second head gets the first one's logits."""
    student, teacher = models('ocrnet', 'ocrnet')
    pairs, inputs, _ = watched_pairs(student, teacher)
    first = head_logits(teacher, inputs, 'decode_head.0')
    assert torch.equal(pairs[0].teacher, first)
    assert torch.equal(pairs[1].teacher,
                       head_logits(teacher, inputs, 'decode_head.1', first))
    assert not torch.equal(pairs[0].teacher, pairs[1].teacher)


def test_a_plain_student_learns_from_the_last_stage():
    """A cascade's last head decides."""
    student, teacher = models('segformer', 'ocrnet')
    (pair, ), inputs, _ = watched_pairs(student, teacher)
    first = head_logits(teacher, inputs, 'decode_head.0')
    last = head_logits(teacher, inputs, 'decode_head.1', first)
    assert torch.equal(
        pair.teacher,
        F.interpolate(last, (16, 16), mode='bilinear', align_corners=False))


def test_every_stage_learns_from_the_only_one():
    """A missing stage is replaced by the nearest."""
    student, teacher = models('ocrnet', 'pspnet')
    pairs, inputs, _ = watched_pairs(student, teacher)
    assert [pair.weight for pair in pairs] == [0.4, 1.0]
    for pair in pairs:
        assert torch.equal(pair.teacher, head_logits(teacher, inputs))


@pytest.mark.parametrize('align_corners', [True, False])
def test_a_teacher_of_another_size_is_resized(align_corners):
    """Bilinearly to the student's grid, with the student's align_corners."""
    model = segmentor('pspnet')
    for head in ('decode_head', 'auxiliary_head'):
        model[head]['align_corners'] = align_corners
    student, teacher = models(model, 'segformer')
    (pair, ), inputs, _ = watched_pairs(student, teacher)
    logits = head_logits(teacher, inputs)
    assert logits.shape[2:] == (16, 16) and pair.student.shape[2:] == (8, 8)
    expected = F.interpolate(
        logits, (8, 8), mode='bilinear', align_corners=align_corners)
    assert torch.equal(pair.teacher, expected)


def test_an_auxiliary_head_without_counterpart_is_left_out():
    """Only the main pair; the description says so."""
    student, teacher = models('pspnet', 'segformer')
    tap = build_tap(student)
    tap.connect(student, teacher)
    assert tap.describe(student, teacher) == (
        'pixels x 4 (softmax), decode_head <- decode_head, auxiliary_head has '
        'no counterpart')
    pairs = watched_pairs(student, teacher)[0]
    assert [pair.weight for pair in pairs] == [1.0]


def test_more_auxiliary_heads_than_the_teacher_has():
    """They are paired in their order, and the last are left out."""
    student, teacher = models('bisenetv2', 'pspnet')
    tap = build_tap(student)
    tap.connect(student, teacher)
    assert len(tap.heads) == 5
    assert 'auxiliary_head.0 <- auxiliary_head' in tap.describe(
        student, teacher)
    assert 'auxiliary_head.3 has no counterpart' in tap.describe(
        student, teacher)
    assert len(watched_pairs(student, teacher)[0]) == 2


def test_several_outputs_learn_from_a_single_one():
    """In eval mode DDRNet's head gives its prediction only."""
    student, teacher = models('ddrnet', 'ddrnet')
    pairs, inputs, _ = watched_pairs(student, teacher)
    for pair in pairs:
        assert torch.equal(pair.teacher, head_logits(teacher, inputs))
    assert not torch.equal(pairs[0].student, pairs[1].student)


def test_as_many_outputs_are_paired_one_by_one():
    """DANet's three outputs, and a plain student with the first of them."""
    student, teacher = models('danet', 'danet')
    pairs, inputs, _ = watched_pairs(student, teacher)
    outputs = head_logits(teacher, inputs)
    for pair, logits in zip(pairs, outputs):
        assert torch.equal(pair.teacher, logits)
    student, teacher = models('pspnet', 'danet')
    pairs = watched_pairs(student, teacher)[0]
    # The head predicts with the first.
    assert torch.equal(pairs[0].teacher, outputs[0])


@pytest.mark.parametrize('align_corners, under', [
    (False, [4, 12, 20, 28, 36, 44, 52, 60]),
    (True, [0, 9, 18, 27, 36, 45, 54, 63]),
])
def test_ignored_pixels_can_be_left_out(align_corners, under):
    """Rows by hand: the labels at the pixel under the logit."""
    model = segmentor('pspnet')
    for head in ('decode_head', 'auxiliary_head'):
        model[head]['align_corners'] = align_corners
    student, teacher = models(model, 'pspnet')
    data = batch()
    for sample in data['data_samples']:  # single pixels, not blocks
        labels = sample.gt_sem_seg.data
        labels[torch.rand(labels.shape) < 0.3] = IGNORED
    everything = watched_pairs(copy.deepcopy(student), teacher, data)[0]
    pairs, _, samples = watched_pairs(
        student, teacher, data, ignore_label_pixels=True)
    kept = [(n, i, j) for n in range(2) for i, y in enumerate(under)
            for j, x in enumerate(under)
            if samples[n].gt_sem_seg.data[0, y, x] != IGNORED]
    assert 40 < len(kept) < 110
    for pair, full in zip(pairs, everything):
        for side in ('student', 'teacher'):
            rows = torch.stack(
                [getattr(full, side)[n, :, y, x] for n, y, x in kept])
            assert torch.equal(getattr(pair, side), rows)


def test_a_head_that_ignores_nothing_keeps_all_pixels():
    """With ignore_index=None no label means "none"."""
    model = segmentor('segformer')
    model['decode_head'].update(ignore_index=None)
    model['decode_head']['loss_decode'].update(use_sigmoid=True)
    student, teacher = models(model, model)
    data = batch()
    for sample in data['data_samples']:
        sample.gt_sem_seg.data.clamp_(max=NUM_CLASSES - 1)
    (pair, ), _, _ = watched_pairs(
        student, teacher, data, ignore_label_pixels=True)
    assert pair.student.shape == pair.teacher.shape == (2, NUM_CLASSES, 16, 16)


CROSS_ENTROPY = dict(
    type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.7)
DICE = dict(type='DiceLoss', loss_weight=3.)


@pytest.mark.parametrize('losses',
                         [[CROSS_ENTROPY, DICE], [DICE, CROSS_ENTROPY]])
def test_the_loss_on_classes_stands_for_the_head(losses):
    """Weight and activation do not hang on the order of its losses."""
    model = segmentor('pspnet', auxiliary_head=None)
    model['decode_head']['loss_decode'] = losses
    pair, = watched_pairs(*models(model, 'pspnet'))[0]
    assert (pair.weight, pair.student_activation) == (0.7, 'softmax')


def test_all_losses_on_each_output_are_no_loss_an_output():
    """DANet's three outputs with three losses, unlike DDRNet's."""
    model = segmentor('danet', auxiliary_head=None)
    model['decode_head']['loss_decode'] = [CROSS_ENTROPY, DICE, DICE]
    pairs = watched_pairs(*models(model, 'danet'))[0]
    assert [pair.weight for pair in pairs] == [0.7] * 3


def test_boundaries_of_two_classes_are_no_classes():
    """STDC's boundary head has two channels, like a model of two classes."""
    model = segmentor('stdc', num_classes=2)
    student, teacher = models(model, model)
    tap = build_tap(student)
    tap.connect(student, teacher)
    assert tap.describe(student,
                        teacher).endswith('auxiliary_head.2 is left alone')
    assert len(tap.heads) == 3


@pytest.mark.parametrize('side', ['student', 'teacher'])
def test_a_decode_head_without_class_logits_is_refused(side):
    """The auxiliary head alone does not make a segmentor."""
    pair = dict(zip(('student', 'teacher'), models('pspnet', 'pspnet')))
    pair[side].decode_head = torch.nn.Identity()
    field = dict(student='model.student', teacher='model.teacher.config')
    with refused(field[side], 'has a Identity'):
        build_tap(pair['student']).connect(**pair)


def test_gradient_reaches_both_heads():
    """Main and auxiliary logits hang on the student's graph."""
    student, teacher = models('pspnet', 'pspnet')
    pairs = watched_pairs(student, teacher)[0]
    sum(pair.student.square().sum() for pair in pairs).backward()
    for head in (student.decode_head, student.auxiliary_head):
        assert head.conv_seg.weight.grad.abs().sum() > 0


def test_differing_class_counts_are_refused():
    """Both counts are named."""
    student = build(segmentor('pspnet'))
    teacher = build(segmentor('pspnet', num_classes=5))
    with refused('model.teacher.class_map',
                 'predicts 5 classes but .* predicts 4'):
        build_tap(student).connect(student, teacher)


def test_differing_columns_are_refused():
    """Two classes in one column (sigmoid) or in two (softmax)."""
    one = segmentor('segformer', num_classes=2)
    one['decode_head'].update(out_channels=1, threshold=0.5)
    one['decode_head']['loss_decode'].update(use_sigmoid=True)
    student = build(segmentor('segformer', num_classes=2))
    with refused('model.teacher.config', 'out_channels of the heads alike'):
        build_tap(student).connect(student, build(one))


def test_a_sigmoid_head_says_so():
    """A head of one column, or of independent classes."""
    one = segmentor('segformer', num_classes=2)
    one['decode_head'].update(out_channels=1, threshold=0.5)
    one['decode_head']['loss_decode'].update(use_sigmoid=True)
    student = build(one)
    tap = build_tap(student)
    tap.connect(student, build(one, seed=1))
    assert isinstance(tap, PixelTap)
    assert tap.describe(student, student).startswith('pixels x 1 (sigmoid)')


@torch.no_grad()
def point_logits(model, inputs, points):
    """Logits that PointRend's own prediction computes at given points."""
    fine, coarse = model.extract_feat(inputs), None
    first, head = model.decode_head
    coarse = first(fine)
    where = dict(align_corners=head.align_corners)
    return head(
        point_sample(fine[0], points, **where),
        point_sample(coarse, points, **where))


def test_points_are_the_students():
    """PointRend's teacher is asked about the points that the student drew."""
    student, teacher = models('pointrend', 'pointrend')
    pairs, inputs, _ = watched_pairs(student, teacher)
    torch.manual_seed(0)
    points = []
    draw = student.decode_head[1].get_points_train
    student.decode_head[1].get_points_train = lambda *args, **kwargs: (
        points.append(draw(*args, **kwargs)) or points[-1])
    tap = build_tap(student)
    tap.connect(student, teacher)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, prepared(student, batch())[1])
    pair = pair_logits(tap, calls, TeacherBatch(teacher, inputs, []))[1]
    assert len(pairs) == 2 and pair.student.shape == (2, NUM_CLASSES, 64)
    torch.testing.assert_close(pair.teacher,
                               point_logits(teacher, inputs, points[0]))


def test_a_teacher_without_points_is_looked_up_at_them():
    """Bilinearly, in its map of logits."""
    student, teacher = models('pointrend', 'segformer')
    tap = build_tap(student)
    tap.connect(student, teacher)
    inputs, samples = prepared(student, batch())
    with watch_heads(tap, student) as calls:
        student.loss(inputs, samples)
    pair = pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))[1]
    with torch.no_grad():
        maps = teacher.decode_head(teacher.extract_feat(inputs))
    # grid_sample's coordinates go from -1 to 1.
    grid = calls[1].arguments['points'][:, None] * 2 - 1
    expected = torch.nn.functional.grid_sample(maps, grid)[:, :, 0]
    torch.testing.assert_close(pair.teacher, expected)
    assert 'decode_head.1 <- decode_head' in tap.describe(student, teacher)


def test_a_teacher_with_points_gives_its_map_to_other_students():
    """Its point head has no map; the head before it has."""
    student, teacher = models('segformer', 'pointrend')
    tap = build_tap(student)
    tap.connect(student, teacher)
    assert 'decode_head <- decode_head.0' in tap.describe(student, teacher)


@pytest.mark.parametrize('class_map', [[3, 0], [1, 2]])
def test_classes_of_the_teacher_are_chosen_and_renormalised(class_map):
    """Two of its four classes, in the student's order."""
    student = build(segmentor('segformer', num_classes=2)).train()
    teacher = build(segmentor('segformer'), seed=1).eval()
    tap = build_tap(student)
    tap.connect(student, teacher, class_map)
    inputs, samples = prepared(student, batch())
    for sample in samples:
        sample.gt_sem_seg.data %= 2
    with watch_heads(tap, student) as calls:
        student.loss(inputs, samples)
    pair = pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))[0]
    with torch.no_grad():
        maps = teacher.decode_head(teacher.extract_feat(inputs)).softmax(1)
    chosen = torch.stack([maps[:, i] for i in class_map], dim=1)
    torch.testing.assert_close(
        pair.teacher.softmax(1), chosen / chosen.sum(1, keepdim=True))


def test_losses_of_the_tapped_heads_are_of_classification():
    """Not the boundaries of STDC, nor accuracies."""
    tap = build_tap(build(segmentor('stdc')))
    for name, expected in {
            'decode.loss_ce': True,
            'aux_0.loss_ce': True,
            'aux_1.loss_ce': True,
            'aux_2.loss_dice': False,
            'decode.acc_seg': False
    }.items():
        assert tap.is_classification_loss(name) is expected
    tap = build_tap(build(segmentor('danet')))
    assert tap.is_classification_loss('decode.pam_cam.loss_ce')
    assert tap.is_classification_loss('aux.loss_ce')
    tap = build_tap(build(segmentor('pidnet')))
    assert not tap.is_classification_loss('decode.loss_bd')
    assert tap.is_classification_loss('decode.loss_sem_p')


def test_one_column_is_told_from_the_background():
    """Its labels, and the thresholds by which both heads predict."""
    student = build(one_column()).train()
    teacher = build(one_column(0.6), seed=1).eval()
    pairs, _, samples = watched_pairs(student, teacher, binary(batch()))
    mask = torch.stack([s.gt_sem_seg.data[0] for s in samples])
    step = mask.shape[1] // pairs[0].student.shape[2]
    mask = mask[:, step // 2::step, step // 2::step]
    for pair in pairs:
        assert pair.num_classes == 1 and pair.num_answers == 2
        assert pair.thresholds == (0.3, 0.6)
        assert ((pair.labels() >= 0) == (mask == 1)).all()
        truth = pair.truth()
        assert ((truth == 0) == (mask == 1)).all()
        assert ((truth == 1) == (mask == 0)).all()
        assert ((truth == -1) == (mask == IGNORED)).all()
        assert len(truth.unique()) == 3


def test_ignored_pixels_of_one_column_may_be_left_out():
    student = build(one_column()).train()
    teacher = build(one_column(), seed=1).eval()
    pairs, *_ = watched_pairs(
        student, teacher, binary(batch()), ignore_label_pixels=True)
    for pair in pairs:
        assert set(pair.truth().tolist()) == {0, 1}
        assert len(pair.truth()) == len(pair.student)
