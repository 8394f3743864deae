"""What users get wrong: it works, or one sentence says what to change.

Every case changes one thing of a config that trains, or of its files.
"""
import json
import os
import os.path as osp
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from safetensors.torch import save_file

from mmdist import ConfigError
from tests.helpers import (ZOO, build, detector, distiller_cfg, run_cfg,
                           save_teacher, write_coco, write_new_style)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TRAIN = osp.join(ROOT, 'tools', 'train.py')
NAN = float('nan')
SEGMENTOR = osp.join(
    ZOO.replace('mmdet', 'mmseg'), 'pspnet',
    'pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """The folder of a data set, and the teacher of a config."""
    root = tmp_path_factory.mktemp('bad')
    return write_coco(root / 'data'), save_teacher(detector('retina'), root)


@pytest.fixture
def cfg(files, tmp_path):
    """A config that trains an epoch."""
    data, teacher = files
    cfg = run_cfg(
        distiller_cfg(detector('retina'), dict(teacher)), data, tmp_path, 1)
    cfg.pop('experiment_name')
    cfg.work_dir = str(tmp_path / 'run')
    return cfg


@pytest.fixture
def train(cfg, tmp_path, monkeypatch):
    """Train; return the error that ends the tool, else None."""

    def train(path=None, *arguments):
        if path is None:
            path = tmp_path / 'toy.py'
            cfg.dump(str(path))
        arguments = [
            str(path), '--work-dir',
            str(tmp_path / 'run'), *arguments
        ]
        monkeypatch.setattr(sys, 'argv', [TRAIN, *map(str, arguments)])
        monkeypatch.setattr('time.strftime', lambda *_: f'{tmp_path.name}')
        try:
            runpy.run_path(TRAIN, run_name='__main__')
        except Exception as error:
            return error

    (tmp_path / 'run').mkdir()
    for name in ('toy.py', 'epoch_9.pth', 'notes.txt'):
        (tmp_path / 'run' / name).write_text(f'of an earlier run: {name}')
    return train


def assert_refused(error, field, words, tmp_path):
    """The field and these words are named, and nothing was trained or changed.

    Without a field it is MMEngine that refuses.
    """
    assert error is not None, 'it trained'
    said = str(error)
    if field:
        assert isinstance(error, ConfigError), repr(error)
        assert field in error.field, said
    for word in words:
        assert word in said
    assert '\n' not in said or not field
    run = tmp_path / 'run'
    kept = [p for p in run.iterdir() if p.is_file()]
    assert sorted(p.name
                  for p in kept) == ['epoch_9.pth', 'notes.txt', 'toy.py']
    for path in kept:
        assert path.read_text() == f'of an earlier run: {path.name}'
    assert not [
        line for log in run.rglob('scalars.json')
        for line in log.read_text().split('\n') if 'loss' in line
    ]


def put(field, value):
    """A change that sets a field of the config, by its dotted name."""

    def change(cfg, root):
        cfg.merge_from_dict({field: value})

    return change


def option(text):
    """A change on the command line: a file cannot hold nan or inf."""
    return lambda cfg, root: ['--cfg-options', text]


def drop(field):
    """A change that leaves a field out."""

    def change(cfg, root):
        *owners, name = field.split('.')
        for owner in owners:
            cfg = cfg[owner]
        cfg.pop(name)

    return change


def add(field, **items):
    """A change that adds items to a dict of the config."""

    def change(cfg, root):
        for owner in field.split('.'):
            cfg = cfg[owner]
        cfg.update(items)

    return change


def replace(field, value):
    """A change that replaces a dict of the config, which would be merged."""

    def change(cfg, root):
        *owners, name = field.split('.')
        for owner in owners:
            cfg = cfg[owner]
        cfg[name] = value

    return change


def checkpoint(write, name='other.pth'):
    """A change that writes another checkpoint from the teacher's weights."""

    def change(cfg, root):
        path = str(root / name)
        weights = torch.load(cfg.model.teacher.checkpoint)['state_dict']
        write(weights, path)
        cfg.model.teacher.checkpoint = path

    return change


def text(content):
    """Writes a text where weights belong."""

    def write(_, path):
        with open(path, 'w') as file:
            file.write(content)

    return write


def half(save):
    """Writes by another function, and loses the second half."""

    def write(weights, path):
        save(weights, path)
        os.truncate(path, osp.getsize(path) // 2)

    return write


def content(of):
    """Writes what a function makes of the weights."""
    return lambda weights, path: torch.save(of(weights), path)


def prefixed(weights, **more):
    """The names that DDP and MMEngine's EMA give the weights."""
    return {**{f'module.{k}': v for k, v in weights.items()}, **more}


def other_model(name, **override):
    """Writes the checkpoint of another detector."""
    return lambda _, path: torch.save(
        build(detector(name, **override)).state_dict(), path)


def teacher_of(name, **override):
    """A change to a whole other teacher."""

    def change(cfg, root):
        cfg.model.teacher = save_teacher(detector(name, **override), root)

    return change


def config_file(content):
    """A change that names a file as the config of the teacher."""

    def change(cfg, root):
        path = root / 'teacher.py'
        path.write_text(content)
        cfg.model.teacher.config = str(path)

    return change


def new_style(field, scope='mmdet', edit=str):
    """A change to a new-style config for the student or the teacher."""

    def change(cfg, root):
        model = cfg.model.student.to_dict() if scope == 'mmdet' else (
            Config.fromfile(SEGMENTOR).model.to_dict())
        path = root / 'new.py'
        write_new_style(Config(dict(model=model, default_scope=scope)), path)
        path.write_text(edit(path.read_text()))
        replace(field, str(path))(cfg, root)

    return change


def annotations(edit, part='train_dataloader'):
    """A change of the annotations, in a file of their own."""

    def change(cfg, root):
        dataset = cfg[part].dataset
        with open(osp.join(dataset.data_root, 'coco.json')) as file:
            coco = json.load(file)
        coco = edit(coco) or coco
        path = root / 'other.json'
        path.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        dataset.ann_file = str(path)

    return change


def both(*changes):
    """Several changes, one after the other."""

    def change(cfg, root):
        for part in changes:
            part(cfg, root)

    return change


def no_boxes(coco):
    """Images without objects."""
    coco['annotations'] = []


def no_pictures(coco):
    """Nothing at all."""
    coco['images'], coco['annotations'] = [], []


def some_boxes(coco):
    """One image has objects, the others have none."""
    coco['annotations'] = coco['annotations'][:2]


def reversed_categories(coco):
    """The file numbers the classes in another order."""
    coco['categories'].reverse()


def joined(**second):
    """The data set twice, the second time with other metainfo."""

    def change(cfg, root):
        first = dict(cfg.train_dataloader.dataset, indices=[0, 1, 2])
        metainfo = {**first['metainfo'], **second}
        cfg.train_dataloader.dataset = dict(
            type='ConcatDataset',
            datasets=[first, dict(first, metainfo=metainfo)])

    return change


def one_class(cfg, root):
    """A forgotten comma: the name is a string, and no tuple."""
    head = dict(num_classes=1)
    cfg.model.teacher = save_teacher(
        detector('retina', bbox_head=head),
        root,
        meta=dict(dataset_meta=dict(classes=('disc', ))))
    cfg.model.student.bbox_head.update(head)
    for part in ('train_dataloader', 'test_dataloader'):
        cfg[part].dataset.metainfo = dict(classes=('disc'))


def one_pixel(cfg, root):
    """Images of 1 x 1, with and without objects."""
    import cv2
    data = root / 'tiny'
    write_coco(data)
    with open(data / 'coco.json') as file:
        coco = json.load(file)
    for picture in coco['images']:
        picture.update(width=1, height=1)
        cv2.imwrite(
            str(data / picture['file_name']), np.zeros((1, 1, 3), np.uint8))
    for box in coco['annotations'][:6]:
        box.update(bbox=[0, 0, 1, 1], area=1)
    coco['annotations'] = coco['annotations'][:6]
    (data / 'coco.json').write_text(json.dumps(coco))
    cfg.train_dataloader.dataset.data_root = f'{data}/'


def validated(cfg, root):
    """With a validation, as most configs have."""
    cfg.val_dataloader = cfg.test_dataloader
    cfg.val_evaluator = cfg.test_evaluator
    cfg.val_cfg = dict()


FILTER = add('train_dataloader.dataset', filter_cfg=dict(filter_empty_gt=True))
CHECKPOINT, CONFIG = 'model.teacher.checkpoint', 'model.teacher.config'
LOSS, DATA = 'model.distill_loss', 'train_dataloader.dataset'
CLASS_MAP = 'model.teacher.class_map'
# what is wrong: (the change, the field, words of the sentence)
REFUSED = {
    # the teacher and its files
    'no teacher': (drop('model.teacher'), 'model.teacher', 'must be given'),
    'teacher is a path': (replace('model.teacher', 'a.pth'), 'model.teacher'),
    'no teacher.config': (drop(CONFIG), 'model.teacher', 'config'),
    'no teacher.checkpoint': (drop(CHECKPOINT), 'model.teacher', 'checkpoint'),
    'checkpoint None': (put(CHECKPOINT, None), CHECKPOINT, 'random'),
    'checkpoint empty name': (put(CHECKPOINT, ''), CHECKPOINT, 'random'),
    'checkpoint a number': (put(CHECKPOINT, 3), CHECKPOINT),
    'checkpoint missing': (put(CHECKPOINT, '/no/such.pth'), CHECKPOINT,
                           '/no/such.pth', 'does not exist'),
    'checkpoint a folder': (put(CHECKPOINT, '/'), CHECKPOINT, 'folder'),
    'checkpoint of another protocol':
    (put(CHECKPOINT, 's3://a/b.pth'), CHECKPOINT, 'http'),
    'checkpoint of no server': (put(CHECKPOINT, 'http://127.0.0.1:9/b.pth'),
                                CHECKPOINT, 'cannot be downloaded'),
    'checkpoint of 0 bytes': (checkpoint(text('')), CHECKPOINT),
    'checkpoint truncated':
    (checkpoint(half(torch.save)), CHECKPOINT, 'truncated'),
    'safetensors truncated':
    (checkpoint(half(save_file), 'a.safetensors'), CHECKPOINT, 'truncated'),
    'safetensors under another name':
    (checkpoint(save_file), CHECKPOINT, 'truncated or no PyT'),
    'checkpoint is JSON': (checkpoint(text('{"state_dict": {}}')), CHECKPOINT,
                           'no PyTorch checkpoint'),
    'checkpoint is a web page': (checkpoint(text('<!DOCTYPE html>')),
                                 CHECKPOINT, 'no PyTorch checkpoint'),
    'checkpoint is a list': (checkpoint(content(list)), CHECKPOINT, 'list'),
    'checkpoint is a tensor': (checkpoint(content(lambda _: torch.ones(3))),
                               CHECKPOINT, 'Tensor'),
    'checkpoint is a model': (checkpoint(content(lambda _: torch.nn.ReLU())),
                              CHECKPOINT, 'torch.nn', 'trust_checkpoint'),
    'checkpoint without weights': (checkpoint(content(lambda _: {})),
                                   CHECKPOINT, 'keys are missing'),
    'checkpoint of an optimizer':
    (checkpoint(content(lambda _: dict(optimizer=dict(state={})))), CHECKPOINT,
     'keys are missing'),
    'state_dict of words':
    (checkpoint(content(lambda w: dict(state_dict={k: k
                                                   for k in w}))), CHECKPOINT),
    'state_dict by number':
    (checkpoint(content(lambda w: dict(state_dict=dict(enumerate(w))))),
     CHECKPOINT, 'by name'),
    'checkpoint of a backbone': (checkpoint(
        content(lambda w: {
            k: v
            for k, v in w.items() if 'backbone' in k
        })), CHECKPOINT, 'keys are missing'),
    'checkpoint of another detector': (checkpoint(other_model('faster')),
                                       CHECKPOINT, 'its config'),
    'checkpoint of another width':
    (checkpoint(other_model('retina', bbox_head=dict(feat_channels=8))),
     CHECKPOINT, 'size mismatch', 'its config'),
    'checkpoint of other classes':
    (checkpoint(other_model('retina', bbox_head=dict(num_classes=5))),
     CHECKPOINT, 'retina_cls', 'its config'),
    'checkpoint with nan': (checkpoint(
        content(lambda w: {
            k: v * NAN
            for k, v in w.items()
        })), CHECKPOINT, 'inf or nan'),
    'unknown key of teacher': (put('model.teacher.checkpont',
                                   'a.pth'), 'model.teacher', 'checkpont'),
    'unknown dtype': (put('model.teacher.dtype',
                          'int8'), 'model.teacher.dtype', 'int8'),
    'teacher.config missing': (put(CONFIG,
                                   'no/such.py'), CONFIG, 'no/such.py'),
    'teacher.config of no package': (put(CONFIG,
                                         'mmdett::a.py'), CONFIG, 'mmdett'),
    'teacher.config not in package': (put(CONFIG, 'mmdet::retina/no.py'),
                                      CONFIG, 'retina/no.py'),
    'teacher.config a folder': (put(CONFIG, '/'), CONFIG),
    'teacher.config a number': (put(CONFIG, 7), CONFIG),
    'teacher.config is no Python': (config_file('model = dict('), CONFIG),
    'teacher.config without model': (config_file('models = dict()'), CONFIG,
                                     'model'),
    'teacher.config of another library':
    (config_file("model = dict(type='ResNet18', num_classes=3)"), CONFIG,
     'ResNet18'),
    'teacher.config of mmseg': (put(CONFIG,
                                    SEGMENTOR), CHECKPOINT, 'its config'),
    'new-style teacher.config of mmseg': (new_style(CONFIG, 'mmseg'),
                                          CHECKPOINT, 'its config'),
    'new-style teacher.config of an unknown class': (new_style(
        CONFIG, edit=lambda text: text.replace('RetinaNet', 'RetinaNett')), '',
                                                     'RetinaNett',
                                                     'new.py, line'),
    'teacher with other classes': (teacher_of(
        'retina', bbox_head=dict(num_classes=5)), CLASS_MAP, 'num_classes'),
    'teacher of other levels': (teacher_of(
        'retina',
        neck=dict(start_level=2),
        bbox_head=dict(anchor_generator=dict(strides=[16, 32, 64, 128, 256]))),
                                'model.teacher', 'strides'),
    'teacher of another kind': (teacher_of('faster'), CONFIG),
    'class_map is a word': (put('model.teacher.class_map',
                                'name'), CLASS_MAP, 'names'),
    'class_map too short': (put('model.teacher.class_map', [0, 1]), CLASS_MAP),
    'class_map beyond the classes': (put('model.teacher.class_map',
                                         [0, 1, 9]), CLASS_MAP, '9'),
    'class_map with a class twice': (put('model.teacher.class_map',
                                         [0, 1, 1]), CLASS_MAP, '1'),
    'teacher of grey images': (teacher_of(
        'retina',
        backbone=dict(in_channels=1),
        data_preprocessor=dict(mean=[128.], std=[64.], bgr_to_rgb=False)),
                               CONFIG, '1 channels', 'in_channels'),
    'checkpoint of two models': (checkpoint(
        content(
            lambda w: {
                f'{model}.{k}': v
                for model in ('student', 'teacher')
                for k, v in w.items()
            })), CHECKPOINT, "'student.' and 'teacher.'"),
    'checkpoint of unknown names': (checkpoint(
        content(lambda w: {
            f'my_{k}': v
            for k, v in w.items()
        })), CHECKPOINT, 'are like my_backbone'),
    # the student
    'no student': (drop('model.student'), 'model.student', 'must be given'),
    'student a number': (replace('model.student', 7), 'model.student'),
    'student missing': (replace('model.student',
                                'no/such.py'), 'model.student', 'no/such.py'),
    'student of mmseg': (replace('model.student', SEGMENTOR), 'model.student'),
    'student of no type': (drop('model.student.type'), 'model.student'),
    'student of an unknown type': (put('model.student.type', 'RetinaNett'),
                                   'model.student', 'RetinaNett'),
    'student with a misspelt field': (put('model.student.bbox_head.num_clases',
                                          3), 'model.student', 'num_clases'),
    'student is an RPN': (replace(
        'model.student', osp.join(ZOO, 'rpn',
                                  'rpn_r50_fpn_1x_coco.py')), 'model.student'),
    # the losses
    'no loss': (drop(LOSS), LOSS, 'must be given'),
    'loss is a name': (replace(LOSS, 'mmdist.DISTLoss'), LOSS),
    'loss of an unknown type': (put(f'{LOSS}.type', 'mmdist.DisLoss'), LOSS,
                                'DisLoss', 'write mmdist.DISTLoss'),
    'loss of another library': (put(f'{LOSS}.type',
                                    'PKDLoss'), LOSS, 'custom_imports'),
    'loss of mmdet': (replace(LOSS, dict(type='mmdet.FocalLoss')), LOSS),
    'unknown key of the loss': (put(f'{LOSS}.betta', 1.), LOSS, 'betta',
                                'takes beta, gamma, tau'),
    'loss without its scope': (replace(LOSS, dict(type='KDLoss')), LOSS,
                               'write mmdist.KDLoss'),
    'unknown key of a loss by its place': (replace(
        LOSS, dict(type='mmdist.models.losses.DISTLoss',
                   betta=1.)), LOSS, 'betta', 'takes beta, gamma'),
    'loss of the name of a module': (replace(LOSS, dict(type='models')), LOSS,
                                     'models'),
    'loss without a type': (replace(LOSS, dict(beta=1.)), LOSS, '`type`'),
    'mimic as the loss on logits': (replace(LOSS,
                                            dict(type='mmdist.MimicLoss')),
                                    LOSS, 'no loss on logits'),
    'beta nan': (option(f'{LOSS}.beta=nan'), 'distill_loss.beta', 'finite'),
    'beta inf': (option(f'{LOSS}.beta=inf'), 'distill_loss.beta', 'finite'),
    'gamma negative': (put(f'{LOSS}.gamma',
                           -1.), 'distill_loss.gamma', '>= 0'),
    'gamma a word': (put(f'{LOSS}.gamma',
                         'one'), 'distill_loss.gamma', 'number'),
    'tau 0': (put(f'{LOSS}.tau', 0.), 'distill_loss.tau', '> 0'),
    'tau negative': (put(f'{LOSS}.tau', -4.), 'distill_loss.tau', '> 0'),
    'tau nan': (option(f'{LOSS}.tau=nan'), 'distill_loss.tau', 'tau',
                'finite'),
    'alpha nan': (option('model.alpha=nan'), 'model.alpha', 'finite'),
    'alpha negative': (put('model.alpha', -1.), 'model.alpha', '>= 0'),
    'unknown key of mimic': (put('model.mimic_loss',
                                 dict(type='mmdist.MimicLoss', weigth=1.)),
                             'model.mimic_loss', 'weigth'),
    # the wrapper
    'wrapper misspelt': (put('model.type',
                             'mmdist.DistilDetector'), '', 'DistilDetector'),
    'unknown field': (put('model.alfa', 1.), 'model.alfa', 'alpha'),
    'tap without its options': (put('model.tap',
                                    'boxes'), 'model.tap', 'dict'),
    "field of the student's": (put('model.bbox_head.num_classes',
                                   3), 'model.bbox_head', 'bbox_head',
                               'into model.student'),
    'unknown option of the tap': (put('model.tap', dict(anchor_rows=True)),
                                  'model.tap', 'anchor_rows'),
    'align of another name': (put('model.tap',
                                  dict(align='box')), 'model.tap', 'align'),
    'strict_teacher a word': (put('model.strict_teacher',
                                  'no'), 'model.strict_teacher'),
    # the data
    'annotations missing': (put(f'{DATA}.ann_file',
                                'no.json'), DATA, 'no.json'),
    'annotations of 0 bytes': (annotations(lambda _: ' '), DATA),
    'annotations truncated': (annotations(lambda c: json.dumps(c)[:400]),
                              DATA),
    'annotations of another format': (annotations(lambda _: '[1, 2]'), DATA),
    'no pictures': (annotations(no_pictures), DATA, 'no images'),
    'no boxes, and a filter': (both(annotations(no_boxes),
                                    FILTER), DATA, 'filter_cfg'),
    'classes of other names, and a filter': (both(
        put(f'{DATA}.metainfo.classes', ('a', 'b', 'c')),
        FILTER), DATA, 'metainfo.classes'),
    'no pictures to validate on': (both(
        validated,
        annotations(no_pictures,
                    'val_dataloader')), 'val_dataloader.dataset', 'no images'),
    'no batch': (both(
        put('train_dataloader.batch_size', 7),
        put('train_dataloader.drop_last',
            True)), 'train_dataloader', 'batch_size'),
    'classes in another order than the annotations':
    (annotations(reversed_categories), DATA,
     "label 0 is 'disc' in metainfo.classes but 'bar' in the data",
     'class_map'),
    'a class of another spelling':
    (put(f'{DATA}.metainfo.classes', ('disk', 'square', 'bar')), DATA,
     "has 'disk', which is no category of the data", 'annotation file'),
    'no class names': (drop(f'{DATA}.metainfo'), DATA, 'has 80 classes',
                       'list the classes that you have in metainfo.classes'),
    'joined data of unlike classes':
    (joined(classes=('disc', 'bar', 'square')), DATA,
     "label 1 is 'square' in one and 'bar' in another"),
    'a head of fewer classes than the data': (both(
        teacher_of('retina', bbox_head=dict(num_classes=2)),
        put('model.student.bbox_head.num_classes',
            2)), DATA, 'has 3 classes', 'predicts 2', 'num_classes'),
    # the rest of the config
    'no model': (drop('model'), 'CONFIG', 'toy.py has no `model`'),
    'no data': (drop('train_dataloader'), '', 'train_dataloader'),
    'no optimizer': (drop('optim_wrapper'), '', 'optim_wrapper'),
    'load_from missing': (put('load_from',
                              'no/such.pth'), 'load_from', 'no/such.pth'),
}
WORKS = {
    'nothing':
    put('work_dir', 'elsewhere'),
    'checkpoint of DDP':
    checkpoint(content(prefixed)),
    'checkpoint of an EMA':
    checkpoint(content(lambda w: prefixed(w, steps=torch.tensor(1)))),
    'plain weights':
    checkpoint(content(dict)),
    'safetensors':
    checkpoint(save_file, 'teacher.safetensors'),
    'checkpoint of MMRazor':
    checkpoint(
        content(lambda w: dict(state_dict={
            f'architecture.{k}': v
            for k, v in w.items()
        }))),
    'checkpoint of a compiled model':
    checkpoint(content(lambda w: {
        f'_orig_mod.{k}': v
        for k, v in w.items()
    })),
    'weights under another key':
    checkpoint(content(lambda w: dict(model=w, epoch=3))),
    'objects beside the weights':
    checkpoint(
        content(lambda w: dict(state_dict=w, schedule=torch.nn.ReLU()))),
    'joined data of unlike palettes':
    joined(palette=[(0, 0, 0)] * 3),
    'one class without a comma':
    one_class,
    'checkpoint of more than the model':
    checkpoint(content(lambda w: dict(w, more=torch.ones(1)))),
    'weights 0':
    both(put(f'{LOSS}.beta', 0.), put(f'{LOSS}.gamma', 0.)),
    'no boxes':
    annotations(no_boxes),
    'some pictures without boxes':
    annotations(some_boxes),
    'pictures of 1 x 1':
    one_pixel,
    'new-style teacher.config':
    new_style(CONFIG),
    'new-style student':
    new_style('model.student'),
    'class_map in the same order':
    put('model.teacher.class_map', [0, 1, 2]),
}


@pytest.mark.parametrize('case', list(REFUSED))
def test_one_sentence_before_training(cfg, train, tmp_path, case):
    """It names the field, and leaves an earlier run alone."""
    change, field, *words = REFUSED[case]
    arguments = change(cfg, tmp_path) or ()
    assert_refused(train(None, *arguments), field, words, tmp_path)


@pytest.mark.parametrize('content, words', [
    (None, ['no/such.py']),
    ('model = dict(', ['theirs.py', 'never closed']),
    ('import detectron2_of_another_library', ['theirs.py', 'no `model`']),
    ("_base_ = './no_base.py'", ['no_base.py']),
    ('_BASE_: Base-RetinaNet.yaml', ['theirs.py']),
    ('', ['theirs.py', 'no `model`']),
])
def test_no_config_of_ours(train, tmp_path, content, words):
    """The file itself is wrong, of another library, or not there."""
    path = tmp_path / 'no/such.py'
    if content is not None:
        path = tmp_path / 'theirs.py'
        path.write_text(content)
    assert_refused(train(path), 'CONFIG', words, tmp_path)


@pytest.mark.parametrize('flags, field, word', [
    ('--resume no/such.pth', '--resume', 'no/such.pth'),
    (f'--resume {__file__}', '--resume', 'complete'),
    ('--cfg-options train_dataloader.batch_size=0', 'train_dataloader',
     'batch_size'),
    ('--cfg-options model.distill_loss.betta=1', LOSS, 'betta'),
    ('--cfg-options model.student.bbox_head.num_classes=4',
     'model.teacher.class_map', 'num_classes'),
    ('--cfg-options train_cfg.max_epochs=many', '', 'many'),
    ('--auto-scale-lr --cfg-options auto_scale_lr=0', '', 'auto_scale_lr'),
])
def test_flags(train, tmp_path, flags, field, word):
    """What the command line adds to a config that trains."""
    assert_refused(train(None, *flags.split()), field, [word], tmp_path)


def test_work_dir_is_a_file(train, tmp_path):
    """It is left as it is."""
    (tmp_path / 'file').write_text('a file')
    error = train(None, '--work-dir', tmp_path / 'file')
    assert str(tmp_path / 'file') in str(error)
    assert (tmp_path / 'file').read_text() == 'a file'


@pytest.mark.parametrize('change, sentence', [
    (put('model.strict_teacher', 'no'), True),
    (put('model.type', 'mmdist.DistilDetector'), False),
])
def test_what_the_terminal_shows(cfg, tmp_path, change, sentence):
    """One sentence of ours, or the whole traceback of MMEngine's error."""
    change(cfg, tmp_path)
    cfg.dump(str(tmp_path / 'toy.py'))
    done = subprocess.run([sys.executable, TRAIN,
                           str(tmp_path / 'toy.py')],
                          capture_output=True,
                          cwd=tmp_path,
                          text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        'Error: model.strict_teacher: ' if sentence else 'KeyError: ')
    assert ('Traceback' not in done.stderr) == sentence


@pytest.mark.parametrize('case', list(WORKS))
def test_it_works(cfg, train, tmp_path, case):
    """What is unusual but right trains an epoch with finite losses."""
    WORKS[case](cfg, tmp_path)
    assert train() is None
    log, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    losses = [
        json.loads(line)['loss'] for line in log.read_text().split('\n')
        if line
    ]
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert (tmp_path / 'run/epoch_1.pth').is_file()
