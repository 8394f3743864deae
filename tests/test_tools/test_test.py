"""tools/test.py: the student alone, with MMDetection's flags."""
import json
import os.path as osp
import pickle
import runpy
import sys
from functools import partial

import cv2
import mmdet
import pytest
import torch
from mmengine.config import Config

from mmdist.errors import ConfigError
from tests.helpers import (build, detector, distiller_cfg, make_runner,
                           run_cfg, write_coco, write_new_style)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TEST = osp.join(ROOT, 'tools', 'test.py')


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A config whose teacher is gone, and a checkpoint of its student."""
    root = tmp_path_factory.mktemp('test')
    data = write_coco(root / 'data')
    student = detector('retina', test_cfg=dict(score_thr=0.))
    teacher = dict(config='no/such.py', checkpoint='no/such.pth')
    cfg = run_cfg(distiller_cfg(student, teacher), data, root)
    cfg.pop('work_dir')
    cfg.pop('experiment_name')
    cfg.dump(str(root / 'toy.py'))
    torch.save(
        dict(state_dict=build(student, seed=3).state_dict(), meta={}),
        root / 'student.pth')
    return str(root / 'toy.py'), str(root / 'student.pth')


@pytest.fixture
def run_on(monkeypatch, tmp_path):
    """Run the tool in this process, as ``python tools/test.py`` would."""

    def run_on(case, *arguments, tool=TEST):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('time.strftime', lambda *_: tmp_path.name)
        arguments = [tool, *case, *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', arguments)
        runpy.run_path(tool, run_name='__main__')

    return run_on


@pytest.fixture
def run(run_on, case):
    """Run the tool on the case."""
    return partial(run_on, case)


def predicted_alone(case, work_dir):
    """What the plain student predicts in a plain runner."""
    cfg = Config.fromfile(case[0])
    root = osp.dirname(cfg.train_dataloader.dataset.data_root.rstrip('/'))
    runner = make_runner(
        cfg.model.student.to_dict(),
        osp.join(root, 'data'),
        work_dir,
        load_from=case[1])
    runner.load_or_resume()
    model = runner.model.eval()
    return [
        sample for batch in runner.build_dataloader(cfg.test_dataloader)
        for sample in model.test_step(batch)
    ]


def test_out_holds_the_plain_students_predictions(case, run, tmp_path):
    """--out: as many, with the same boxes, bit for bit; no teacher needed."""
    run('--out', tmp_path / 'out.pkl')
    dumped = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    expected = predicted_alone(case, tmp_path / 'plain')
    assert len(dumped) == len(expected) == 6
    for ours, plain in zip(dumped, expected):
        assert ours['img_id'] == plain.img_id
        assert len(ours['pred_instances']['bboxes']) > 10
        for field in ('bboxes', 'scores', 'labels'):
            assert torch.equal(ours['pred_instances'][field],
                               plain.pred_instances[field])


def test_show_dir_holds_painted_pictures(run, tmp_path):
    """--show-dir: a picture each, drawn on, under work_dir/timestamp."""
    run('--work-dir', tmp_path / 'work', '--show-dir', 'painted')
    painted = sorted((tmp_path / 'work').glob('*/painted/*.png'))
    assert [path.name for path in painted] == [f'{i}.png' for i in range(1, 7)]
    picture = cv2.imread(str(painted[0]))
    # Ground truth on the left, predictions on the right.
    assert picture.shape[1] == 2 * picture.shape[0]


def test_default_work_dir_and_cfg_options(run, tmp_path):
    """./work_dirs/<config name>; options change the config."""
    run('--cfg-options', 'test_dataloader.batch_size=1')
    work_dir = tmp_path / 'work_dirs/toy'
    written = Config.fromfile(str(work_dir / 'toy.py'))
    assert written.test_dataloader.batch_size == 1
    assert written.model.type == 'RetinaNet'
    metrics, = work_dir.glob('*/*.json')
    assert 'coco/bbox_mAP' in json.loads(metrics.read_text())


def test_out_must_be_a_pickle(run, tmp_path):
    """Said before anything is loaded."""
    with pytest.raises(ConfigError, match='--out: .*json must be a .pkl'):
        run('--out', tmp_path / 'out.json')


def test_show_dir_needs_the_hook(case, monkeypatch, tmp_path):
    """A config without the visualization hook cannot draw."""
    cfg = Config.fromfile(case[0])
    cfg.default_hooks.pop('visualization')
    cfg.dump(str(tmp_path / 'blind.py'))
    monkeypatch.setattr(sys, 'argv', [
        TEST,
        str(tmp_path / 'blind.py'), case[1], '--show-dir',
        str(tmp_path)
    ])
    with pytest.raises(ValueError, match='default_hooks.visualization'):
        runpy.run_path(TEST, run_name='__main__')


def changed(case, path, change):
    """The arguments of the tool for a config that was changed."""
    cfg = Config.fromfile(case[0])
    change(cfg)
    cfg.dump(str(path))
    return str(path), case[1]


def in_a_list(cfg):
    """Several metrics."""
    again = dict(cfg.test_evaluator, prefix='again')
    cfg.test_evaluator = [cfg.test_evaluator, again]


def in_an_evaluator(cfg):
    """A whole evaluator, which MMEngine's runner takes, too."""
    cfg.test_evaluator = dict(type='Evaluator', metrics=[cfg.test_evaluator])


def in_an_evaluator_alone(cfg):
    """Its one metric without a list."""
    cfg.test_evaluator = dict(metrics=cfg.test_evaluator)


@pytest.mark.parametrize('change',
                         [in_a_list, in_an_evaluator, in_an_evaluator_alone])
def test_out_goes_with_any_evaluator(change, case, run_on, tmp_path):
    """The predictions are those of one metric, which measures on."""
    run_on(case, '--out', tmp_path / 'one.pkl')
    run_on(
        changed(case, tmp_path / 'toy.py', change), '--out',
        tmp_path / 'other.pkl', '--work-dir', tmp_path / 'run')
    one, other = (
        pickle.loads((tmp_path / f'{name}.pkl').read_bytes())
        for name in ('one', 'other'))
    assert len(one) == len(other) == 6
    for a, b in zip(one, other):
        assert torch.equal(a['pred_instances']['bboxes'],
                           b['pred_instances']['bboxes'])
    metrics, = (tmp_path / 'run').glob('*/*.json')
    assert 'coco/bbox_mAP' in metrics.read_text()


def test_out_needs_an_evaluator(case, run_on, tmp_path):
    """Which the sentence names."""
    with pytest.raises(ConfigError, match='--out needs') as info:
        run_on(
            changed(case, tmp_path / 'toy.py',
                    lambda cfg: cfg.pop('test_evaluator')), '--out', 'a.pkl')
    assert info.value.field == 'test_evaluator'


def of_parts(cfg):
    """A data set of two halves."""
    part = dict(cfg.test_dataloader.dataset)
    cfg.test_dataloader.dataset = dict(
        type='ConcatDataset',
        datasets=[
            dict(part, indices=[0, 1, 2]),
            dict(part, indices=[3, 4, 5])
        ])


def test_tta_has_the_defaults_of_mmdetection(case, run_on, tmp_path):
    """The images as they are and flipped, merged; as its own test tool."""
    path = osp.join(osp.dirname(mmdet.__file__), '.mim', 'tools', 'test.py')
    run_on(case, '--tta', '--out', tmp_path / 'ours.pkl')
    run_on(case, '--out', tmp_path / 'plain.pkl')
    cfg = Config.fromfile(case[0])
    cfg.model = cfg.model.student
    cfg.dump(str(tmp_path / 'student.py'))
    run_on((str(tmp_path / 'student.py'), case[1]),
           '--tta',
           '--out',
           tmp_path / 'theirs.pkl',
           tool=path)
    run_on(
        changed(case, tmp_path / 'parts.py', of_parts), '--tta', '--out',
        tmp_path / 'parts.pkl')
    found = {
        name: pickle.loads((tmp_path / f'{name}.pkl').read_bytes())
        for name in ('ours', 'plain', 'theirs', 'parts')
    }
    boxes = {
        name: [one['pred_instances']['bboxes'] for one in dumped]
        for name, dumped in found.items()
    }
    for ours, plain, theirs, parts in zip(*boxes.values()):
        assert torch.equal(ours, theirs) and torch.equal(ours, parts)
        assert ours.shape != plain.shape or not torch.equal(ours, plain)


def test_a_new_style_config(case, run_on, tmp_path):
    """--out and --tta; the library is that of the model's class."""
    cfg = Config.fromfile(case[0])
    cfg.model = cfg.model.student
    write_new_style(cfg, tmp_path / 'new.py')
    for flags in ((), ('--tta', )):
        for i, each in enumerate((case[0], tmp_path / 'new.py')):
            run_on((str(each), case[1]), '--out', tmp_path / f'{i}.pkl',
                   *flags)
        ours, new = (
            pickle.loads((tmp_path / f'{i}.pkl').read_bytes())
            for i in range(2))
        assert len(ours) == len(new) == 6
        for a, b in zip(ours, new):
            assert torch.equal(a['pred_instances']['bboxes'],
                               b['pred_instances']['bboxes'])
