"""Dense heads: locations of a level against its anchor-class channels."""
import copy
import os.path as osp

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from mmdist.models.losses import DISTLoss
from mmdist.models.taps import build_tap, pair_logits, watch_heads
from mmdist.models.taps.columns import LEAST_LOGIT, common_tokens
from mmdist.models.taps.watch import Call
from mmdist.models.teacher import TeacherBatch
from tests.helpers import (DENSE, NUM_CLASSES, ZOO, batch, build,
                           build_distiller, detector, pearson_dist, prepared,
                           save_teacher, ssd)
from tests.refusals import refused

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
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    return pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))


@torch.no_grad()
def class_logits(model, inputs):
    """Predictions of the plain head's forward, one per level."""
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
    """One pair per level, with A * C channels of both plain heads."""
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
    with refused('model.teacher.config', r'\[16, 32, 64\] .*'
                 r'\[8, 16, 32, 64, 128\].*\[8, 128\]'):
        connected(student, teacher)


def test_differing_class_counts_are_refused():
    """The message names both numbers and what to change."""
    teacher = detector('retina', bbox_head=dict(num_classes=5))
    with refused('model.teacher.class_map', 'predicts 5 classes'):
        connected(build(detector('retina')), build(teacher))


def best_anchor(logits, num_columns=NUM_CLASSES):
    """A location's highest logit of each class, ``(N, C, H, W)``."""
    return torch.stack(logits.split(num_columns, dim=1)).amax(0)


OTHER_ANCHORS = dict(
    fewer=dict(ratios=[1.0]),
    another_order=dict(ratios=[2.0, 1.0, 0.5]),
    other_shapes=dict(
        octave_base_scale=None,
        scales_per_octave=None,
        scales=[1.],
        ratios=[i / 4 for i in range(1, 10)]))


@pytest.mark.parametrize(
    'generator', OTHER_ANCHORS.values(), ids=OTHER_ANCHORS)
def test_the_best_anchor_speaks_where_anchors_differ(generator):
    """Another number, order or shape: a row is a location, a column a class,
    and the score that of the best anchor, on both sides."""
    student = build(detector('retina')).train()
    teacher = build(
        detector('retina', bbox_head=dict(anchor_generator=generator)),
        seed=1).eval()
    inputs, samples = prepared(student, batch())
    pairs = watched_pairs(student, teacher, inputs, samples)
    expected = zip(
        class_logits(student, inputs), class_logits(teacher, inputs))
    for pair, (own, theirs) in zip(pairs, expected):
        assert torch.equal(pair.student, best_anchor(own))
        assert torch.equal(pair.teacher, best_anchor(theirs))
    tap = connected(student, teacher)
    assert 'best anchors of locations x 3' in tap.describe(student, teacher)


def test_a_larger_scale_of_the_same_anchors_pairs_one_to_one():
    """Another octave_base_scale changes no order."""
    student = build(detector('retina'))
    teacher = build(
        detector(
            'retina',
            bbox_head=dict(anchor_generator=dict(octave_base_scale=8))))
    tap = connected(student, teacher)
    assert 'locations x 27' in tap.describe(student, teacher)


def test_retinanet_learns_from_atss_and_the_other_way_round():
    """Nine anchors a location on one side, one on the other."""
    for names in (('retina', 'atss'), ('atss', 'retina')):
        student, teacher = (build(detector(name), seed=i)
                            for i, name in enumerate(names))
        inputs, samples = prepared(student, batch())
        pairs = watched_pairs(student.train(), teacher.eval(), inputs, samples)
        for pair, theirs in zip(pairs, class_logits(teacher, inputs)):
            assert pair.student.shape == pair.teacher.shape
            assert torch.equal(pair.teacher, best_anchor(theirs))


def test_anchors_are_compared_level_by_level():
    """Levels of 4, 6, 6 anchors are no levels of 6, 6, 6."""
    ratios = ([2, 3], [2, 3], [2, 3])
    teacher = build(ssd(anchor_generator=dict(ratios=ratios)))
    student = build(ssd())
    tap = connected(student, teacher)
    assert 'best anchors' in tap.describe(student, teacher)


@pytest.mark.parametrize('teacher,kind', [('faster', 'FasterRCNN'),
                                          ('cascade', 'CascadeRCNN')])
def test_a_two_stage_teacher_is_refused(teacher, kind):
    """Its proposal network has dense logits, but no classes."""
    student = build(detector('retina'))
    with refused('model.teacher.config',
                 f'is a {kind}.*feature levels.*RetinaNet'):
        connected(student, build(detector(teacher)))


def test_differing_grids_name_the_padding():
    """Another padding of the teacher's input gives another grid."""
    student = build(detector('retina')).train()
    teacher = build(detector('retina'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    tap = connected(student, teacher)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, samples)
    batch_t = TeacherBatch(teacher, inputs, samples,
                           lambda images, _: images[..., :64, :64])
    with refused('model.student.data_preprocessor.pad_size_divisor'):
        pair_logits(tap, calls, batch_t)


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


def centernet():
    """A narrow CenterNet: one level, whose stride its head does not say."""
    model = Config.fromfile(
        osp.join(ZOO, 'centernet',
                 'centernet_r18_8xb16-crop512-140e_coco.py')).model.to_dict()
    model['backbone'] = detector('retina')['backbone']
    model['neck'].update(
        in_channels=64, num_deconv_filters=(32, 16, 16), use_dcn=False)
    model['bbox_head'].update(
        in_channels=16, feat_channels=16, num_classes=NUM_CLASSES)
    return model


@pytest.mark.parametrize(
    'sides, levels',
    [(('retina', 'centernet'), '1 levels, but model.student .* 5 levels'),
     (('centernet', 'retina'), '5 levels, but model.student .* 1 levels')])
def test_another_number_of_levels_is_refused_at_once(sides, levels):
    """Also where a head does not say its strides; nothing is changed."""
    models = [
        build(centernet() if name == 'centernet' else detector(name))
        for name in sides
    ]
    models[1].eval().requires_grad_(False)
    before = copy.deepcopy(models[0].state_dict())
    state = torch.get_rng_state()
    modes = [part.training for part in models[0].modules()]
    with refused('model.teacher.config', levels):
        connected(*models)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [part.training for part in models[0].modules()]
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, before[key])
    assert connected(
        models[0],
        build(detector('retina')).eval()
        if sides[0] == 'retina' else build(centernet()).eval())


@torch.no_grad()
def test_heads_without_strides_pair_level_by_level(monkeypatch):
    """Nothing says which levels pair, so their order does."""
    student, teacher = build(detector('fcos')), build(detector('fcos'), seed=1)
    monkeypatch.setattr('mmdist.models.taps.dense.strides_of', lambda head: [])
    tap = connected(student.eval(), teacher.eval())
    inputs, samples = prepared(student, batch())
    levels = class_logits(student, inputs)
    call = Call(student, 'bbox_head', dict(cls_scores=levels), inputs)
    ask = TeacherBatch(teacher, inputs, samples)
    pairs = pair_logits(tap, [call], ask)
    for pair, level in zip(pairs, class_logits(teacher, inputs)):
        assert torch.equal(pair.teacher, level)
    call.arguments['cls_scores'] = levels[:4]
    with refused('model.teacher.config', '5 levels, but .* 4 levels'):
        pair_logits(tap, [call], ask)


def test_tokens_that_no_caption_has_are_left_out():
    """GLIP's head scores them as (images, locations, tokens)."""
    student = build(detector('atss')).train()
    teacher = build(detector('atss'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    tap = connected(student, teacher)
    student.bbox_head.text_masks = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    student.language_model = torch.nn.Identity()
    scores_s, scores_t = torch.randn(2, 2, 6, 4)
    call = Call(student, 'bbox_head', dict(cls_scores=[scores_s] * 5), inputs)
    ask = TeacherBatch(teacher, inputs, samples)
    ask.head_outputs = lambda *_: dict(bbox_head=[[scores_t] * 5])
    pair = pair_logits(tap, [call], ask)[0]
    for logits, scores in ((pair.student, scores_s), (pair.teacher, scores_t)):
        assert logits.shape == (2, 2, 6, 1)
        assert torch.equal(logits[0, :, :, 0], scores[0, :, :2].T)
        assert torch.equal(logits[1, 0, :, 0], scores[1, :, 0])
        # The second caption has no second token.
        assert (logits[1, 1] == LEAST_LOGIT).all()
    assert pair.num_classes == 0  # no column is a class
    with refused('model.teacher.config', '3 tokens .* model.student reads 4'):
        common_tokens(scores_s.mT, scores_t[..., :3].mT)


def test_words_and_classes_do_not_pair():
    """A detector that is given a text, and one that is not."""
    student, teacher = (build(detector('atss')) for _ in range(2))
    teacher.language_model = torch.nn.Identity()
    with refused(
            'model.teacher.config',
            'scores the tokens of a text, but model.student scores classes'):
        connected(student, teacher)
    student.language_model = torch.nn.Identity()
    with refused('model.teacher.class_map', 'of no use here'):
        build_tap(student).connect(student, teacher, [0, 1, 2])
