"""The wrapper is the student, but for what distillation adds."""
import copy
import os.path as osp
import pickle
import random

import numpy as np
import pytest
import torch
from mmdet.models import RetinaNet
from mmengine.config import Config
from mmengine.optim import OptimWrapper

from mmdist.models.distillers import BaseDistiller, DistillDetector
from mmdist.models.distillers.builders import SIZES, map_shapes
from mmdist.registry import MODELS
from tests.helpers import (DENSE, NUM_CLASSES, TWO_STAGE, ZOO, assert_same,
                           batch, build, build_distiller, detector,
                           distiller_cfg, flat, gradients, prepared,
                           save_teacher, total)
from tests.refusals import refused

# What switches distillation off.
OFF = dict(
    dist=dict(type='mmdist.DISTLoss', beta=0, gamma=0),
    kd=dict(type='mmdist.KDLoss', loss_weight=0))
MIMIC = dict(type='mmdist.MimicLoss', loss_weight=1.0)
DETECTORS = ('faster', 'retina', 'yolox', 'cascade', 'mask')


@pytest.fixture
def make(tmp_path):
    """Build a distiller of two like detectors, the teacher's weights new."""

    def make(name, teacher=None, seed=0, **options):
        teacher_cfg = save_teacher(detector(teacher or name), tmp_path)
        return build_distiller(detector(name), teacher_cfg, seed, **options)

    return make


def initialised(model, seed=3):
    """The model with weights as a runner would initialise them."""
    torch.manual_seed(seed)
    model.init_weights()
    return model.train()


def losses_of(model, name, seed=4):
    """The losses of one training step, and their gradients."""
    inputs, samples = prepared(model, batch(name))
    torch.manual_seed(seed)
    losses = model(inputs, samples, mode='loss')
    total(losses).backward()
    return losses, gradients(model)


def own(losses):
    """The student's own losses, by name and level."""
    return flat({k: v for k, v in losses.items() if 'loss_kd' not in k})


# Every dense detector, and every two-stage student of every teacher.
PAIRS = [(name, name) for name in DENSE] + [(student, teacher)
                                            for student in TWO_STAGE
                                            for teacher in TWO_STAGE]


@pytest.mark.parametrize('name,teacher', PAIRS)
@pytest.mark.parametrize('off', OFF)
def test_without_weight_everything_is_plain(make, name, teacher, off):
    """Initial weights, losses and gradients equal MMDetection's bit for bit.

    Adding the product of 0 and a finite number changes no bit.
    """
    plain = initialised(build(detector(name)))
    wrapper = initialised(make(name, teacher, distill_loss=OFF[off]))
    assert_same(wrapper.state_dict(), plain.state_dict())
    losses, grads = losses_of(wrapper, name)
    expected, expected_grads = losses_of(plain, name)
    assert_same(own(losses), flat(expected))
    assert_same(grads, expected_grads)
    assert set(losses) > set(expected)
    assert_same(dict(wrapper.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize('name', DETECTORS)
def test_distillation_does_change_gradients(make, name):
    """With its weights at 1 the same comparison fails where it should."""
    plain = initialised(build(detector(name)))
    wrapper = initialised(make(name))
    losses, grads = losses_of(wrapper, name)
    expected, expected_grads = losses_of(plain, name)
    assert_same(own(losses), flat(expected))
    layer = 'neck.out_convs.0' if name == 'yolox' else 'neck.fpn_convs.0'
    assert not torch.equal(grads[f'{layer}.conv.weight'],
                           expected_grads[f'{layer}.conv.weight'])


@pytest.mark.parametrize('options', [{}, dict(mimic_loss=MIMIC)])
def test_random_states_are_those_of_the_plain_student(make, options):
    """Neither building nor a step draws more random numbers."""

    def states():
        return (torch.get_rng_state().tolist(), random.getstate(),
                np.random.get_state()[1].tolist())

    random.seed(0)
    np.random.seed(0)
    model = build(detector('faster'))
    built = states()
    losses_of(model, 'faster')
    stepped = states()
    random.seed(0)
    np.random.seed(0)
    teacher_cfg = make('faster').distillation.teacher.checkpoint
    random.seed(0)
    np.random.seed(0)
    wrapper = build_distiller(
        detector('faster'),
        dict(config=detector('faster'), checkpoint=teacher_cfg), **options)
    assert states() == built
    losses_of(wrapper, 'faster')
    assert states() == stepped


@pytest.mark.parametrize('name', DETECTORS)
def test_names_are_the_students(make, name):
    """Checkpoints and paramwise_cfg see the student's names."""
    plain, wrapper = build(detector(name)), make(name)
    for kind in ('state_dict', 'named_parameters', 'named_buffers'):
        ours, theirs = (dict(getattr(m, kind)()) for m in (wrapper, plain))
        assert list(ours) == list(theirs)
    assert modules_of(wrapper) == modules_of(plain)


def modules_of(model):
    """Modes by name."""
    return {name: module.training for name, module in model.named_modules()}


def test_weights_are_loaded_both_ways(make):
    """strict=True from the plain student and back."""
    plain, wrapper = build(detector('retina'), seed=8), make('retina')
    wrapper.load_state_dict(plain.state_dict(), strict=True)
    assert_same(wrapper.state_dict(), plain.state_dict())
    other = build(detector('retina'), seed=9)
    other.load_state_dict(wrapper.state_dict(), strict=True)
    assert_same(other.state_dict(), plain.state_dict())


def test_the_students_own_renaming_of_keys_works(make):
    """TwoStageDetector loads an RPN's bbox_head into its rpn_head."""
    weights = {
        key.replace('rpn_head', 'bbox_head'): value
        for key, value in build(detector('faster'), 8).state_dict().items()
        if 'roi_head' not in key
    }
    plain, wrapper = build(detector('faster')), make('faster')
    for model in (plain, wrapper):
        model.load_state_dict(dict(weights), strict=False)
    assert_same(wrapper.state_dict(), plain.state_dict())
    assert torch.equal(plain.rpn_head.rpn_cls.weight,
                       weights['bbox_head.rpn_cls.weight'])


def predictions(results):
    """All tensors that a detector predicts, by picture."""
    return {
        f'{i}.{field}': value
        for i, result in enumerate(results)
        for field, value in result.pred_instances.items()
    }


@pytest.mark.parametrize('name', DETECTORS)
def test_predictions_are_the_plain_students(make, name):
    """predict, val_step and test_step, bit for bit."""
    plain, wrapper = build(detector(name)).eval(), make(name).eval()
    for call in ('val_step', 'test_step'):
        results = [
            predictions(getattr(m, call)(batch(name, seed=2)))
            for m in (wrapper, plain)
        ]
        assert_same(*results)
    assert sum(map(len, results[0].values())) > 0
    inputs, samples = prepared(plain, batch(name, seed=2), training=False)
    with torch.no_grad():
        results = [
            predictions(m(inputs, copy.deepcopy(samples), mode='predict'))
            for m in (wrapper, plain)
        ]
    assert_same(*results)


def tensors_in(nest):
    """The tensors of nested tuples and lists, in order."""
    if isinstance(nest, torch.Tensor):
        return [nest]
    return [tensor for part in nest for tensor in tensors_in(part)]


@pytest.mark.parametrize('name', ['faster', 'retina', 'yolox'])
def test_tensor_mode_is_the_plain_students(make, name):
    """mode='tensor' gives the head's raw outputs; it is the default."""
    plain, wrapper = build(detector(name)).eval(), make(name).eval()
    inputs, samples = prepared(plain, batch(name), training=False)
    with torch.no_grad():
        ours = tensors_in(wrapper(inputs, samples))
        theirs = tensors_in(plain(inputs, samples, mode='tensor'))
    assert len(ours) == len(theirs) > 1
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_student_from_path_and_package(tmp_path):
    """A dict, a config path and 'mmdet::…' give the same student."""
    path = str(tmp_path / 'student.py')
    Config(dict(model=detector('retina'), default_scope='mmdet')).dump(path)
    teacher_cfg = save_teacher(detector('retina'), tmp_path)
    plain = build(detector('retina'))
    wrapper = build_distiller(path, teacher_cfg)
    assert_same(wrapper.state_dict(), plain.state_dict())


def test_student_of_a_package(tmp_path):
    """'mmdet::…' is the zoo's config of the installed package."""
    narrow = detector('retina', bbox_head=dict(num_classes=80))
    wrapper = build_distiller('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
                              save_teacher(narrow, tmp_path))
    assert wrapper.backbone.depth == 18
    assert wrapper.backbone.conv1.out_channels == 64
    assert wrapper.bbox_head.num_classes == 80


def test_a_student_teaches_another(make, tmp_path):
    """With the config and the checkpoint of its own training."""
    first = initialised(make('retina'))
    path, checkpoint = (str(tmp_path / name) for name in ('a.py', 'a.pth'))
    model = distiller_cfg(
        detector('retina'), save_teacher(detector('faster'), tmp_path))
    Config(dict(default_scope='mmdet', model=model)).dump(path)
    torch.save(dict(state_dict=first.state_dict()), checkpoint)
    wrapper = build_distiller(
        detector('retina'), dict(config=path, checkpoint=checkpoint))
    assert_same(wrapper.distillation.teacher.model.state_dict(),
                first.state_dict())


def test_teacher_is_in_no_module_tree(make):
    """Not in modules, parameters, buffers or the state dict."""
    wrapper = make('retina')
    teacher = wrapper.distillation.teacher.model
    inside = {id(m) for m in wrapper.modules()}
    assert not inside & {id(m) for m in teacher.modules()}
    tensors = {id(p) for p in (*wrapper.parameters(), *wrapper.buffers())}
    assert not tensors & {
        id(p)
        for p in (*teacher.parameters(), *teacher.buffers())
    }


def test_a_step_leaves_the_teacher_as_it_was(make):
    """No mode, gradient, weight or buffer of the teacher changes."""
    wrapper = make('yolox').train()  # batch norms everywhere
    teacher = wrapper.distillation.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    losses_of(wrapper, 'yolox')
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad
               for p in teacher.parameters())
    assert_same(teacher.state_dict(), before)


def test_a_deep_copy_is_a_model_of_its_own_with_the_same_teacher(make):
    """EMA's copy: of the same class, with other weights."""
    wrapper = make('retina', mimic_loss=MIMIC)
    twin = copy.deepcopy(wrapper)
    assert twin.distillation.teacher is wrapper.distillation.teacher
    assert type(twin) is type(wrapper)
    assert twin.distillation is not wrapper.distillation
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert all(p.abs().sum() == 0 for p in twin.parameters())
    assert wrapper.bbox_head.retina_cls.weight.abs().sum() > 0
    losses, grads = losses_of(twin, 'retina')
    assert 'loss_kd_inter' in losses
    assert all(p.grad is None for p in wrapper.parameters())


@pytest.mark.parametrize('norm_eval', [True, False])
@pytest.mark.parametrize('mode', [True, False])
def test_modes_are_the_students(make, tmp_path, mode, norm_eval):
    """train() and eval() reach what they reach in the plain student."""
    model = detector(
        'retina', backbone=dict(norm_eval=norm_eval, frozen_stages=2))
    plain = build(model).train(mode)
    teacher_cfg = save_teacher(detector('retina'), tmp_path)
    wrapper = build_distiller(model, teacher_cfg)
    wrapper = wrapper.train() if mode else wrapper.eval()
    assert modules_of(wrapper) == modules_of(plain)
    frozen = [{n
               for n, p in model.named_parameters() if not p.requires_grad}
              for model in (wrapper, plain)]
    assert frozen[0] == frozen[1] != set()


def test_to_moves_student_and_preprocessor(make):
    """The runner's ``model.to(device)`` reaches what the plain one does."""
    wrapper = make('retina', mimic_loss=MIMIC).to('meta')
    assert {p.device.type for p in wrapper.parameters()} == {'meta'}
    assert wrapper.data_preprocessor.device.type == 'meta'


def test_attributes_are_the_students(make):
    """Hooks and tools find what they know from a detector."""
    wrapper = make('faster')
    assert wrapper.with_rpn and wrapper.with_roi_head and wrapper.with_neck
    assert wrapper.test_cfg == build(detector('faster')).test_cfg
    with pytest.raises(AttributeError, match='no_such_thing'):
        wrapper.no_such_thing


@pytest.mark.parametrize('name', DETECTORS)
@pytest.mark.parametrize('alpha', [0, 0.5])
def test_alpha_scales_only_the_tapped_classification(make, name, alpha):
    """Proposal, box, mask and objectness losses keep every bit."""
    wrapper = make(name, alpha=alpha)
    expected = flat(losses_of(build(detector(name)), name)[0])
    scaled = [n for n in expected if n.rpartition('.')[0].endswith('loss_cls')]
    assert len(scaled) == dict(cascade=3, retina=5).get(name, 1)
    assert all(expected[n] > 0 for n in scaled)
    expected.update({n: alpha * expected[n] for n in scaled})
    assert_same(own(losses_of(wrapper, name)[0]), expected)


def test_alpha_needs_something_to_scale(make):
    """FreeAnchor's losses are bags, none of classification alone."""
    wrapper = make('free_anchor', alpha=0.5)
    with refused('model.alpha', '0.5 has nothing'):
        losses_of(wrapper, 'free_anchor')


def test_a_student_that_goes_round_the_watched_call_is_refused(make):
    """Training it would distil nothing."""
    wrapper = make('retina')
    head = wrapper.bbox_head
    head.loss = lambda x, samples: dict(loss_cls=head(x)[0][0].sum())
    with refused('model.student.bbox_head',
                 'loss without a call of its `loss_by_feat`'):
        losses_of(wrapper, 'retina')


def test_alpha_zero_takes_the_gradient_of_the_labels(make):
    """Without weights at all the class layer has a gradient of 0."""
    wrapper = make('faster', alpha=0, distill_loss=OFF['dist'])
    grads = losses_of(wrapper, 'faster')[1]
    assert grads['roi_head.bbox_head.fc_cls.weight'].abs().sum() == 0
    assert grads['roi_head.bbox_head.fc_reg.weight'].abs().sum() > 0
    assert grads['rpn_head.rpn_cls.weight'].abs().sum() > 0


@pytest.mark.parametrize('name', TWO_STAGE + DENSE)
def test_an_identical_teacher_has_nothing_to_say(tmp_path, name):
    """KL is 0 and, with eps=0, DIST is 0 up to float32."""
    teacher_cfg = save_teacher(detector(name), tmp_path, seed=0)
    kd, dist = (
        build_distiller(detector(name), teacher_cfg, distill_loss=loss).eval()
        for loss in (dict(type='mmdist.KDLoss'),
                     dict(type='mmdist.DISTLoss', eps=0.)))
    assert losses_of(kd, name)[0]['loss_kd_kl'] == 0
    losses = losses_of(dist, name)[0]
    # A correlation of 1 is off by some roundings of 6e-8 a level; a head
    # whose probabilities hardly vary loses three more digits.
    assert abs(losses['loss_kd_inter']) < 1e-4
    assert abs(losses['loss_kd_intra']) < 1e-4


@pytest.mark.parametrize('name', ['faster', 'retina'])
def test_kl_by_hand(make, name):
    """Softmax KL over RoIs; Bernoulli KL over locations, levels summed."""
    wrapper = make(name, distill_loss=dict(type='mmdist.KDLoss', tau=2.))
    inputs, samples = prepared(wrapper, batch(name))
    torch.manual_seed(0)
    pairs = wrapper.kd_pairs(inputs, copy.deepcopy(samples))
    expected = sum(_kl(p, name == 'retina') for p in pairs)
    torch.manual_seed(0)
    losses = wrapper.loss(inputs, samples)
    torch.testing.assert_close(
        losses['loss_kd_kl'].double(), expected, rtol=1e-4, atol=1e-6)


def _kl(pair, sigmoid):
    rows = [
        logits.detach().double().movedim(1, -1).reshape(-1, logits.shape[1]) /
        2 for logits in (pair.student, pair.teacher)
    ]
    if not sigmoid:
        s, t = (table.softmax(1) for table in rows)
        return 4 * (t * (t / s).log()).sum(1).mean()
    s, t = (table.sigmoid() for table in rows)
    bernoulli = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    return 4 * bernoulli.sum(1).mean()


def test_mimic_by_hand(make):
    """MSE of projected FPN outputs, summed over the five levels."""
    wrapper = make('retina', mimic_loss=dict(MIMIC, loss_weight=0.5))
    convs = wrapper.distiller['mimic'].projections
    assert [c.weight.shape for c in convs] == [(16, 16, 1, 1)] * 5
    inputs, samples = prepared(wrapper, batch())
    expected = 0
    for conv, feat_s, feat_t in zip(
            convs,
            build(detector('retina')).extract_feat(inputs),
            build(detector('retina'), 1).eval().extract_feat(inputs)):
        expected += (conv(feat_s) - feat_t).square().mean()
    losses = wrapper.loss(inputs, samples)
    torch.testing.assert_close(losses['loss_kd_mimic'], 0.5 * expected)


@pytest.mark.parametrize('name', ['yolox', 'rtmdet'])
def test_mimic_counts_the_levels_of_any_neck(make, name):
    """These necks do not say how many levels they have."""
    wrapper = make(name, mimic_loss=MIMIC)
    assert len(wrapper.distiller['mimic'].projections) == 3
    assert losses_of(wrapper, name)[0]['loss_kd_mimic'] > 0


def test_mimic_leaves_the_modes_alone(make):
    """Looking at the shapes of features changes no mode and no buffer."""
    plain, wrapper = build(detector('yolox')), make('yolox', mimic_loss=MIMIC)
    ours = modules_of(wrapper)
    assert modules_of(plain).items() <= ours.items()
    assert_same(dict(wrapper.named_buffers()), dict(plain.named_buffers()))
    assert not wrapper.distillation.teacher.model.training


def test_mimic_trains_its_convs_and_nothing_of_the_teacher(make):
    """The projections get a gradient and stand under ``distiller``."""
    wrapper = make('faster', mimic_loss=MIMIC)
    grads = losses_of(wrapper, 'faster')[1]
    extra = set(grads) - set(gradients(build(detector('faster'))))
    assert extra == {
        f'distiller.mimic.projections.{i}.{kind}'
        for i in range(5)
        for kind in ('weight', 'bias')
    }
    assert all(grads[name].abs().sum() > 0 for name in extra)


def test_mimic_leaves_the_student_of_a_seed_alone(make):
    """Its convs take no random numbers from the student."""
    plain = initialised(build(detector('retina')))
    wrapper = initialised(make('retina', mimic_loss=MIMIC))
    weights = {
        name: value
        for name, value in wrapper.state_dict().items()
        if not name.startswith('distiller.')
    }
    assert_same(weights, plain.state_dict())


def test_mimic_projects_to_the_teachers_channels(tmp_path):
    """A wider teacher widens the projections, not the student."""
    wide = detector('retina', neck=dict(out_channels=24))
    wide['bbox_head']['in_channels'] = 24
    wrapper = build_distiller(
        detector('retina'), save_teacher(wide, tmp_path), mimic_loss=MIMIC)
    assert 'loss_kd_mimic' in losses_of(wrapper, 'retina')[0]
    convs = wrapper.distiller['mimic'].projections
    assert {c.weight.shape[:2] for c in convs} == {(24, 16)}


def test_mimic_of_ssd(tmp_path):
    """Which takes no image as small as other detectors do."""
    path = osp.join(ZOO, 'ssd/ssd300_coco.py')
    model = Config.fromfile(path).model.to_dict()
    model['backbone']['init_cfg'] = None
    teacher, weights = str(tmp_path / 'ssd.pth'), build(model)
    weights.neck.init_weights()  # some stand in memory as it was
    torch.save(weights.state_dict(), teacher)
    wrapper = build_distiller(
        model, dict(config=model, checkpoint=teacher), mimic_loss=MIMIC)
    convs = wrapper.distiller['mimic'].projections
    assert [len(c.weight) for c in convs] == [512, 1024, 512, 256, 256, 256]
    # and YOLOX beside it only a multiple of 32
    shapes = map_shapes(
        dict(student=build(detector('yolox')), teacher=weights), 'neck')
    for levels in shapes:
        assert [shape[2] for shape in levels[:3]] == [40, 20, 10]


def test_mimic_of_channels_that_the_config_lists(make, monkeypatch):
    """Where no random image shows them."""
    listed = dict(student_channels=[16] * 5, teacher_channels=[16] * 5)
    extract = RetinaNet.extract_feat

    def picky(self, batch_inputs):
        assert batch_inputs.shape[-1] not in SIZES, 'it is picky'
        return extract(self, batch_inputs)

    data = batch(sizes=[(96, 96)])
    monkeypatch.setattr(RetinaNet, 'extract_feat', picky)
    with pytest.raises(
            ValueError, match='it is picky.* list student_channels'):
        make('retina', mimic_loss=MIMIC)
    wrapper = make('retina', mimic_loss=dict(MIMIC, **listed))
    assert wrapper.loss(*prepared(wrapper, data))['loss_kd_mimic'] > 0


def test_the_start_up_line_says_what_is_paired(make, caplog, monkeypatch):
    """Teacher, checkpoint, tap and shapes in one line."""
    lines = []
    monkeypatch.setattr('mmdist.models.distillers.base.print_log',
                        lambda text, **_: lines.append(text))
    wrapper = make('retina')
    assert len(lines) == 1 and '\n' not in lines[0]
    for part in ('RetinaNet', wrapper.distillation.teacher.checkpoint,
                 'DenseTap', f'locations x {9 * NUM_CLASSES} (sigmoid)',
                 '8, 16, 32, 64, 128'):
        assert part in lines[0]
    make('cascade')
    for part in ('RoITap', f'RoIs x {NUM_CLASSES + 1} (softmax)'):
        assert part in lines[1]


def test_bfloat16_autocast_gives_finite_losses(make):
    """Losses are computed in float32 under autocast; gradients arrive."""
    wrapper = make('retina', mimic_loss=MIMIC).train()
    inputs, samples = prepared(wrapper, batch())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = wrapper.loss(inputs, samples)
    total(losses).backward()
    for name in ('loss_kd_inter', 'loss_kd_intra', 'loss_kd_mimic'):
        assert losses[name].dtype == torch.float32
        assert losses[name].isfinite()
    assert wrapper.bbox_head.retina_cls.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('student, teacher, tap',
                         [('retina', 'retina', {}),
                          ('retina', 'faster', dict(align='boxes')),
                          ('detr', 'detr', {})])
def test_float16_autocast_gives_finite_losses(student, teacher, tap, tmp_path):
    """Of levels, of boxes that RoIs answer, and of queries. (mmcv's NMS of
    proposals has no float16 on a CPU: no student with RoIs.)"""
    wrapper = build_distiller(
        detector(student), save_teacher(detector(teacher), tmp_path),
        **(dict(tap=tap) if tap else {})).train()
    inputs, samples = prepared(wrapper, batch())
    with torch.autocast('cpu', dtype=torch.float16):
        losses = wrapper.loss(inputs, samples)
    total(losses).backward()
    for name in ('loss_kd_inter', 'loss_kd_intra'):
        assert losses[name].dtype == torch.float32
        assert losses[name].isfinite()
    gradients_of = [p.grad for p in wrapper.parameters() if p.grad is not None]
    assert gradients_of and all(g.isfinite().all() for g in gradients_of)


def test_a_picture_without_boxes_trains(make):
    """No ground truth leaves RoIs of background; every loss is finite."""
    for name in ('faster', 'retina'):
        wrapper = make(name).train()
        data = batch(name)
        for sample in data['data_samples']:
            sample.gt_instances = sample.gt_instances[:0]
        inputs, samples = prepared(wrapper, data)
        losses = wrapper.loss(inputs, samples)
        total(losses).backward()
        assert all(v.isfinite() for v in flat(losses).values())


@pytest.mark.parametrize('name', ['faster', 'retina', 'mask'])
def test_the_teacher_computes_features_before_the_student(make, name):
    """Its activations are gone before the student's are there. In the first
    steps it is asked three times more, with red for blue."""
    wrapper = make(name).train()
    order = []
    for who, model in (('teacher', wrapper.distillation.teacher.model),
                       ('student', wrapper)):
        model.backbone.register_forward_hook(
            lambda *_, who=who: order.append(who))
    for _ in range(12):
        order.append('step')
        losses_of(wrapper, name)
    steps = ' '.join(order).split('step ')[1:]
    steps = [step.split() for step in steps]
    assert steps[:3] == [['teacher', 'student', 'teacher']] * 3
    assert steps[3:] == [['teacher', 'student']] * 9


def test_a_step_does_not_depend_on_those_before(make):
    """The first and a later one have the same losses and gradients."""
    first, later = make('retina').train(), make('retina').train()
    for _ in range(2):
        losses_of(later, 'retina')
    later.load_state_dict(make('retina').state_dict())  # batch norms counted
    later.zero_grad()
    losses, grads = losses_of(later, 'retina')
    expected, expected_grads = losses_of(first, 'retina')
    assert_same(flat(losses), flat(expected))
    assert_same(grads, expected_grads)


# The model is the student


def test_the_model_is_the_student(make):
    """In the eyes of hooks and tools, and a wrapper's in those of ours."""
    wrapper, plain = make('faster'), build(detector('faster'))
    assert isinstance(wrapper, type(plain))
    assert isinstance(wrapper, DistillDetector)
    assert isinstance(wrapper, BaseDistiller)
    assert type(wrapper) is type(make('faster'))
    assert list(wrapper.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in wrapper.named_modules()
            ] == [name for name, _ in plain.named_modules()]
    assert [name for name, _ in wrapper.named_parameters()
            ] == [name for name, _ in plain.named_parameters()]


def test_a_subclass_of_the_wrapper(tmp_path):
    """A user's own, with a loss of its own on top."""

    class Doubled(DistillDetector):

        def loss(self, inputs, data_samples):
            losses = super().loss(inputs, data_samples)
            return dict(losses, loss_mine=2 * losses['loss_kd_inter'])

    MODELS.register_module(module=Doubled, name='Doubled', force=True)
    cfg = distiller_cfg(
        detector('retina'), save_teacher(detector('retina'), tmp_path))
    wrapper = build(dict(cfg, type='mmdist.Doubled'))
    losses = losses_of(wrapper, 'retina')[0]
    assert isinstance(wrapper, Doubled)
    assert losses['loss_mine'] == 2 * losses['loss_kd_inter']
    assert isinstance(copy.deepcopy(wrapper), Doubled)


class Careful(RetinaNet):
    """A student that does much in its own way."""

    def train_step(self, data, optim_wrapper):
        self.stepped = True
        return super().train_step(data, optim_wrapper)

    def parse_losses(self, losses):
        total, log = super().parse_losses(losses)
        return total, dict(log, parsed=torch.ones(()))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.modes = [*getattr(self, 'modes', []), mode]
        return super().forward(inputs, data_samples, mode)

    def loss(self, inputs, data_samples):
        noise = torch.linspace(0, 1, inputs.numel()).view_as(inputs)
        self.seen = (inputs + noise).to(memory_format=torch.channels_last)
        return super().loss(self.seen, data_samples)


def test_what_a_student_does_in_its_own_way_is_honoured(tmp_path):
    """Its own train_step, parse_losses, forward, and loss with changed
    inputs, which the teacher sees, too."""
    model = dict(detector('retina'), type=Careful)
    wrapper = build_distiller(model,
                              save_teacher(detector('retina'), tmp_path))
    seen = []
    wrapper.distillation.teacher.model.backbone.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0]))
    optimizer = OptimWrapper(torch.optim.SGD(wrapper.parameters(), lr=0.01))
    log = wrapper.train().train_step(batch('retina'), optimizer)
    assert wrapper.stepped and wrapper.modes == ['loss']
    assert log['parsed'] == 1 and log['loss_kd_inter'] > 0
    assert torch.equal(seen[0], wrapper.seen)
    teacher = wrapper.distillation.teacher.model
    pair = wrapper.kd_pairs(*prepared(wrapper, batch('retina')))[0]
    expected = teacher(wrapper.seen)[0][0]
    assert torch.equal(pair.teacher, expected)


def test_a_pickle_is_the_same_model(make):
    """With its teacher, in another process, too."""
    wrapper = make('retina', mimic_loss=MIMIC)
    twin = pickle.loads(pickle.dumps(wrapper))
    assert type(twin) is type(wrapper)
    assert_same(twin.state_dict(), wrapper.state_dict())
    ours, theirs = (losses_of(model, 'retina') for model in (wrapper, twin))
    assert_same(flat(ours[0]), flat(theirs[0]))


@pytest.mark.parametrize(
    'name',
    ['kd_scale', 'kd_teacher', 'teacher', 'student', 'tap', 'alpha', 'pairs'])
def test_names_of_before_are_deprecated(make, name):
    """They work, with a warning of the new name."""
    wrapper = make('retina', alpha=0.5)
    with pytest.warns(FutureWarning, match=f'model.{name} is deprecated'):
        value = getattr(wrapper, name)
    distillation = wrapper.distillation
    assert value == dict(
        kd_scale=1,
        kd_teacher=distillation.teacher,
        teacher=distillation.teacher,
        student=wrapper,
        tap=distillation.tap,
        alpha=0.5,
        pairs=wrapper.kd_pairs)[name]


def test_the_scale_can_be_set_by_its_name_of_before(make):
    """A hook of the user's own may do so."""
    wrapper = make('retina')
    with pytest.warns(FutureWarning, match='model.distillation.scale'):
        wrapper.kd_scale = 0.5
    assert wrapper.distillation.scale == 0.5
