"""DistillDetector in a runner, and what it refuses before training."""
import copy
import os
import os.path as osp
import shutil
import subprocess
import sys

import pytest
import torch
from mmdet.models import RetinaHead
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdist.errors import ConfigError
from tests.helpers import (CLASSES, assert_same, build, build_distiller,
                           checkpoint, detector, distiller_cfg, make_runner,
                           run_cfg, save_teacher, tensors_of, total, train,
                           write_coco)
from tests.refusals import refused

MIMIC = dict(type='mmdist.MimicLoss', loss_weight=1.0)
FEATURES = dict(type='mmdist.DISTLoss', project=True)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """The toy data set."""
    return write_coco(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def retina_teacher(tmp_path_factory):
    """`model.teacher` of a RetinaNet with random weights."""
    return save_teacher(detector('retina'), tmp_path_factory.mktemp('teacher'))


@pytest.fixture
def retina(retina_teacher):
    """The `model` of a RetinaNet that learns from a RetinaNet."""
    return distiller_cfg(detector('retina'), copy.deepcopy(retina_teacher))


def trained_state(runner, epoch=2):
    """Weights and optimizer state of a run, by name."""
    content = checkpoint(runner, epoch)
    return tensors_of(
        dict(model=content['state_dict'], optimizer=content['optimizer']))


@pytest.mark.parametrize('options', [
    {},
    dict(mimic_loss=MIMIC),
    dict(feature_loss=FEATURES),
])
def test_resume_equals_the_uninterrupted_run(data, retina, tmp_path, options):
    """Weights, optimizer and `distiller.*` after epoch 2, bit for bit."""
    model = dict(retina, **options)
    train(copy.deepcopy(model), data, tmp_path / 'whole')
    (tmp_path / 'cut').mkdir()
    # What is left of a run that was killed in its second epoch.
    shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'cut')
    (tmp_path / 'cut/last_checkpoint').write_text(
        str(tmp_path / 'cut/epoch_1.pth'))
    resumed = train(model, data, tmp_path / 'cut', resume=True)
    assert resumed.iter == 6
    expected = trained_state(tmp_path / 'whole')
    assert_same(trained_state(tmp_path / 'cut'), expected)
    first = trained_state(tmp_path / 'whole', 1)
    extra = [name for name in expected if 'distiller' in name]
    assert len(extra) == (10 if options else 0)
    moved = [n for n in expected if not torch.equal(first[n], expected[n])]
    assert set(extra) <= set(moved) and len(moved) > 50


def test_compile_trains_as_without(data, retina, tmp_path):
    """MMEngine compiles train_step; the losses within run as they are."""
    train(copy.deepcopy(retina), data, tmp_path / 'plain', epochs=1)
    train(
        retina,
        data,
        tmp_path / 'compiled',
        epochs=1,
        compile=dict(backend='eager'))
    states = [
        checkpoint(tmp_path / name, 1)['state_dict']
        for name in ('plain', 'compiled')
    ]
    assert_same(*states)


@pytest.mark.parametrize('before, after', [(MIMIC, None), (None, MIMIC)])
def test_resume_needs_the_projections_of_before(data, retina, tmp_path, before,
                                                after):
    """Said before the optimizer refuses another number of parameters."""
    train(dict(retina, mimic_loss=before), data, tmp_path / 'run', epochs=1)
    with refused(
            'resume', '(the checkpoint|this config) has projections of '
            'model.mimic_loss or model.feature_loss but (this config|'
            'the checkpoint) has not'):
        train(
            dict(retina, mimic_loss=after),
            data,
            tmp_path / 'run',
            resume=True)
    runner = train(
        dict(retina, mimic_loss=after),
        data,
        tmp_path / 'new',
        epochs=1,
        load_from=str(tmp_path / 'run' / 'epoch_1.pth'))
    assert runner.iter == 3


def test_an_unknown_name_of_class_logits_is_shown(retina, monkeypatch):
    """With the names by which they are found."""
    monkeypatch.setattr(RetinaHead, 'loss_by_feat',
                        lambda self, logits, boxes: {})
    with pytest.raises(
            ValueError,
            match='bbox_head.loss_by_feat takes logits, boxes; its class '
            'logits are found if their argument is called .*cls_scores'):
        build(retina)


def test_off_equals_plain_training(data, retina, tmp_path):
    """Two epochs through the runner with weights 0, bit for bit."""
    retina['distill_loss'].update(beta=0, gamma=0)
    train(retina, data, tmp_path / 'off')
    train(detector('retina'), data, tmp_path / 'plain')
    assert_same(
        trained_state(tmp_path / 'off'), trained_state(tmp_path / 'plain'))


def test_names_of_paramwise_cfg_are_the_students(data, retina, tmp_path):
    """Rates by name reach the student's layers; the teacher has none."""
    wrapper = dict(
        optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1),
        paramwise_cfg=dict(
            custom_keys={'backbone': dict(lr_mult=0.1)}, bias_decay_mult=0.))
    groups = []
    for model in (retina, detector('retina')):
        runner = make_runner(model, data, tmp_path / str(len(groups)))
        optim = runner.build_optim_wrapper(wrapper).optimizer
        names = {id(p): n for n, p in runner.model.named_parameters()}
        groups.append([(names[id(g['params'][0])], g['lr'], g['weight_decay'])
                       for g in optim.param_groups])
    assert groups[0] == groups[1]
    trained = [p for p in runner.model.parameters() if p.requires_grad]
    assert len(groups[0]) == len(trained)
    assert {lr for _, lr, _ in groups[0]} == {0.1, 0.1 * 0.1}
    assert {decay for *_, decay in groups[0]} == {0.1, 0.}


def test_checkpoint_is_the_plain_students_file(data, retina, tmp_path):
    """Keys and size are those of a plain run's checkpoint."""
    train(retina, data, tmp_path / 'ours', epochs=1)
    train(detector('retina'), data, tmp_path / 'plain', epochs=1)
    ours, plain = (checkpoint(tmp_path / run, 1) for run in ('ours', 'plain'))
    assert list(ours['state_dict']) == list(plain['state_dict'])
    sizes = [(tmp_path / run / 'epoch_1.pth').stat().st_size
             for run in ('ours', 'plain')]
    # The config's text and the history of two more losses come on top.
    assert abs(sizes[0] - sizes[1]) < 0.05 * sizes[1]


STOCK = """
import sys, torch
from mmdet.apis import init_detector, inference_detector
from mmengine.config import Config
config, path, picture, out = sys.argv[1:]
model = init_detector(Config.fromfile(config), path, device='cpu')
model.load_state_dict(torch.load(path)['state_dict'], strict=True)
assert model.dataset_meta['classes'] == ('disc', 'square', 'bar')
result = inference_detector(model, picture).pred_instances
assert not any(name.split('.')[0] == 'mmdist' for name in sys.modules)
torch.save(dict(result.items()), out)
"""


@pytest.mark.slow
def test_checkpoint_works_without_mmdist(data, retina, tmp_path):
    """A fresh interpreter without mmdist loads it and predicts the same.

    It reads the file of docs/en/install.md: MMEngine alone cannot read the
    history of losses that it has written.
    """
    retina['student']['test_cfg']['score_thr'] = 0.
    runner = train(retina, data, tmp_path / 'run', epochs=1)
    config = tmp_path / 'stock.py'
    run_cfg(
        retina['student'], data, tmp_path / 'stock',
        custom_imports=None).dump(str(config))
    (tmp_path / 'stock_test.py').write_text(STOCK)
    content = checkpoint(tmp_path / 'run', 1)
    torch.save({key: content[key]
                for key in ('meta', 'state_dict')}, tmp_path / 'student.pth')
    picture, out = str(data / '1.png'), str(tmp_path / 'out.pth')
    subprocess.run([
        sys.executable,
        str(tmp_path / 'stock_test.py'),
        str(config),
        str(tmp_path / 'student.pth'), picture, out
    ],
                   check=True,
                   cwd=tmp_path,
                   env=_without_pythonpath())
    # One picture at a time, as there: a batch of two rounds otherwise.
    loader = dict(runner.cfg.test_dataloader, batch_size=1)
    batch = next(iter(runner.build_dataloader(loader)))
    ours = runner.model.eval().test_step(batch)[0]
    assert ours.img_path == picture and len(ours.pred_instances) > 10
    assert_same(dict(ours.pred_instances.items()), torch.load(out))


def _without_pythonpath():
    """This checkout is not to be found; one thread, as here."""
    env = dict(os.environ, OMP_NUM_THREADS='1')
    env.pop('PYTHONPATH', None)
    return env


def test_a_plain_checkpoint_starts_the_student(data, retina, tmp_path):
    """load_from takes a checkpoint that plain training wrote."""
    plain = build(detector('retina'), seed=7)
    path = str(tmp_path / 'plain.pth')
    torch.save(dict(state_dict=plain.state_dict(), meta={}), path)
    runner = make_runner(retina, data, tmp_path / 'run', load_from=path)
    runner.load_or_resume()
    assert_same(runner.model.state_dict(), plain.state_dict())


@pytest.mark.parametrize('options',
                         [dict(mimic_loss=MIMIC),
                          dict(feature_loss=FEATURES)])
def test_ema_shares_the_teacher(data, retina, tmp_path, options):
    """The averaged student is a plain student in the checkpoint, too."""
    runner = train(
        dict(retina, **options),
        data,
        tmp_path,
        custom_hooks=[dict(type='EMAHook', momentum=0.5)])
    hook = next(h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    averaged = hook.ema_model.module
    assert averaged.distillation.teacher is runner.model.distillation.teacher
    content = checkpoint(tmp_path, 2)
    # MMEngine writes the average as the state dict and swaps the other.
    names = [n for n in content['state_dict'] if 'distiller' not in n]
    assert len(content['state_dict']) == len(names) + 10  # projections
    assert names == list(build(detector('retina')).state_dict())
    raw = {
        n.partition('.')[2]: value
        for n, value in content['ema_state_dict'].items() if '.' in n
    }
    weight = 'bbox_head.retina_cls.weight'
    assert not torch.equal(raw[weight], content['state_dict'][weight])
    assert torch.equal(averaged.state_dict()[weight],
                       content['state_dict'][weight])
    assert torch.equal(runner.model.state_dict()[weight], raw[weight])


@pytest.mark.parametrize('options', [{}, dict(feature_loss=FEATURES)])
def test_gradient_accumulation(data, retina, tmp_path, options):
    """Two batches a step move the weights by the mean of their gradients."""
    batches, moved = [], []
    retina.update(copy.deepcopy(options))

    class Note(Hook):

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if not batches:
                moved.append(copy.deepcopy(runner.model.state_dict()))
            batches.append(copy.deepcopy(data_batch))

        def after_train_iter(self, runner, *args, **kwargs):
            moved.append(copy.deepcopy(runner.model.state_dict()))

    runner = make_runner(
        copy.deepcopy(retina),
        data,
        tmp_path,
        epochs=1,
        param_scheduler=None,
        optim_wrapper=dict(
            accumulative_counts=2, optimizer=dict(type='SGD', lr=0.1)))
    runner.register_hook(Note())
    runner.train()
    assert_same(moved[1], moved[0])  # the first batch moves nothing
    model = build_distiller(retina['student'], retina['teacher'],
                            **options).train()
    model.load_state_dict(moved[0])
    for inputs in batches[:2]:
        losses = model(**model.data_preprocessor(inputs, True), mode='loss')
        (total(losses) / 2).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            # One addition in another order.
            torch.testing.assert_close(
                moved[2][name], moved[0][name] - 0.1 * p.grad, msg=name)
    assert model.bbox_head.retina_cls.weight.grad.abs().sum() > 0


def test_amp_optim_wrapper_in_bfloat16(data, retina, tmp_path, monkeypatch):
    """Mixed precision trains; MMEngine only has to be let onto the CPU."""
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available',
        lambda: True)
    runner = train(
        dict(retina, mimic_loss=MIMIC, feature_loss=FEATURES),
        data,
        tmp_path,
        optim_wrapper=dict(
            type='AmpOptimWrapper',
            dtype='bfloat16',
            loss_scale=1.,
            optimizer=dict(type='SGD', lr=0.01)))
    scalars = runner.message_hub.log_scalars
    for name in ('inter', 'intra', 'mimic', 'feature_inter', 'feature_intra'):
        history = scalars[f'train/loss_kd_{name}'].data[0]
        assert len(history) == 6
        assert all(torch.tensor(float(v)).isfinite() for v in history)
    plain = build(detector('retina'))
    assert not torch.equal(runner.model.bbox_head.retina_cls.weight,
                           plain.bbox_head.retina_cls.weight)


def test_other_class_names_than_the_teachers_are_refused(data, tmp_path):
    """The checkpoint's class names are compared before the first step."""
    teacher = save_teacher(
        detector('retina'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=('disc', 'circle', 'bar'))))
    runner = make_runner(
        distiller_cfg(detector('retina'), teacher), data, tmp_path / 'run')
    with refused(
            'model.teacher.class_map',
            "label 1 is 'circle' for the teacher and 'square' in the data"):
        runner.train()
    assert not list((tmp_path / 'run').glob('*.pth'))


def train_with_classes(data, tmp_path, listed, split='train', **teacher):
    """Train on the toy data with other ``metainfo``, for three iterations."""
    cfg = run_cfg(
        distiller_cfg(detector('retina'), teacher),
        data,
        tmp_path / 'run',
        epochs=1,
        val_cfg=dict())
    cfg.val_dataloader = copy.deepcopy(cfg.test_dataloader)
    cfg.val_evaluator = cfg.test_evaluator
    cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=listed)
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def teacher_trained_on(data, tmp_path, listed):
    """`model.teacher` of a config whose data are at hand, and of a checkpoint
    with the names of its ``metainfo``, as MMEngine writes it."""
    cfg = run_cfg(detector('retina'), data, tmp_path)
    cfg.train_dataloader.dataset.metainfo = dict(classes=listed)
    cfg.dump(str(tmp_path / 'teacher.py'))
    saved = save_teacher(
        cfg.model, tmp_path, meta=dict(dataset_meta=dict(classes=listed)))
    return dict(saved, config=str(tmp_path / 'teacher.py'))


def test_class_names_are_those_of_the_training_set(data, tmp_path):
    """The validation set may name its classes in another order."""
    teacher = save_teacher(
        detector('retina'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=CLASSES)))
    runner = train_with_classes(
        data, tmp_path, CLASSES[::-1], split='val', **teacher)
    assert runner.iter == 3


@pytest.mark.parametrize('class_map', [None, [0, 1]])
def test_a_head_of_fewer_classes_than_the_data_is_refused(
        data, tmp_path, class_map):
    """MMDetection would train the last class as background."""
    heads = dict(bbox_head=dict(num_classes=2))
    teacher = save_teacher(detector('retina', **heads), tmp_path)
    model = distiller_cfg(
        detector('retina', **heads), dict(teacher, class_map=class_map))
    with refused('train_dataloader.dataset',
                 '3 classes but model.student predicts 2; set num_classes'):
        train(model, data, tmp_path / 'run', epochs=1)


@pytest.mark.parametrize('class_map', [None, 'names', list(CLASSES)])
@pytest.mark.parametrize('names_t', [CLASSES, CLASSES[::-1]])
def test_names_that_contradict_the_labels_are_refused(data, tmp_path, names_t,
                                                      class_map):
    """A file that numbers classes otherwise than ``metainfo`` lists them.

    What labels the teacher's names stand for is not known then.
    """
    teacher = save_teacher(
        detector('retina'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=names_t)))
    with refused(
            'train_dataloader.dataset',
            "label 0 is 'bar' in metainfo.classes but 'disc' in the "
            'data.* list metainfo.classes in the order of the data, or the '
            "teacher's labels in model.teacher.class_map"):
        train_with_classes(
            data, tmp_path, CLASSES[::-1], class_map=class_map, **teacher)
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_a_map_of_labels_needs_no_names(data, tmp_path):
    """The way out for a teacher whose data are not at hand."""
    teacher = save_teacher(
        detector('retina'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=CLASSES[::-1])))
    runner = train_with_classes(
        data, tmp_path, CLASSES[::-1], class_map=[0, 1, 2], **teacher)
    assert runner.iter == 3 and runner.model.distillation.tap.class_map == [
        0, 1, 2
    ]


@pytest.mark.parametrize('listed_t, listed_s', [
    (CLASSES, CLASSES),
    (CLASSES[::-1], CLASSES[::-1]),
    (CLASSES[::-1], CLASSES),
])
@pytest.mark.parametrize('class_map, expected', [(None, None),
                                                 ('names', [0, 1, 2])])
def test_labels_are_those_of_the_data(data, tmp_path, listed_t, listed_s,
                                      class_map, expected):
    """Where those of the teacher are at hand, too: all number by one file."""
    teacher = teacher_trained_on(data, tmp_path, listed_t)
    runner = train_with_classes(
        data, tmp_path, listed_s, class_map=class_map, **teacher)
    assert runner.iter == 3
    assert runner.model.distillation.tap.class_map == expected


def test_a_teacher_of_another_file_is_mapped_by_its_labels(data, tmp_path):
    """Its file numbers otherwise than its ``metainfo`` lists."""
    other = write_coco(tmp_path / 'other', classes=CLASSES[::-1])
    teacher = teacher_trained_on(other, tmp_path, CLASSES)
    with refused('model.teacher.class_map',
                 "label 0 is 'bar' for the teacher and 'disc'"):
        train_with_classes(data, tmp_path, CLASSES, **teacher)
    runner = train_with_classes(
        data, tmp_path, CLASSES, class_map='names', **teacher)
    assert runner.model.distillation.tap.class_map == [2, 1, 0]


def test_the_teachers_class_names_are_accepted(data, tmp_path):
    """The same names train, also as MMDetection 1 would have spelt them."""
    names = [name.capitalize() for name in CLASSES]
    teacher = save_teacher(
        detector('retina'),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=names)))
    model = distiller_cfg(detector('retina'), teacher)
    assert train(model, data, tmp_path / 'run', epochs=1).iter == 3


@pytest.mark.parametrize('name', ['retina', 'faster'])
def test_a_teacher_of_more_classes_teaches_some_by_name(data, tmp_path, name):
    """COCO's kind of teacher; the names are looked up in the training set."""
    many = ('bar', 'tree', 'disc', 'sky', 'square')
    heads = dict(
        retina=dict(bbox_head=dict(num_classes=5)),
        faster=dict(roi_head=dict(bbox_head=dict(num_classes=5))))
    teacher = save_teacher(
        detector(name, **heads[name]),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=many)))
    model = distiller_cfg(detector(name), dict(teacher, class_map='names'))
    runner = train(model, data, tmp_path / 'run', epochs=1)
    assert runner.iter == 3
    assert runner.model.distillation.tap.class_map == [2, 4, 0]


def test_names_that_the_teacher_lacks_are_refused(data, tmp_path):
    """Before the first step, naming what does not match."""
    teacher = save_teacher(
        detector('retina', bbox_head=dict(num_classes=5)),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=('disc', 'a', 'b', 'c', 'd'))))
    model = distiller_cfg(detector('retina'), dict(teacher, class_map='names'))
    with refused('model.teacher.class_map', "no class 'square', 'bar'"):
        train(model, data, tmp_path / 'run', epochs=1)
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_names_of_some_of_a_teachers_classes_are_refused(tmp_path):
    """They would be taken for the first ones."""
    teacher = save_teacher(
        detector('retina', bbox_head=dict(num_classes=5)),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=('disc', 'bar', 'square'))))
    for class_map in ('names', ['disc', 'bar', 'square'], ['disc', 1, 2]):
        refuse(
            detector('retina'), dict(teacher, class_map=class_map),
            'model.teacher.class_map',
            'predicts 5 classes and names 3: disc, bar, square')
    build_distiller(detector('retina'), dict(teacher, class_map=[0, 1, 4]))


def test_names_of_a_smaller_teacher_are_refused(tmp_path):
    """When the model is built: no training set can have them all."""
    teacher = save_teacher(
        detector('retina', bbox_head=dict(num_classes=2)),
        tmp_path,
        meta=dict(dataset_meta=dict(classes=('disc', 'bar'))))
    refuse(
        detector('retina'), dict(teacher,
                                 class_map='names'), 'model.teacher.class_map',
        'all 3 classes that model.student predicts.* has 2: disc, bar')


@pytest.mark.parametrize('class_map,match', [
    ([0, 1], 'has 2 classes but model.student predicts 3'),
    ([0, 1, 9], 'names the class 9, but .*teacher predicts 5'),
    ([0, 1, 1], 'more than once'),
])
def test_maps_that_do_not_fit_are_refused(tmp_path, class_map, match):
    """When the model is built."""
    teacher = save_teacher(
        detector('retina', bbox_head=dict(num_classes=5)), tmp_path)
    refuse(
        detector('retina'), dict(teacher, class_map=class_map),
        'model.teacher.class_map', match)


# Inputs that must be refused, and what the sentence must name.


def refuse(student, teacher, field, *words, **options):
    """Building the model ends with one sentence about a field."""
    with refused(field, *words):
        build_distiller(student, teacher, **options)


def do_not_fit(student, teacher, match, **options):
    """Building the model ends with one sentence, which names the field."""
    with pytest.raises(ConfigError, match=match) as info:
        build_distiller(student, teacher, **options)
    assert '\n' not in str(info.value)


def test_no_checkpoint_is_refused():
    """Neither left out, nor None, nor empty."""
    config = detector('retina')
    refuse(config, dict(config=config), 'model.teacher',
           r'must be dict\(config')
    for nothing in (None, ''):
        refuse(config, dict(config=config, checkpoint=nothing),
               'model.teacher.checkpoint', 'must name a file')


@pytest.mark.parametrize('fields', [
    dict(alhpa=1.),
    dict(backbone=dict(type='ResNet'), neck=None),
])
def test_unknown_fields_are_refused(retina_teacher, fields):
    """Misspelt ones, and those of a base config without `_delete_`."""
    refuse(
        detector('retina'), retina_teacher, f'model.{[*fields][0]}',
        ', '.join(map(repr, fields)), '_delete_=True', **fields)


def test_no_teacher_config_is_refused(retina_teacher):
    """The checkpoint alone does not say what the teacher is."""
    del (teacher := copy.deepcopy(retina_teacher))['config']
    refuse(detector('retina'), teacher, 'model.teacher', 'must be dict')


def test_missing_checkpoint_is_refused():
    """The file is named."""
    teacher = dict(config=detector('retina'), checkpoint='/no/such.pth')
    refuse(
        detector('retina'), teacher, 'model.teacher.checkpoint',
        '/no/such.pth')


def test_missing_config_is_refused(retina_teacher):
    """Of the student and of the teacher."""
    refuse('no/such.py', retina_teacher, 'model.student', 'no/such.py')
    refuse('mmdet::no/such.py', retina_teacher, 'model.student',
           'mmdet::no/such.py')
    refuse(
        detector('retina'), dict(retina_teacher, config='no/such.py'),
        'model.teacher.config', 'no/such.py')


def test_truncated_checkpoint_is_refused(retina_teacher, tmp_path):
    """Half a file cannot be read."""
    path = tmp_path / 'half.pth'
    with open(retina_teacher['checkpoint'], 'rb') as whole:
        path.write_bytes(whole.read()[:100000])
    refuse(
        detector('retina'), dict(retina_teacher, checkpoint=str(path)),
        'model.teacher.checkpoint', 'half.pth.* cannot be read')


def test_partial_checkpoint_is_refused(retina_teacher, tmp_path):
    """A backbone alone leaves the head random."""
    path = tmp_path / 'backbone.pth'
    weights = torch.load(retina_teacher['checkpoint'])['state_dict']
    torch.save({
        k: v
        for k, v in weights.items() if k.startswith('backbone')
    }, path)
    refuse(
        detector('retina'), dict(retina_teacher, checkpoint=str(path)),
        'model.teacher.checkpoint',
        r'does not cover .*keys are missing, first neck\.')


def test_a_checkpoint_of_other_shapes_is_refused(retina_teacher):
    """The layer is named."""
    teacher = dict(
        retina_teacher,
        config=detector('retina', bbox_head=dict(num_classes=4)))
    refuse(
        detector('retina', bbox_head=dict(num_classes=4)), teacher,
        'model.teacher.checkpoint', 'does not fit its config.*retina_cls')


PAIRS = [
    ('retina', 'faster', 'model.teacher.config.* is a FasterRCNN'),
    ('faster', 'retina', 'model.teacher.config.* is a RetinaNet'),
    ('fcos', 'rtmdet', r'nothing pairs with \[64, 128\]'),
]


@pytest.mark.parametrize('student,teacher,match', PAIRS)
def test_pairs_that_do_not_fit_are_refused(student, teacher, match, tmp_path):
    """Kinds and strides; the sentence names the field."""
    do_not_fit(
        detector(student), save_teacher(detector(teacher), tmp_path), match)


@pytest.mark.parametrize('name,head', [
    ('retina', dict(bbox_head=dict(num_classes=5))),
    ('faster', dict(roi_head=dict(bbox_head=dict(num_classes=5)))),
])
def test_differing_class_counts_are_refused(name, head, tmp_path):
    """Both counts are named."""
    teacher = save_teacher(detector(name, **head), tmp_path)
    do_not_fit(
        detector(name), teacher,
        'model.teacher.* predicts 5 classes but model.student predicts 3')


def test_rpn_student_is_refused(retina_teacher):
    """A proposal network has no class logits."""
    model = detector('faster')
    model['type'] = 'RPN'
    del model['roi_head']
    do_not_fit(model, retina_teacher, 'model.student.* is a RPN')


def test_rpn_teacher_is_refused(tmp_path):
    """Nor can it teach any."""
    model = detector('faster')
    model['type'] = 'RPN'
    del model['roi_head']
    do_not_fit(
        detector('retina', bbox_head=dict(num_classes=1)),
        save_teacher(model, tmp_path), 'model.teacher.config.* is a RPN')


SEGMENTOR = 'mmseg::fcn/fcn_r18-d8_4xb2-80k_cityscapes-769x769.py'


def test_a_segmentor_as_student_is_refused(retina_teacher):
    """Its kind is named, and what DistillDetector distils."""
    pytest.importorskip('mmseg')
    refuse(_segmentor(), retina_teacher, 'model.student',
           'is a EncoderDecoder, but DistillDetector distils '
           'mmdet models')


def test_a_segmentor_as_teacher_is_refused(tmp_path):
    """Even with a checkpoint that fits it."""
    pytest.importorskip('mmseg')
    from mmdist.models.teacher import build_model

    path = str(tmp_path / 'segmentor.pth')
    torch.save(build_model(_segmentor(), 'x')[0].state_dict(), path)
    refuse(
        detector('retina'), dict(config=_segmentor(), checkpoint=path),
        'model.teacher.config', 'is a EncoderDecoder, but DistillDetector')


def _segmentor():
    import mmseg
    folder = osp.join(osp.dirname(mmseg.__file__), '.mim', 'configs', 'fcn')
    name = sorted(n for n in os.listdir(folder) if '_r18-d8_' in n)[0]
    return f'mmseg::fcn/{name}'


def test_a_segmentors_dict_is_refused(retina_teacher):
    """A model dict of MMSegmentation, its scope spelt out."""
    pytest.importorskip('mmseg')
    model = dict(
        type='mmseg.EncoderDecoder',
        backbone=dict(type='mmseg.ResNet', depth=18),
        decode_head=dict(
            type='mmseg.FCNHead',
            in_channels=512,
            channels=8,
            in_index=3,
            num_classes=3))
    refuse(model, retina_teacher, 'model.student', 'is a EncoderDecoder')


@pytest.mark.parametrize('options,match', [
    (dict(distill_loss=dict(type='mmdist.NoLoss')),
     'model.distill_loss: .*NoLoss'),
    (dict(distill_loss=dict(type='mmdist.DISTLoss', betta=1.)),
     'model.distill_loss: .*betta'),
    (dict(distill_loss=dict(type='mmdist.DISTLoss', beta=-1.)),
     'distill_loss.beta.* must be'),
    (dict(
        distill_loss=dict(
            type='mmdist.MimicLoss',
            student_channels=[1],
            teacher_channels=[1])), 'model.distill_loss'),
    (dict(distill_loss=dict(beta=1.)), 'model.distill_loss: .*type'),
    (dict(mimic_loss=dict(type='mmdist.DISTLoss')), 'model.mimic_loss'),
    (dict(mimic_loss=dict(MIMIC, weight=1.)), 'model.mimic_loss: .*weight'),
    (dict(alpha=-1.), 'model.alpha.* must be'),
    (dict(alpha='1'), 'model.alpha.* must be'),
    (dict(tap=dict(anchor_as_row=True)), 'model.tap: .*anchor_as_row'),
])
def test_wrong_options_are_refused(retina_teacher, options, match):
    """The field of the user's config is named."""
    do_not_fit(detector('retina'), retina_teacher, match, **options)


def test_an_unknown_key_of_the_model_is_refused(retina_teacher):
    """A misspelt argument of the wrapper is named."""
    refuse(
        detector('retina'),
        retina_teacher,
        'model.distil_loss',
        distil_loss=dict(type='mmdist.DISTLoss'))


def test_an_unknown_key_of_the_teacher_is_refused(retina_teacher):
    """A misspelt key of `teacher` is named."""
    refuse(
        detector('retina'), dict(retina_teacher, ckpt='x'), 'model.teacher',
        'ckpt')


def test_mimic_of_other_strides_is_refused(tmp_path):
    """As many levels, but of other sizes."""
    model = detector('faster', neck=dict(start_level=1))
    teacher = save_teacher(detector('faster'), tmp_path)
    do_not_fit(
        model,
        teacher,
        r'the sizes \[\[16, 16\], .*give model.student.neck',
        mimic_loss=MIMIC)


@pytest.mark.parametrize('scheme', ['torchvision', 'open-mmlab', 's3'])
def test_checkpoints_that_are_read_without_protection_are_refused(
        retina_teacher, scheme):
    """MMEngine's own loaders of these run code from the file."""
    refuse(
        detector('retina'),
        dict(retina_teacher, checkpoint=f'{scheme}://resnet50'),
        'model.teacher.checkpoint', 'only http and https are')


def test_mimic_of_differing_levels_is_refused(tmp_path):
    """Four levels cannot imitate five."""
    model = detector('faster', neck=dict(num_outs=4))
    model['rpn_head']['anchor_generator']['strides'] = [4, 8, 16, 32]
    teacher = save_teacher(detector('faster'), tmp_path)
    do_not_fit(
        model,
        teacher,
        'mimic_loss.teacher_channels: it has 5 levels, but .* has 4',
        mimic_loss=MIMIC)
