"""tools/make_config.py: a config that trains, or a sentence."""
import os.path as osp
import runpy
import shlex
import sys
from glob import glob

import pytest
import torch
from mmengine.config import Config

from mmdist.errors import ConfigError
from mmdist.models.teacher import build_model
from tests import helpers, segmentors

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOL = osp.join(ROOT, 'tools', 'make_config.py')
TRAIN = osp.join(ROOT, 'tools', 'train.py')
TASKS = dict(
    mmdet=(helpers, lambda: helpers.detector('retina'), helpers.write_coco),
    mmseg=(segmentors, lambda: segmentors.segmentor('pspnet'),
           segmentors.write_masks))


def run(tool, monkeypatch, *arguments):
    """Run a tool in this process."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
    monkeypatch.setattr('time.strftime', lambda *_: '20260101')
    runpy.run_path(tool, run_name='__main__')


def prepare(scope, root):
    """A plain config of a student, and the teacher's."""
    task, model, write = TASKS[scope]
    cfg = task.run_cfg(model(), write(root / 'data'), root, 1)
    for key in ('custom_imports', 'work_dir', 'experiment_name'):
        cfg.pop(key)
    cfg.dump(str(root / 'student.py'))
    return root / 'student.py', task.save_teacher(model(), root)['checkpoint']


@pytest.mark.parametrize('scope, wrapper',
                         [('mmdet', 'mmdist.DistillDetector'),
                          ('mmseg', 'mmdist.DistillSegmentor')])
def test_it_writes_a_config_that_trains(scope, wrapper, tmp_path, monkeypatch):
    """From the folder of the tool's user, with a path relative to the file."""
    student, weights = prepare(scope, tmp_path)
    (tmp_path / 'configs').mkdir()
    monkeypatch.chdir(tmp_path)
    out = tmp_path / 'configs/mine.py'
    run(TOOL, monkeypatch, 'student.py', student, weights, '--out', out)
    assert "_base_ = '../student.py'" in out.read_text()
    assert len(out.read_text().splitlines()) <= 12
    cfg = Config.fromfile(str(out))
    assert cfg.model.type == wrapper
    assert cfg.model.student == Config.fromfile(str(student)).model
    assert cfg.custom_hooks == [dict(type='mmdist.SeedHook')]
    assert cfg.default_hooks.checkpoint.backend_args.backend == 'mmdist.whole'
    run(TRAIN, monkeypatch, out, '--work-dir', tmp_path / 'run')
    log, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    assert 'loss_kd_inter' in log.read_text()


@pytest.mark.parametrize('new_style', [False, True])
def test_hooks_of_the_student_are_kept(new_style, tmp_path, monkeypatch):
    """Beside what lets a killed run resume exactly; nothing is added twice."""
    student, weights = prepare('mmdet', tmp_path)
    cfg = Config.fromfile(str(student))
    cfg.custom_hooks = [dict(type='EMAHook')]
    if new_style:
        helpers.write_new_style(cfg, student)
    else:
        cfg.dump(str(student))
    for base, out in ((student, 'a.py'), (tmp_path / 'a.py', 'b.py')):
        run(TOOL, monkeypatch, base, student, weights, '--out', tmp_path / out)
        made = Config.fromfile(str(tmp_path / out))
        ema, seed = made.custom_hooks
        assert 'EMAHook' in str(ema.type) and 'SeedHook' in str(seed.type)
        hooks = made.default_hooks
        assert hooks.checkpoint.backend_args.backend == 'mmdist.whole'
        assert hooks.checkpoint.interval == hooks.logger.interval == 1


def test_paths_hold_wherever_it_was_written(tmp_path, monkeypatch):
    """Trainings start in the checkout."""
    student, weights = prepare('mmdet', tmp_path)
    monkeypatch.chdir(tmp_path)
    run(TOOL, monkeypatch, 'student.py', 'student.py', osp.basename(weights))
    teacher = Config.fromfile('dist_student.py').model.teacher
    assert teacher == dict(config=str(student), checkpoint=weights)
    monkeypatch.chdir(ROOT)
    run(TRAIN, monkeypatch, tmp_path / 'dist_student.py', '--work-dir',
        tmp_path / 'run')
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()


def test_the_preprocessor_of_the_top_level_is_checked(tmp_path, monkeypatch):
    """Where a runner takes it from."""
    student, weights = prepare('mmdet', tmp_path)
    cfg = Config.fromfile(str(student))
    cfg.data_preprocessor = dict(
        cfg.model.pop('data_preprocessor'), type='DetDataPreprocessr')
    cfg.dump(str(tmp_path / 'top.py'))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='DetDataPreprocessr'):
        run(TOOL, monkeypatch, 'top.py', 'student.py', weights)
    assert not (tmp_path / 'dist_top.py').exists()


def test_what_it_writes_may_be_a_student_and_a_teacher(tmp_path, monkeypatch):
    """A config that distils stands for its student."""
    student, weights = prepare('mmdet', tmp_path)
    monkeypatch.chdir(tmp_path)
    run(TOOL, monkeypatch, 'student.py', 'student.py', weights)
    run(TOOL, monkeypatch, 'dist_student.py', 'dist_student.py', weights)
    again = Config.fromfile('dist_dist_student.py').model
    assert again.type == again.student.type == 'mmdist.DistillDetector'
    assert again.teacher.config == str(tmp_path / 'dist_student.py')


def test_classes_of_other_names_are_refused(tmp_path, monkeypatch):
    """Before a training, as it would in its first iteration."""
    student, weights = prepare('mmdet', tmp_path)
    names = Config.fromfile(
        str(student)).train_dataloader.dataset.metainfo.classes
    content = torch.load(weights, weights_only=True)
    content['meta'] = dict(dataset_meta=dict(classes=names[::-1]))
    torch.save(content, weights)
    with pytest.raises(ValueError, match='label 0 is'):
        run(TOOL, monkeypatch, student, student, weights, '--out',
            tmp_path / 'mine.py')
    run(TOOL, monkeypatch, student, student, weights, '--class-map', 'names',
        '--out', tmp_path / 'mine.py')
    content['meta'] = dict(dataset_meta=dict(classes=[*'xyz']))
    torch.save(content, weights)
    with pytest.raises(ValueError, match='has no class'):
        run(TOOL, monkeypatch, student, student, weights, '--class-map',
            'names', '--out', tmp_path / 'other.py')
    assert not (tmp_path / 'other.py').exists()


def test_a_teacher_of_another_family(tmp_path, monkeypatch):
    """The sentence that refuses it names the way, which works."""
    student, _ = prepare('mmdet', tmp_path)
    teacher = helpers.save_teacher(helpers.detector('faster'), tmp_path)
    config = tmp_path / 'faster.py'
    Config(dict(model=teacher['config'],
                default_scope='mmdet')).dump(str(config))
    models = student, config, teacher['checkpoint']
    with pytest.raises(ValueError, match=r"tap=dict\(align='boxes'\)"):
        run(TOOL, monkeypatch, *models, '--out', tmp_path / 'mine.py')
    run(TOOL, monkeypatch, *models, '--align', 'boxes', '--out',
        tmp_path / 'mine.py')
    cfg = Config.fromfile(str(tmp_path / 'mine.py'))
    assert cfg.model.tap == dict(align='boxes')


@pytest.mark.parametrize('new_style', [False, True])
@pytest.mark.parametrize('scope', TASKS)
def test_features(scope, new_style, tmp_path, monkeypatch):
    """The setting of the dist-feat_* configs, which builds."""
    student, weights = (prepare_new_style if new_style else prepare)(
        scope, tmp_path / 'models' if new_style else tmp_path)
    out = student.with_name('mine.py')
    run(TOOL, monkeypatch, student, student, weights, '--features', '--out',
        out)
    folder, stem = dict(
        mmdet=('dist_det', 'dist-feat_retinanet'),
        mmseg=('dist_seg', 'dist-feat_ddrnet'))[scope]
    shipped, = glob(osp.join(ROOT, 'configs', folder, f'{stem}*.py'))
    expected = Config.fromfile(shipped).model.feature_loss
    loss = Config.fromfile(str(out)).model.feature_loss
    if new_style:
        loss.type = f'mmdist.{loss.type.__name__}'
    assert loss == expected
    model = build_model(str(out), 'model', resolve=False)[0]
    assert model.distillation.features.pairs


def test_imports_of_the_student_are_kept(tmp_path, monkeypatch):
    """MMEngine would replace the list, and miss what registers its parts."""
    student, weights = prepare('mmdet', tmp_path)
    (tmp_path / 'my_parts.py').write_text('')
    monkeypatch.syspath_prepend(tmp_path)
    for own, kept in ((['my_parts'], ['my_parts', 'mmdist'
                                      ]), ('my_parts', ['my_parts', 'mmdist']),
                      (['mmdist', 'my_parts'], ['mmdist', 'my_parts'])):
        plain = student.with_name('own.py')
        plain.write_text(f'{student.read_text()}\n'
                         f'custom_imports = dict(imports={own!r})\n')
        out = tmp_path / 'mine.py'
        run(TOOL, monkeypatch, plain, student, weights, '--out', out,
            '--force')
        assert Config.fromfile(str(out)).custom_imports.imports == kept


def test_a_name_of_the_zoo(tmp_path, monkeypatch):
    """The file is called after the student, here, in the folder."""
    zoo = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    cfg = helpers.merged(
        Config.fromfile(osp.join(helpers.ZOO, zoo[7:])).model.to_dict(),
        dict(backbone=dict(init_cfg=None)))
    teacher = helpers.save_teacher(cfg, tmp_path)
    monkeypatch.chdir(tmp_path)
    run(TOOL, monkeypatch, zoo, zoo, teacher['checkpoint'], '--class-map',
        'names')
    cfg = Config.fromfile('dist_retinanet_r18_fpn_1x_coco.py')
    assert cfg.model.teacher.class_map == 'names'
    assert cfg.model.student.backbone.depth == 18


def test_what_does_not_fit_is_not_written(tmp_path, monkeypatch):
    """The sentence of a training, without a file; nothing is overwritten."""
    student, weights = prepare('mmdet', tmp_path)
    out = tmp_path / 'mine.py'
    faster = helpers.run_cfg(helpers.detector('faster'), tmp_path, tmp_path)
    faster.dump(str(tmp_path / 'faster.py'))
    for teacher, match in ((tmp_path / 'faster.py', 'does not'),
                           (tmp_path / 'no.py', 'model.teacher.config')):
        with pytest.raises(Exception, match=match):
            run(TOOL, monkeypatch, student, teacher, weights, '--out', out)
    assert not list(tmp_path.glob('*mine.py'))
    out.write_text('mine')
    with pytest.raises(ConfigError, match='--force'):
        run(TOOL, monkeypatch, student, student, weights, '--out', out)
    assert out.read_text() == 'mine'
    (tmp_path / 'other.py').write_text("model = dict(type='ResNet18')\n"
                                       "default_scope = 'mmaction'")
    with pytest.raises(ValueError, match='mmaction'):
        run(TOOL, monkeypatch, tmp_path / 'other.py', student, weights,
            '--out', tmp_path / 'x.py')


def prepare_new_style(scope, folder):
    """A student's new-style config in a folder, and a teacher's weights."""
    folder.mkdir()
    student, weights = prepare(scope, folder)
    cfg = Config.fromfile(str(student))
    helpers.write_new_style(cfg, folder / 'student.py')
    assert Config.fromfile(str(student)).default_scope is None
    return folder / 'student.py', weights


@pytest.mark.parametrize('scope', TASKS)
def test_a_new_style_student_gets_a_new_style_config(scope, tmp_path,
                                                     monkeypatch):
    """Which imports it, and trains; the library is that of its model."""
    student, weights = prepare_new_style(scope, tmp_path / 'models')
    (tmp_path / 'more').mkdir()
    out = tmp_path / 'more' / 'mine.py'
    run(TOOL, monkeypatch, student, student, weights, '--out', out)
    assert 'from ..models.student import *' in out.read_text()
    assert '_base_' not in out.read_text()
    cfg = Config.fromfile(str(out))
    wrapper = dict(mmdet='DistillDetector', mmseg='DistillSegmentor')[scope]
    assert cfg.model.type.__name__ == wrapper
    assert cfg.model.student == Config.fromfile(str(student)).model
    assert [hook.type.__name__ for hook in cfg.custom_hooks] == ['SeedHook']
    assert cfg.default_hooks.checkpoint.backend_args.backend == 'mmdist.whole'
    run(TRAIN, monkeypatch, out, '--work-dir', tmp_path / 'run')
    log, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    assert 'loss_kd_inter' in log.read_text()


def test_new_style_students_are_imported_by_name(tmp_path, monkeypatch):
    """A file beside the new one works; what Python cannot name does not."""
    student, weights = prepare_new_style('mmdet', tmp_path / 'models')
    out = tmp_path / 'models' / 'it-is-mine.py'
    run(TOOL, monkeypatch, student, student, weights, '--out', out)
    assert 'from .student import *' in out.read_text()
    other = tmp_path / 'models' / 'my-student.py'
    other.write_text(student.read_text())
    with pytest.raises(ValueError, match="rename 'my-student', which is no"):
        run(TOOL, monkeypatch, other, student, weights, '--out',
            tmp_path / 'models' / 'other.py')
    assert not (tmp_path / 'models' / 'other.py').exists()


def test_new_style_students_of_a_package(monkeypatch):
    """By the package's name, from wherever the new config lies."""
    module_of = runpy.run_path(TOOL)['module_of']
    package = osp.dirname(osp.dirname(osp.dirname(helpers.ZOO)))
    path = osp.join(package, 'mmdet', 'configs', 'retinanet', 'a.py')
    assert module_of(path, 'out', 'mmdet') == 'mmdet.configs.retinanet.a'
    assert module_of('a.py', '.', 'mmdet') == '.a'
    assert module_of('a/b.py', '.', 'mmdet') == '.a.b'
    assert module_of('a.py', 'out', 'mmdet') == '..a'
    assert module_of('b/a.py', 'out/two', 'mmdet') == '...b.a'


def test_the_command_that_it_prints_can_be_pasted(tmp_path, monkeypatch,
                                                  capsys):
    """Whatever is in the path."""
    student, weights = prepare('mmdet', tmp_path)
    out = tmp_path / "it's my config.py"
    run(TOOL, monkeypatch, student, student, weights, '--out', out)
    command = capsys.readouterr().out.splitlines()[-1].split(' is ready: ')[1]
    python, tool, config = shlex.split(command)
    assert python == 'python' and osp.samefile(tool, TRAIN)
    assert config == str(out)


def test_class_map_may_be_a_list(tmp_path, monkeypatch):
    """Labels or names, as in a config; it is checked like one."""
    student, weights = prepare('mmdet', tmp_path)
    out = tmp_path / 'mine.py'
    run(TOOL, monkeypatch, student, student, weights, '--out', out,
        '--class-map', 2, 0, 1)
    assert Config.fromfile(str(out)).model.teacher.class_map == [2, 0, 1]
    with pytest.raises(ValueError, match='has 2 classes'):
        run(TOOL, monkeypatch, student, student, weights, '--out', out,
            '--force', '--class-map', 2, 0)
