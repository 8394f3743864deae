"""Finding configs and the facts about them."""
import os.path as osp
import sys

import mmdet
import pytest
import torch
from mmdet.models import RetinaNet
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.models import EncoderDecoder

from mmdist.utils import (data_sets_in, find_config, library_of, load_config,
                          scope_of, student_of, wrapper_for)
from ..helpers import build, detector
from ..refusals import refused

CONFIGS = osp.join(osp.dirname(mmdet.__file__), '.mim', 'configs')
RETINA = 'retinanet/retinanet_r50_fpn_1x_coco.py'
COCO_NAMES = 80
VOC = ('aeroplane', 'bicycle', 'bird')


def problem(function, *args):
    """The problem that a call is refused for, by the name of its field."""
    with refused(args[-1]) as info:
        function(*args)
    assert '. ' not in str(info.value), f'not one sentence: {info.value}'
    return info.value.problem


# find_config


def test_a_package_name_finds_the_packaged_file():
    """The file that mmdet's distribution brings, and its content."""
    path = find_config(f'mmdet::{RETINA}', 'model.student')
    assert osp.samefile(path, osp.join(CONFIGS, RETINA))
    assert Config.fromfile(path).model.type == 'RetinaNet'


def test_a_path_is_itself(tmp_path):
    """Nothing is looked up."""
    path = tmp_path / 'config.py'
    path.write_text('model = dict()')
    assert find_config(str(path), 'model.student') == str(path)


def test_a_fork_is_found_by_its_import_name(tmp_path, monkeypatch):
    """No distribution of that name is needed (or installed)."""
    folder = tmp_path / 'forked_package' / '.mim' / 'configs'
    folder.mkdir(parents=True)
    (tmp_path / 'forked_package' / '__init__.py').write_text('')
    (folder / 'a.py').write_text('model = dict()')
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    path = find_config('forked_package::a.py', 'model.student')
    assert osp.samefile(path, folder / 'a.py')
    assert 'forked_package' not in sys.modules  # found, not run


@pytest.mark.parametrize('name, reason', [
    ('no.py', 'no such config'),
    ('/no/such/config.py', 'no such config'),
    ('.', 'is a folder, not a config'),
    ('mmdet::retinanet/no.py', 'no such config'),
    ('mmdet::', 'is a folder, not a config'),
    ('mmdet::retinanet', 'is a folder, not a config'),
    ('nosuchpackage::a.py', "'nosuchpackage' is not installed"),
    ('nosuchpackage.sub::a.py', "'nosuchpackage.sub' is not installed"),
    ('::a.py', "'' is not installed"),
])
def test_an_unknown_config_is_refused(name, reason):
    """The field, the name and the reason are given."""
    text = problem(find_config, name, 'model.teacher.config')
    assert repr(name) in text and reason in text


# load_config


def test_a_preprocessor_at_the_top_level_is_the_models(tmp_path):
    """As in MMEngine's runner: unless the model names its own."""
    text = 'data_preprocessor = dict(type="A")\nmodel = dict(type="B"{})'
    for own, expected in (('', 'A'), (', data_preprocessor=dict(type="C")',
                                      'C')):
        (tmp_path / 'model.py').write_text(text.format(own))
        cfg = load_config(str(tmp_path / 'model.py'), 'model.student')
        assert cfg.model.data_preprocessor.type == expected


def test_a_packaged_config_equals_the_file():
    """With everything that the file inherits."""
    ours = load_config(f'mmdet::{RETINA}', 'model.student')
    plain = Config.fromfile(osp.join(CONFIGS, RETINA))
    assert ours.to_dict() == plain.to_dict()


def test_a_model_dict_becomes_a_config():
    """And builds the very same model."""
    model = detector('retina')
    cfg = load_config(model, 'model.student')
    assert cfg.to_dict() == dict(model=model)
    assert type(build(cfg.model.to_dict())).__name__ == 'RetinaNet'


@pytest.mark.parametrize('source', [None, 3, ['a.py']])
def test_a_source_of_another_kind_is_refused(source):
    """The field and the kind are named."""
    text = problem(load_config, source, 'model.student')
    assert 'must be a config path' in text
    assert text.endswith(type(source).__name__)


@pytest.mark.parametrize('content, reason', [
    ('optimizer = dict()', 'has no `model`'),
    ('model = dict(', 'cannot be read as a config'),
    ('_base_ = "no_such_base.py"', 'cannot be read as a config'),
])
def test_a_file_that_is_no_config_of_a_model_is_refused(
        tmp_path, content, reason):
    """The field, the file and the reason are given."""
    path = tmp_path / 'config.py'
    path.write_text(content)
    with refused('model.student', reason) as info:
        load_config(str(path), 'model.student')
    assert repr(str(path)) in info.value.problem


def test_a_checkpoint_is_no_config(tmp_path):
    """Nor any other kind of file."""
    path = tmp_path / 'teacher.pth'
    path.write_bytes(b'PK')
    with refused('model.teacher.config', 'cannot be read as a config'):
        load_config(str(path), 'model.teacher.config')


# scope_of


def test_the_scope_of_a_config_goes_before_that_of_its_caller():
    """A model dict without one is built in the caller's."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert scope_of(Config(dict(default_scope='mmdet'))) == 'mmdet'
        assert scope_of(Config(dict(model=dict()))) == 'mmseg'


class OwnDetector(RetinaNet):
    """A class that no library has."""


@pytest.mark.parametrize('model, library', [
    (dict(type=RetinaNet), 'mmdet'),
    (dict(type=OwnDetector), 'mmdet'),
    (dict(type=EncoderDecoder), 'mmseg'),
    (dict(type='mmdet.RetinaNet'), 'mmdet'),
    (dict(type='mmseg.models.EncoderDecoder'), 'mmseg'),
    (dict(type='RetinaNet'), None),
    (dict(type='no.such.Model'), None),
    (dict(type=torch.nn.ReLU), None),
    (dict(), None),
])
def test_the_library_follows_from_the_class_of_the_model(model, library):
    """Where no default_scope says it, as in new-style configs."""
    cfg = Config(dict(default_scope=None, model=model))
    assert library_of(cfg) == library
    assert scope_of(cfg) == library
    with DefaultScope.overwrite_default_scope('mmengine'):
        assert scope_of(cfg) == (library or 'mmengine')


def test_the_default_scope_goes_before_the_class():
    """A scope of the user's own leaves the library to the class."""
    cfg = Config(dict(default_scope='mmseg', model=dict(type=RetinaNet)))
    assert library_of(cfg) == scope_of(cfg) == 'mmseg'
    cfg = Config(dict(default_scope='mine', model=dict(type=OwnDetector)))
    assert (library_of(cfg), scope_of(cfg)) == ('mmdet', 'mine')
    assert wrapper_for(cfg, 'STUDENT') == 'mmdist.DistillDetector'


def test_a_model_of_no_known_library_is_refused():
    """With what to change."""
    cfg = Config(dict(default_scope=None, model=dict(type='RetinaNet')))
    text = problem(wrapper_for, cfg, 'STUDENT')
    assert 'default_scope=None' in text and "'RetinaNet'" in text


def test_data_sets_within_wrappers():
    """The very dicts, so that they can be changed."""
    a, b, c = (dict(type='CocoDataset', ann_file=name) for name in 'abc')
    whole = dict(
        type='MultiImageMixDataset',
        dataset=dict(
            type='ConcatDataset',
            datasets=[
                dict(type='RepeatDataset', dataset=a), b,
                dict(type='ConcatDataset', datasets=[c])
            ]))
    found = data_sets_in(whole)
    assert [each['ann_file'] for each in found] == [*'abc']
    assert found[0] is a and found[2] is c
    assert data_sets_in(a) == [a]


# student_of


def test_student_of_a_plain_model_is_the_model():
    """Testing a stock config changes nothing."""
    model = detector('retina')
    assert student_of(model) is model


def test_a_config_that_distils_stands_for_its_student(tmp_path):
    """Its checkpoints are the student's, which may teach others."""
    model = detector('retina')
    own = dict(type='DetDataPreprocessor', mean=[1.] * 3)
    plain = {k: v for k, v in model.items() if k != 'data_preprocessor'}
    path = str(tmp_path / 'dist.py')
    Config(
        dict(
            data_preprocessor=own,
            default_scope='mmdet',
            model=dict(
                type='mmdist.DistillDetector', student=plain,
                distill_loss={}))).dump(path)
    cfg = load_config(path, 'model.teacher.config')
    assert cfg.model.to_dict() == dict(plain, data_preprocessor=own)
    assert scope_of(cfg) == 'mmdet'
    twice = dict(type='mmdist.DistillDetector', student=path, distill_loss={})
    assert load_config(twice, 'model.student').model.type == model['type']


def test_a_config_of_test_time_augmentation_stands_for_its_model(tmp_path):
    """``test.py --tta`` leaves such a config in the work directory."""
    path = str(tmp_path / 'tta.py')
    Config(
        dict(
            default_scope='mmdet',
            model=dict(type='DetTTAModel',
                       module=detector('retina')))).dump(path)
    assert load_config(path, 'STUDENT').model.type == 'RetinaNet'


def test_the_scope_is_the_students(tmp_path):
    """As where the wrapper builds it; that of the distilling config may be
    missing."""
    inner, outer = (str(tmp_path / name) for name in ('s.py', 'd.py'))
    Config(dict(default_scope='mmdet', model=detector('retina'))).dump(inner)
    Config(
        dict(
            model=dict(
                type='mmdist.DistillDetector', student=inner,
                distill_loss={}))).dump(outer)
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert scope_of(load_config(outer, 'model.student')) == 'mmdet'


def test_a_config_that_distils_itself_is_refused(tmp_path):
    """By a sentence, not without end."""
    paths = [tmp_path / 'a.py', tmp_path / 'b.py']
    for path, other in zip(paths, paths[::-1]):
        path.write_text("model = dict(type='mmdist.DistillDetector', "
                        f"student='{other}', distill_loss=dict())")
    text = problem(load_config, str(paths[0]), 'model.teacher.config')
    assert f"'{paths[0]}' distils itself" in text


@pytest.mark.parametrize('student, words', [
    ('no.py', "there is no such config: 'no.py'"),
    (None, 'must be a config path'),
])
def test_a_wrong_student_is_named_as_the_user_does(student, words):
    """Where the distilling config is the one that is tested."""
    model = dict(
        type='mmdist.DistillDetector', student=student, distill_loss={})
    with refused('model.student', words):
        student_of(model)


@pytest.mark.parametrize('model', [None, 5])
def test_a_model_that_is_no_dict_is_refused(model, tmp_path):
    """By the file and the field."""
    path = tmp_path / 'model.py'
    path.write_text(f'model = {model}')
    text = problem(load_config, str(path), 'model.teacher.config')
    assert f"'{path}'" in text and 'dict' in text


def test_student_of_a_distiller_is_its_student(tmp_path):
    """Given as a dict, a path or a package name."""
    model = detector('retina')
    path = str(tmp_path / 'student.py')
    Config(dict(model=model)).dump(path)
    for student, expected in (
        (model, model),
        (path, model),
        (f'mmdet::{RETINA}',
         Config.fromfile(osp.join(CONFIGS, RETINA)).model.to_dict()),
    ):
        distiller = dict(
            type='mmdist.DistillDetector', student=student, distill_loss={})
        assert student_of(distiller).to_dict() == expected
