"""Dense heads: locations of a level against its anchor-class channels."""
import copy

import pytest
import torch
from mmengine.logging import MessageHub

from mmdist.models.losses import DISTLoss
from mmdist.models.taps import build_tap
from tests.helpers import (DENSE, NUM_CLASSES, batch, build, build_distiller,
                           detector, pearson_dist, prepared, save_teacher, ssd)

STRIDES = dict(rtmdet=(8, 16, 32), yolox=(8, 16, 32))
NUM_ANCHORS = dict(retina=9)


def connected(student, teacher, **options):
    """A tap that knows both models."""
    tap = build_tap(student, **options)
    tap.connect(student, teacher)
    return tap


def watched_pairs(student, teacher, inputs, samples, **options):
    """Pairs as mmdist makes them."""
    tap = connected(student, teacher, **options)
    with tap.watch(student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    with torch.no_grad():
        features = teacher.extract_feat(inputs)
    return tap.pairs(calls, student, teacher, features)


@torch.no_grad()
def class_logits(model, inputs):
    """What the plain head's forward predicts, a level each."""
    return model.bbox_head(model.extract_feat(inputs))[0]


def locations(logits):
    """``(N, K, H, W)`` to the table ``(N * H * W, K)``, written out."""
    return torch.stack([
        logits[n, :, y, x] for n in range(logits.shape[0])
        for y in range(logits.shape[2]) for x in range(logits.shape[3])
    ])


def anchors(logits, num_columns=NUM_CLASSES):
    """``(N, A * C, H, W)`` to the table ``(N * H * W * A, C)``."""
    return torch.stack([
        anchor for row in locations(logits)
        for anchor in row.split(num_columns)
    ])


@pytest.mark.parametrize('name', DENSE)
def test_levels_are_those_of_the_plain_forward(name):
    """A pair a level, with A * C channels of both plain heads."""
    student = build(detector(name)).train()
    teacher = build(detector(name), seed=1).eval()
    inputs, samples = prepared(student, batch(name))
    plain = copy.deepcopy(student)
    pairs = watched_pairs(student, teacher, inputs, samples)
    expected = zip(class_logits(plain, inputs), class_logits(teacher, inputs))
    strides = STRIDES.get(name, (8, 16, 32, 64, 128))
    assert len(pairs) == len(strides)
    for pair, stride, (logits_s, logits_t) in zip(pairs, strides, expected):
        channels = NUM_CLASSES * NUM_ANCHORS.get(name, 1)
        assert pair.student.shape == (2, channels, 128 // stride,
                                      128 // stride)
        assert torch.equal(pair.student, logits_s)
        assert torch.equal(pair.teacher, logits_t)
        assert pair.student_activation == pair.teacher_activation == 'sigmoid'
        assert pair.weight == 1
        assert not torch.equal(logits_s, logits_t)


@pytest.mark.parametrize('table,options', [
    (locations, {}),
    (anchors, dict(anchors_as_rows=True)),
])
def test_dist_of_a_retinanet_by_hand(table, options, tmp_path):
    """Tables written out, sigmoid, Pearson, summed over the levels."""
    teacher_cfg = save_teacher(detector('retina'), tmp_path)
    wrapper = build_distiller(
        detector('retina'), teacher_cfg, tap=options).train()
    student = build(detector('retina')).train()
    teacher = build(detector('retina'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    expected = torch.zeros(2, dtype=torch.float64)
    for levels in zip(
            class_logits(student, inputs), class_logits(teacher, inputs)):
        tables = [table(level).double().sigmoid() for level in levels]
        expected += torch.stack(pearson_dist(*tables))
    losses = wrapper.loss(inputs, samples)
    terms = torch.stack([losses['loss_kd_inter'], losses['loss_kd_intra']])
    # Probabilities near 0.5 leave float32 about five digits of a distance.
    torch.testing.assert_close(terms.double(), expected, rtol=1e-4, atol=1e-5)


def test_anchors_as_rows_differs_from_locations(tmp_path):
    """The option does something: A * C columns are not C columns."""
    teacher_cfg = save_teacher(detector('retina'), tmp_path)
    values = []
    for rows in (False, True):
        wrapper = build_distiller(
            detector('retina'), teacher_cfg, tap=dict(anchors_as_rows=rows))
        inputs, samples = prepared(wrapper, batch())
        values.append(wrapper.loss(inputs, samples)['loss_kd_inter'])
    assert abs(values[0] - values[1]) > 1e-2


def test_softmax_head_reads_anchors_as_rows():
    """SSD's head: 4 or 6 anchors a level, classes and background."""
    student, teacher = build(ssd()).train(), build(ssd(), seed=1).eval()
    inputs, samples = prepared(student, batch())
    pairs = watched_pairs(student, teacher, inputs, samples)
    levels = class_logits(teacher, inputs)
    assert [pair.teacher.shape[0] for pair in pairs] == [2 * 4, 2 * 6, 2 * 6]
    for pair, level in zip(pairs, levels):
        assert pair.student_activation == 'softmax'
        rows = pair.teacher.movedim(1, -1).reshape(-1, NUM_CLASSES + 1)
        table = anchors(level, NUM_CLASSES + 1)
        # The order of the rows is free: DIST does not depend on it.
        assert torch.equal(rows.unique(dim=0), table.unique(dim=0))


def test_levels_are_paired_by_stride_when_the_teacher_has_more():
    """A student of strides 16 to 64 learns from levels 1 to 3 of five."""
    student = build(_with_strides([16, 32, 64], start_level=2)).train()
    teacher = build(detector('retina'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    pairs = watched_pairs(student, teacher, inputs, samples)
    levels = class_logits(teacher, inputs)
    assert len(pairs) == 3
    for pair, level in zip(pairs, levels[1:4]):
        assert torch.equal(pair.teacher, level)
        assert pair.student.shape == level.shape


def test_levels_are_paired_by_stride_in_another_order():
    """A teacher that predicts coarse levels first is read by its strides."""
    student = build(detector('retina')).train()
    teacher = build(detector('retina'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    levels = class_logits(teacher, inputs)
    _reverse_levels(teacher)
    assert class_logits(teacher, inputs)[0].shape == levels[-1].shape
    pairs = watched_pairs(student, teacher, inputs, samples)
    for pair, level in zip(pairs, levels):
        assert torch.equal(pair.teacher, level)


def _reverse_levels(model):
    generator = model.bbox_head.prior_generator
    generator.strides = generator.strides[::-1]
    extract = model.extract_feat
    model.extract_feat = lambda inputs: extract(inputs)[::-1]


def _with_strides(strides, start_level=1):
    model = detector('retina')
    model['neck'].update(start_level=start_level, num_outs=len(strides))
    model['bbox_head']['anchor_generator']['strides'] = strides
    return model


def test_missing_strides_are_refused():
    """The message names the strides of both."""
    student = build(detector('retina'))
    teacher = build(_with_strides([16, 32, 64], start_level=2))
    with pytest.raises(
            ValueError,
            match=r'model.student has .*\[8, 16, 32, 64, 128\].*'
            r'model.teacher of \[16, 32, 64\].*\[8, 128\]'):
        connected(student, teacher)


@pytest.mark.parametrize('changes,message', [
    (dict(num_classes=5), 'model.teacher predicts 5 classes'),
    (dict(anchor_generator=dict(ratios=[1.0])),
     'model.teacher has 3 anchors a location but model.student has 9'),
    (dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False)),
     'with 4 numbers but model.student with 3'),
])
def test_differing_heads_are_refused(changes, message):
    """Classes, anchors and activation's width are compared."""
    teacher = detector('retina', bbox_head=changes)
    if 'loss_cls' in changes:
        teacher['bbox_head']['loss_cls'] = changes['loss_cls']
    with pytest.raises(ValueError, match=message):
        connected(build(detector('retina')), build(teacher))


def test_anchors_are_compared_level_by_level():
    """Levels of 4, 6, 6 anchors do not pair with levels of 6, 6, 6."""
    ratios = ([2, 3], [2, 3], [2, 3])
    teacher = build(ssd(anchor_generator=dict(ratios=ratios)))
    with pytest.raises(
            ValueError,
            match='model.teacher has 6 anchors a '
            'location but model.student has 4, 6, 6'):
        connected(build(ssd()), teacher)


@pytest.mark.parametrize('teacher,kind', [('faster', 'FasterRCNN'),
                                          ('cascade', 'CascadeRCNN')])
def test_a_two_stage_teacher_is_refused(teacher, kind):
    """Its proposal network has dense logits, but no classes."""
    student = build(detector('retina'))
    with pytest.raises(
            ValueError,
            match=f'model.teacher.config is a {kind}'
            '.*feature levels.*RetinaNet'):
        connected(student, build(detector(teacher)))


def test_differing_grids_name_the_padding():
    """Another padding of the teacher's input gives another grid."""
    student = build(detector('retina')).train()
    teacher = build(detector('retina'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    tap = connected(student, teacher)
    with tap.watch(student) as calls:
        student.loss(inputs, samples)
    with torch.no_grad():
        features = teacher.extract_feat(inputs[..., :64, :64])
    with pytest.raises(ValueError, match='pad_size_divisor'):
        tap.pairs(calls, student, teacher, features)


def test_fcos_learns_from_atss():
    """Heads of different kinds pair when classes and strides agree."""
    student = build(detector('fcos')).train()
    teacher = build(detector('atss'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    pairs = watched_pairs(student, teacher, inputs, samples)
    for pair, level in zip(pairs, class_logits(teacher, inputs)):
        assert torch.equal(pair.teacher, level)


# Layers that make no class logits, of each detector.
OTHER = dict(
    retina=('reg_convs', 'retina_reg'),
    fcos=('reg_convs', 'conv_reg', 'conv_centerness', 'scales'),
    atss=('reg_convs', 'atss_reg', 'atss_centerness', 'scales'),
    gfl=('reg_convs', 'gfl_reg', 'scales'),
    rtmdet=('reg_convs', 'rtm_reg'),
    yolox=('reg_convs', 'conv_reg', 'conv_obj'))


@pytest.mark.parametrize('name', DENSE)
def test_gradient_reaches_what_makes_the_class_logits(name):
    """The class branch, neck and backbone learn; other branches do not."""
    student = build(detector(name)).train()
    teacher = build(detector(name), seed=1).eval()
    buffers = copy.deepcopy(dict(teacher.named_buffers()))
    inputs, samples = prepared(student, batch(name))
    pairs = watched_pairs(student, teacher, inputs, samples)
    sum(DISTLoss()(pair.student, pair.teacher, 'sigmoid')
        for pair in pairs).backward()
    for n, p in student.named_parameters():
        other = any(part in n for part in OTHER[name])
        assert (p.grad is not None) == (p.requires_grad and not other), n
    assert all(p.grad is None for p in teacher.parameters())
    for n, buffer in teacher.named_buffers():
        assert torch.equal(buffer, buffers[n]), n


def test_probabilities_of_a_head_become_logits():
    """TOOD's head hands probabilities to its loss."""
    student = build(detector('tood')).train()
    teacher = build(detector('tood'), seed=1).eval()
    # The head asks the runner's hub how far the training is.
    MessageHub.get_instance('tood').update_info('epoch', 0)
    inputs, samples = prepared(student, batch())
    pairs = watched_pairs(student, teacher, inputs, samples)
    for pair, probabilities in zip(pairs, class_logits(teacher, inputs)):
        assert pair.teacher_activation == 'sigmoid'
        torch.testing.assert_close(pair.teacher.sigmoid(), probabilities)
    for pair, probabilities in zip(pairs, class_logits(student, inputs)):
        torch.testing.assert_close(pair.student.sigmoid(), probabilities)


@pytest.mark.parametrize('generator,fits', [
    (dict(octave_base_scale=8), True),
    (dict(ratios=[2.0, 1.0, 0.5]), False),
    (dict(
        octave_base_scale=None,
        scales_per_octave=None,
        scales=[1.],
        ratios=[i / 4 for i in range(1, 10)]), False),
])
def test_anchors_must_be_of_like_shapes_in_one_order(generator, fits):
    """As many anchors are not enough; all may be larger by one factor."""
    student = build(detector('retina'))
    teacher = build(
        detector('retina', bbox_head=dict(anchor_generator=generator)))
    if fits:
        connected(student, teacher)
    else:
        with pytest.raises(ValueError, match="student's ratios and scales"):
            connected(student, teacher)


def test_a_head_without_strides_is_refused():
    """Nothing says which levels pair."""
    student, teacher = build(detector('fcos')), build(detector('fcos'))
    del teacher.bbox_head.prior_generator, teacher.bbox_head.strides
    with pytest.raises(ValueError, match='model.teacher has a FCOSHead'):
        connected(student, teacher)
