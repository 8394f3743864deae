"""tools/make_config.py: a config that trains, or a sentence."""
import os.path as osp
import runpy
import sys

import pytest
import torch
from mmengine.config import Config

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
    with helpers.quick():
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
    run(TRAIN, monkeypatch, out, '--work-dir', tmp_path / 'run')
    log, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    assert 'loss_kd_inter' in log.read_text()


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
    with pytest.raises(FileExistsError, match='--force'):
        run(TOOL, monkeypatch, student, student, weights, '--out', out)
    assert out.read_text() == 'mine'
    (tmp_path / 'other.py').write_text("model = dict(type='ResNet18')\n"
                                       "default_scope = 'mmaction'")
    with pytest.raises(ValueError, match='mmaction'):
        run(TOOL, monkeypatch, tmp_path / 'other.py', student, weights,
            '--out', tmp_path / 'x.py')
