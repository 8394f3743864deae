"""tools/test.py: the student alone, with MMDetection's flags."""
import json
import os.path as osp
import pickle
import runpy
import subprocess
import sys

import cv2
import pytest
import torch
from mmengine.config import Config

from tests.helpers import (build, detector, distiller_cfg, make_runner, quick,
                           run_cfg, write_coco)

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
def run(monkeypatch, tmp_path, case):
    """Run the tool in this process, as ``python tools/test.py`` would."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('time.strftime', lambda *_: tmp_path.name)
        arguments = [TEST, *case, *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', arguments)
        with quick():
            runpy.run_path(TEST, run_name='__main__')

    return run


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


def test_out_must_be_a_pickle(run, tmp_path):
    """Said before anything is loaded."""
    with pytest.raises(ValueError, match='--out=.*out.json must be a .pkl'):
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


@pytest.mark.slow
def test_command_line(case, tmp_path):
    """The metrics are written as MMEngine writes them."""
    subprocess.run([sys.executable, TEST, *case, '--work-dir',
                    str(tmp_path)],
                   check=True,
                   cwd=ROOT)
    written = list(tmp_path.glob('*/*.json'))
    assert len(written) == 1
    assert 'coco/bbox_mAP' in json.loads(written[0].read_text())
