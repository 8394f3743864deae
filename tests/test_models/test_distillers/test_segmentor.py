"""DistillSegmentor: the student's own training, and the pixels on top."""
import copy
import shutil

import pytest
import torch
from mmengine.config import Config
from mmseg.models.decode_heads import PSPHead
from torch.autograd.graph import saved_tensors_hooks

from mmdist.errors import ConfigError
from mmdist.models.distillers import BaseDistiller, DistillSegmentor
from mmdist.models.taps import pair_logits, watch_heads
from tests.helpers import (assert_same, checkpoint, detector, flat, gradients,
                           pearson_dist)
from tests.helpers import save_teacher as save_detector
from tests.helpers import tensors_of, total
from tests.refusals import refused
from tests.segmentors import (CLASSES, NUM_CLASSES, SEGMENTORS, batch, build,
                              build_distiller, distiller_cfg, make_runner,
                              prepared, save_teacher, segmentor, train,
                              write_masks)

OFF = dict(
    dist=dict(type='mmdist.DISTLoss', beta=0, gamma=0),
    kd=dict(type='mmdist.KDLoss', loss_weight=0))


@pytest.fixture
def make(tmp_path):
    """Build a distiller of two segmentors, the teacher's weights new."""

    def make(name, teacher=None, seed=0, **options):
        teacher_cfg = save_teacher(segmentor(teacher or name), tmp_path)
        return build_distiller(segmentor(name), teacher_cfg, seed, **options)

    return make


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The toy data set."""
    return write_masks(tmp_path_factory.mktemp('data'))


@pytest.fixture
def pspnet(tmp_path):
    """The `model` of a PSPNet that learns from a PSPNet."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)
    return distiller_cfg(segmentor('pspnet'), teacher)


def losses_of(model, seed=4):
    """The losses of one training step, and their gradients."""
    inputs, samples = prepared(model, batch())
    torch.manual_seed(seed)
    losses = model(inputs, samples, mode='loss')
    total(losses).backward()
    return losses, gradients(model)


def own(losses):
    """The student's own losses by name."""
    return flat({k: v for k, v in losses.items() if 'loss_kd' not in k})


@pytest.mark.parametrize('name', SEGMENTORS)
@pytest.mark.parametrize('off', OFF)
def test_without_weight_everything_is_plain(make, name, off):
    """Losses, gradients and buffers equal MMSegmentation's bit for bit."""
    plain = build(segmentor(name)).train()
    wrapper = make(name, distill_loss=OFF[off]).train()
    assert_same(wrapper.state_dict(), plain.state_dict())
    losses, grads = losses_of(wrapper)
    expected, expected_grads = losses_of(plain)
    assert_same(own(losses), flat(expected))
    assert_same(grads, expected_grads)
    assert set(losses) > set(expected)
    assert_same(dict(wrapper.named_buffers()), dict(plain.named_buffers()))


def test_random_numbers_of_the_teacher_are_its_own(tmp_path):
    """LightHamHead draws some in eval mode; the student's stay the same."""
    teacher = segmentor('pspnet', auxiliary_head=None)
    teacher['decode_head'] = dict(
        type='LightHamHead',
        in_channels=[32, 64],
        in_index=[2, 3],
        channels=8,
        ham_channels=8,
        ham_kwargs=dict(MD_R=4),
        num_classes=NUM_CLASSES,
        norm_cfg=dict(type='BN'))
    wrapper = build_distiller(
        segmentor('pspnet'), save_teacher(teacher, tmp_path))
    states = []
    for model in (wrapper.train(), build(segmentor('pspnet')).train()):
        losses_of(model)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize('name', SEGMENTORS)
def test_distillation_does_change_gradients(make, name):
    """With its weights at 1 the same comparison fails where it should."""
    losses, grads = losses_of(make(name).train())
    expected_grads = losses_of(build(segmentor(name)).train())[1]
    assert all(losses[f'loss_kd_{term}'] > 0 for term in ('inter', 'intra'))
    differing = [
        n for n, g in grads.items()
        if g is not None and not torch.equal(g, expected_grads[n])
    ]
    assert any(n.startswith('backbone') for n in differing)
    assert any('conv_seg' in n or 'cls_seg' in n for n in differing)


def test_the_total_is_that_of_the_authors(make):
    """DIST(main) + 0.4 DIST(aux), computed from the plain models alone."""
    wrapper = make('pspnet').train()
    student = build(segmentor('pspnet')).train()
    teacher = build(segmentor('pspnet'), seed=1).eval()
    inputs, samples = prepared(student, batch())
    torch.manual_seed(4)
    features = student.extract_feat(inputs)
    features_t = teacher.extract_feat(inputs)
    expected = torch.zeros(2, dtype=torch.double)
    for head, weight in (('decode_head', 1.), ('auxiliary_head', 0.4)):
        tables = [
            torch.stack([
                logits[n, :, y, x] for n in range(2) for y in range(8)
                for x in range(8)
            ]).double().softmax(1)
            for logits in (getattr(student, head)(features),
                           getattr(teacher, head)(features_t))
        ]
        expected += weight * torch.stack(pearson_dist(*tables))
    torch.manual_seed(4)
    losses = wrapper(inputs, samples, mode='loss')
    terms = torch.stack([losses['loss_kd_inter'], losses['loss_kd_intra']])
    torch.testing.assert_close(terms.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize('name', ['pspnet', 'segformer', 'bisenetv2', 'stdc'])
def test_an_identical_teacher_has_nothing_to_say(tmp_path, name):
    """The KL of an eval-mode student is 0, up to a rounding of float32.

    SegFormer's attention takes another path where no gradient is needed.
    """
    teacher = save_teacher(segmentor(name), tmp_path, seed=0)
    wrapper = build_distiller(
        segmentor(name), teacher, distill_loss=dict(type='mmdist.KDLoss'))
    assert abs(losses_of(wrapper.eval())[0]['loss_kd_kl']) < 1e-7


@pytest.mark.parametrize('alpha', [0, 0.5])
def test_alpha_scales_only_what_is_tapped(make, alpha):
    """Not STDC's boundaries, and no accuracy."""
    losses = own(losses_of(make('stdc', alpha=alpha).train())[0])
    expected = flat(losses_of(build(segmentor('stdc')).train())[0])
    for name in ('decode.loss_ce.0', 'aux_0.loss_ce.0', 'aux_1.loss_ce.0'):
        expected[name] = alpha * expected[name]
    assert_same(losses, expected)


def test_predictions_are_the_plain_students(make):
    """predict, tensor mode and test_step, bit for bit."""
    plain, wrapper = build(segmentor('pspnet')).eval(), make('pspnet').eval()
    for call in ('val_step', 'test_step'):
        ours, theirs = (
            getattr(m, call)(batch(seed=2)) for m in (wrapper, plain))
        for a, b in zip(ours, theirs):
            assert torch.equal(a.seg_logits.data, b.seg_logits.data)
            assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)
    inputs, _ = prepared(plain, batch(), training=False)
    with torch.no_grad():
        assert torch.equal(wrapper(inputs), plain(inputs, mode='tensor'))


def test_student_of_a_package(tmp_path):
    """'mmseg::…' is the zoo's config of the installed package."""
    name = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    narrow = segmentor('segformer', num_classes=150)
    teacher = save_teacher(narrow, tmp_path)
    wrapper = build_distiller(name, teacher)
    assert isinstance(wrapper, DistillSegmentor)
    assert wrapper.decode_head.num_classes == 150
    assert wrapper.backbone.embed_dims == 32


@pytest.mark.parametrize('named', [True, False])
def test_the_preprocessor_at_the_configs_top_level(pspnet, data, tmp_path,
                                                   named):
    """The runner hands it to every model; it is for one that names none."""
    own = pspnet['student']['data_preprocessor']
    if not named:
        pspnet['student'] = {
            k: v
            for k, v in pspnet['student'].items() if k != 'data_preprocessor'
        }
    given = dict(own, mean=[1., 2., 3.])
    model = make_runner(pspnet, data, tmp_path, data_preprocessor=given).model
    mean = model.data_preprocessor.mean.flatten().tolist()
    assert mean == pytest.approx(own['mean'] if named else [1, 2, 3])
    # The teacher's own statistics stay.
    teacher = model.distillation.teacher.model.data_preprocessor
    assert teacher.mean.flatten().tolist() == pytest.approx(own['mean'])


# Memory: what a step keeps for backward.


def bytes_kept(function, known):
    """Bytes of all tensors that autograd keeps, without those known."""
    kept = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        result = function()
    return sum(kept.values()), result


@pytest.mark.parametrize('loss', [
    dict(type='mmdist.DISTLoss'),
    dict(type='mmdist.KDLoss', tau=2.),
])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_step_keeps_the_logits_and_nothing_of_their_size(make, loss, dtype):
    """Besides both logits less than a tenth of one of them is kept."""
    wrapper = make('pspnet', distill_loss=loss).train()
    student = torch.randn(2, 150, 32, 32, dtype=dtype, requires_grad=True)
    teacher = torch.randn(2, 150, 32, 32, dtype=dtype)
    kept, terms = bytes_kept(
        lambda: wrapper.distillation.loss.terms(student, teacher),
        known=(student, teacher))
    assert kept < student.nbytes / 10
    sum(terms.values()).backward()
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize('names, heads', [
    (('pspnet', 'pspnet'), 2),
    (('pspnet', 'segformer'), 1),
    (('ddrnet', 'pspnet'), 2),
])
def test_a_whole_step_keeps_three_times_the_logits(tmp_path, names, heads):
    """On top of plain MMSegmentation: both logits and less than one more.

    Also where the teacher's are resized, and where DDRNet's two outputs learn
    from the same.
    """
    # As many logits as pictures of usual size have; DIST keeps more of fewer.
    student, teacher = (segmentor(name, num_classes=2400) for name in names)
    wrapper = build_distiller(student, save_teacher(teacher, tmp_path)).train()
    inputs, samples = prepared(wrapper, batch())
    kept = []
    for model in (wrapper, build(student).train()):
        torch.manual_seed(4)
        kept.append(
            bytes_kept(lambda: model.loss(inputs, samples), known=())[0])
    logits = 4 * 2 * 2400 * 8 * 8
    assert heads * logits < kept[0] - kept[1] < 3 * heads * logits


@pytest.mark.parametrize('name', ['pspnet', 'pointrend'])
def test_the_order_of_a_step(make, name):
    """The teacher's features, the student's, and then the teacher's heads."""
    wrapper = make(name).train()
    wrapper.distillation.monitor.judged = True  # until then it goes twice
    order = []
    for who, model in (('teacher', wrapper.distillation.teacher.model),
                       ('student', wrapper)):
        heads = [m for m in model.modules() if hasattr(m, 'loss_by_feat')]
        for module, what in ((model.backbone, 'features'), (heads[0], 'head')):
            module.register_forward_hook(
                lambda *_, what=f'{who} {what}': order.append(what))
    losses_of(wrapper)
    # MMSegmentation calls the student's head by its method, without hooks.
    assert order == ['teacher features', 'student features', 'teacher head']


def test_nothing_is_resized_to_the_picture(make, monkeypatch):
    """The wrapper's own work stays at the size of the heads' logits."""
    wrapper = make('pspnet', 'segformer').train()
    inputs, samples = prepared(wrapper, batch())
    tap, teacher = wrapper.distillation.tap, wrapper.distillation.teacher
    with watch_heads(tap, wrapper) as calls:
        super(BaseDistiller, wrapper).loss(inputs, samples)
    batch_t = teacher.batch(inputs, samples)
    sizes = []
    resize = torch.nn.functional.interpolate

    def watched(*args, **kwargs):
        sizes.append(resize(*args, **kwargs).shape[-1])
        return resize(*args, **kwargs)

    monkeypatch.setattr('torch.nn.functional.interpolate', watched)
    pairs = pair_logits(tap, calls, batch_t)
    # The teacher's own head resizes its levels to 16, the tap to 8.
    assert sizes and max(sizes) == 16 < inputs.shape[-1]
    assert pairs[0].teacher.shape[-1] == 8


# In a runner.


def trained_state(work_dir, epoch=2):
    """Weights and optimizer state of a run, by name."""
    content = checkpoint(work_dir, epoch)
    return tensors_of(
        dict(model=content['state_dict'], optimizer=content['optimizer']))


def test_resume_equals_the_uninterrupted_run(data, pspnet, tmp_path):
    """Weights and optimizer after epoch 2, bit for bit."""
    # Dropout draws random numbers, which no checkpoint of MMEngine holds.
    for head in ('decode_head', 'auxiliary_head'):
        pspnet['student'][head]['dropout_ratio'] = 0
    train(copy.deepcopy(pspnet), data, tmp_path / 'whole')
    (tmp_path / 'cut').mkdir()
    shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'cut')
    (tmp_path / 'cut/last_checkpoint').write_text(
        str(tmp_path / 'cut/epoch_1.pth'))
    assert train(pspnet, data, tmp_path / 'cut', resume=True).iter == 6
    assert_same(
        trained_state(tmp_path / 'cut'), trained_state(tmp_path / 'whole'))


def test_off_equals_plain_training(data, pspnet, tmp_path):
    """Two epochs through the runner with weights 0, bit for bit."""
    pspnet['distill_loss'].update(beta=0, gamma=0)
    train(pspnet, data, tmp_path / 'off')
    train(segmentor('pspnet'), data, tmp_path / 'plain')
    assert_same(
        trained_state(tmp_path / 'off'), trained_state(tmp_path / 'plain'))
    build(segmentor('pspnet')).load_state_dict(
        checkpoint(tmp_path / 'off', 2)['state_dict'], strict=True)


def test_ema_shares_the_teacher(data, pspnet, tmp_path):
    """The averaged student is a plain student in the checkpoint, too."""
    runner = train(
        pspnet,
        data,
        tmp_path,
        custom_hooks=[dict(type='EMAHook', momentum=0.5)])
    hook = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    averaged = hook.ema_model.module
    assert averaged.distillation.teacher is runner.model.distillation.teacher
    names = list(checkpoint(tmp_path, 2)['state_dict'])
    assert names == list(build(segmentor('pspnet')).state_dict())


def test_amp_optim_wrapper_in_bfloat16(data, pspnet, tmp_path, monkeypatch):
    """Mixed precision trains; MMEngine only has to be let onto the CPU."""
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available',
        lambda: True)
    runner = train(
        pspnet,
        data,
        tmp_path,
        optim_wrapper=dict(
            type='AmpOptimWrapper',
            dtype='bfloat16',
            loss_scale=1.,
            optimizer=dict(type='SGD', lr=0.01)))
    for name in ('inter', 'intra'):
        history = runner.message_hub.log_scalars[f'train/loss_kd_{name}']
        assert len(history.data[0]) == 6
        assert all(0 < float(v) < 4 for v in history.data[0])


def test_a_decode_head_with_a_loss_of_its_own_is_refused(make):
    """The auxiliary head alone would be distilled, without a word."""
    wrapper = make('pspnet')
    head = wrapper.decode_head
    head.loss = lambda x, samples, cfg: dict(loss_ce=head(x).mean())
    with refused('model.student.decode_head', 'without a call of its'):
        losses_of(wrapper)


def test_other_class_names_than_the_teachers_are_refused(data, tmp_path):
    """The checkpoint's class names are compared before the first step."""
    names = ('ground', 'disc', 'circle', 'bar')
    teacher = save_teacher(
        segmentor('pspnet'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=names)))
    assert names != CLASSES and len(names) == NUM_CLASSES
    runner = make_runner(
        distiller_cfg(segmentor('pspnet'), teacher), data, tmp_path / 'run')
    with refused('model.teacher.class_map', "label 2 is 'circle' .* 'square'"):
        runner.train()
    assert not list((tmp_path / 'run').glob('*.pth'))


def do_not_fit(student, teacher, match, **options):
    """Building the model ends with one sentence, which names the field."""
    with pytest.raises(ConfigError, match=match) as caught:
        build_distiller(student, teacher, **options)
    assert '\n' not in str(caught.value)


def test_a_detector_is_refused(tmp_path):
    """As student and as teacher."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)
    retina = detector('retina')
    retina['type'] = 'mmdet.RetinaNet'
    zoo = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    do_not_fit(
        zoo, teacher, 'model.student.* is a RetinaNet, but DistillSegmentor '
        'distils mmseg models')
    taught = save_detector(
        detector('retina', bbox_head=dict(num_classes=80)), tmp_path)
    path = str(tmp_path / 'retina.py')
    Config(dict(model=taught['config'], default_scope='mmdet')).dump(path)
    do_not_fit(
        segmentor('pspnet'), dict(taught, config=path),
        'model.teacher.config.* is a RetinaNet, but DistillSegmentor')


def test_wrong_class_count_and_checkpoints_are_refused(tmp_path):
    """With the same sentences as for detectors."""
    teacher = save_teacher(segmentor('pspnet', num_classes=5), tmp_path)
    do_not_fit(segmentor('pspnet'), teacher, 'predicts 5 classes but .* 4')
    config = segmentor('pspnet')
    do_not_fit(config, dict(config=config),
               r'model.teacher: .* must be dict\(config')
    do_not_fit(config, dict(config=config, checkpoint='/no/such.pth'),
               'model.teacher.checkpoint: .*does not exist')
    do_not_fit(config, dict(config=config, checkpoint=teacher['checkpoint']),
               'model.teacher.checkpoint: .*does not fit its config')


def test_unknown_tap_option_is_refused(tmp_path):
    """The option of another tap is named."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)
    do_not_fit(
        segmentor('pspnet'),
        teacher,
        'model.tap: .*anchors_as_rows',
        tap=dict(anchors_as_rows=True))


def test_a_frozen_decode_head_is_refused(tmp_path, monkeypatch):
    """By the reason; its auxiliary head alone would be distilled."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)

    def frozen(self, *args, **kwargs):
        built(self, *args, **kwargs)
        self.requires_grad_(False)

    built = PSPHead.__init__
    monkeypatch.setattr(PSPHead, '__init__', frozen)
    do_not_fit(
        segmentor('pspnet'), teacher, 'model.student.* has a PSPHead for a '
        'decode head that is frozen')


def test_an_unknown_name_of_class_logits_is_shown(tmp_path, monkeypatch):
    """With the names by which they are found."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)
    monkeypatch.setattr(
        PSPHead,
        'loss_by_feat',
        lambda self, logits, samples: {},
        raising=False)
    do_not_fit(
        segmentor('pspnet'), teacher,
        r'decode_head.loss_by_feat takes logits, samples; its class logits '
        'are found if their argument is called seg_logits or seg_logit')


@pytest.mark.parametrize('channels', [1, 5])
def test_mimic_of_other_images_than_rgb(tmp_path, channels):
    """Grey ones and those of several bands show their features, too."""
    model = segmentor('pspnet')
    model['backbone']['in_channels'] = channels
    # The forks normalise one or three channels only.
    known = dict(
        mean=[128.], std=[64.]) if channels == 1 else dict(
            mean=None, std=None)
    model['data_preprocessor'].update(known, bgr_to_rgb=False)
    model['neck'] = dict(
        type='mmdet.FPN',
        in_channels=[8, 16, 32, 64],
        out_channels=64,
        num_outs=4)
    model['decode_head']['in_channels'] = 64
    model['auxiliary_head']['in_channels'] = 64
    teacher = save_teacher(model, tmp_path)
    wrapper = build_distiller(
        model, teacher, mimic_loss=dict(type='mmdist.MimicLoss'))
    data = batch()
    data['inputs'] = [
        image[:1].repeat(channels, 1, 1) for image in data['inputs']
    ]
    losses = wrapper.loss(*prepared(wrapper, data))
    assert losses['loss_kd_mimic'] > 0
    do_not_fit(
        segmentor('pspnet'), teacher,
        f'model.teacher.config.* takes images of {channels} channels, but '
        'model.student.* of 3')


def test_mimic_needs_a_neck(tmp_path):
    """These segmentors have none."""
    teacher = save_teacher(segmentor('pspnet'), tmp_path)
    do_not_fit(
        segmentor('pspnet'),
        teacher,
        'model.mimic_loss: .*model.student has no neck',
        mimic_loss=dict(type='mmdist.MimicLoss'))


def test_synchronised_batch_norms_train_on_one_cpu(data, tmp_path):
    """MMEngine reverts the student's; the teacher's work in eval mode."""
    model = segmentor('pspnet')
    for part in ('backbone', 'decode_head', 'auxiliary_head'):
        model[part]['norm_cfg'] = dict(type='SyncBN', requires_grad=True)
    pair = distiller_cfg(model, save_teacher(model, tmp_path))
    runner = train(pair, data, tmp_path / 'run', epochs=1)
    assert runner.iter == 3
    norms = {type(m).__name__ for m in runner.model.modules()}
    taught_by = runner.model.distillation.teacher.model
    teacher = {type(m).__name__ for m in taught_by.modules()}
    assert 'SyncBatchNorm' in teacher - norms
