"""tools/train.py and tools/test.py with segmentors: the same files."""
import json
import os.path as osp
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdist.errors import ConfigError
from tests.helpers import checkpoint, write_new_style
from tests.segmentors import (NUM_CLASSES, batch, build, distiller_cfg,
                              prepared, run_cfg, save_teacher, segmentor,
                              write_masks)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TRAIN, TEST = (osp.join(ROOT, 'tools', f'{t}.py') for t in ('train', 'test'))


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A config, and a checkpoint of its student."""
    root = tmp_path_factory.mktemp('segmentor')
    student = segmentor('pspnet')
    cfg = run_cfg(
        distiller_cfg(student, save_teacher(segmentor('pspnet'), root)),
        write_masks(root / 'data'),
        root,
        epochs=1)
    cfg.pop('work_dir')
    cfg.pop('experiment_name')
    cfg.dump(str(root / 'toy.py'))
    model = build(student, seed=3).eval()
    with torch.no_grad():
        logits = model(prepared(model, batch(), False)[0])
        # Otherwise one class wins everywhere.
        model.decode_head.conv_seg.bias -= logits.mean((0, 2, 3))
    torch.save(
        dict(state_dict=model.state_dict(), meta={}), root / 'student.pth')
    return str(root / 'toy.py'), str(root / 'student.pth')


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a tool in this process, as ``python tools/…`` would."""

    def run(tool, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr('time.strftime', lambda *_: tmp_path.name)
        monkeypatch.setattr(sys, 'argv', [tool, *map(str, arguments)])
        runpy.run_path(tool, run_name='__main__')

    return run


def test_train(case, run, tmp_path):
    """A checkpoint of the plain student, a log with the terms of DIST."""
    run(TRAIN, case[0], '--work-dir', tmp_path)
    build(segmentor('pspnet')).load_state_dict(
        checkpoint(tmp_path, 1)['state_dict'], strict=True)
    log = next(tmp_path.glob('*/vis_data/scalars.json')).read_text()
    for line in map(json.loads, log.splitlines()):
        parts = ('decode.loss_ce', 'aux.loss_ce', 'loss_kd_inter',
                 'loss_kd_intra')
        assert line['loss'] == pytest.approx(
            sum(line[part] for part in parts), rel=1e-3)


def test_show_dir_holds_painted_pictures(case, run, tmp_path):
    """--show-dir, as in MMSegmentation."""
    run(TEST, *case, '--show-dir', tmp_path / 'painted')
    painted = sorted((tmp_path / 'painted').glob('**/*.png'))
    assert len(painted) == 6
    # Ground truth on the left, prediction on the right.
    assert cv2.imread(str(painted[0])).shape[1] == 2 * 64


def test_out_holds_the_predicted_masks(case, run, tmp_path):
    """--out, a folder of masks, as in MMSegmentation."""
    run(TEST, *case, '--out', tmp_path / 'masks')
    masks = [
        cv2.imread(str(path), 0) for path in (tmp_path / 'masks').iterdir()
    ]
    assert len(masks) == 6
    for mask in masks:
        assert mask.shape == (64, 64)
        assert set(np.unique(mask)) <= set(range(NUM_CLASSES))


def test_out_goes_with_a_list_of_metrics(case, run, tmp_path):
    """The masks are those of one metric; one that writes none is left."""
    cfg = Config.fromfile(case[0])
    # MMEngine's, which takes no folder
    dump = dict(type='DumpResults', out_file_path=str(tmp_path / 'all.pkl'))
    for name, metrics in (('one', cfg.test_evaluator),
                          ('list', [dump, cfg.test_evaluator])):
        cfg.test_evaluator = metrics
        cfg.dump(str(tmp_path / 'toy.py'))
        run(TEST, tmp_path / 'toy.py', case[1], '--out', tmp_path / name)
    for path in (tmp_path / 'one').iterdir():
        other = cv2.imread(str(tmp_path / 'list' / path.name), 0)
        assert (cv2.imread(str(path), 0) == other).all()
    assert (tmp_path / 'all.pkl').is_file()
    cfg.test_evaluator = [dump]
    cfg.dump(str(tmp_path / 'toy.py'))
    with pytest.raises(ValueError, match='takes an output_dir, as IoUMetric'):
        run(TEST, tmp_path / 'toy.py', case[1], '--out', tmp_path / 'none')


def test_a_new_style_config(case, run, tmp_path):
    """--out and --show-dir, as MMSegmentation's by the model's class."""
    cfg = Config.fromfile(case[0])
    cfg.model = cfg.model.student
    write_new_style(cfg, tmp_path / 'new.py')
    run(TEST, tmp_path / 'new.py', case[1], '--out', tmp_path / 'new',
        '--show-dir', tmp_path / 'painted')
    run(TEST, *case, '--out', tmp_path / 'old')
    assert len([*(tmp_path / 'new').iterdir()]) == 6
    for path in (tmp_path / 'new').iterdir():
        other = cv2.imread(str(tmp_path / 'old' / path.name), 0)
        assert (cv2.imread(str(path), 0) == other).all()
    painted = sorted((tmp_path / 'painted').glob('**/*.png'))
    assert len(painted) == 6


def test_tta_merges_what_the_student_predicts(case, run, tmp_path):
    """--tta, as in MMSegmentation: with a mirrored copy of every picture."""
    cfg = Config.fromfile(case[0])
    with pytest.raises(ConfigError, match='--tta needs') as info:
        run(TEST, *case, '--tta')
    assert info.value.field == 'tta_model'
    cfg.tta_model = dict(type='SegTTAModel')
    cfg.tta_pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='TestTimeAug',
            transforms=[[dict(type='RandomFlip', prob=p) for p in (0., 1.)],
                        [dict(type='LoadAnnotations')],
                        [dict(type='PackSegInputs')]])
    ]
    cfg.dump(str(tmp_path / 'tta.py'))
    masks = []
    for flags in ([], ['--tta']):
        out = tmp_path / f'masks{len(flags)}'
        run(TEST, tmp_path / 'tta.py', case[1], '--out', out, *flags)
        masks.append([cv2.imread(str(f), 0) for f in sorted(out.iterdir())])
    assert len(masks[0]) == len(masks[1]) == 6
    assert any((a != b).any() for a, b in zip(*masks))


def test_metrics(case, run, tmp_path):
    """The mIoU and its table, as MMSegmentation prints them."""
    run(TEST, *case, '--work-dir', tmp_path)
    written, = tmp_path.glob('*/*.json')
    assert {'mIoU', 'mAcc', 'aAcc'} <= set(json.loads(written.read_text()))
    log = next(tmp_path.glob('*/*.log')).read_text()
    assert 'per class results' in log and '|  disc' in log


@pytest.mark.parametrize('part, change, sentence', [
    ('val_dataloader', lambda cfg: cfg.val_dataloader.dataset.pop('metainfo'),
     'no class names, which IoUMetric needs'),
    ('train_dataloader',
     lambda cfg: cfg.model.student.decode_head.update(ignore_index=254),
     'a mask has the label 255 but model.student predicts 4 classes, 0 to 3'),
])
def test_refused_before_the_first_update(case, run, tmp_path, part, change,
                                         sentence):
    """One sentence that names the field, not an error of a loss or metric."""
    cfg = Config.fromfile(case[0])
    cfg.val_dataloader, cfg.val_cfg = cfg.test_dataloader.copy(), {}
    cfg.val_evaluator = [cfg.test_evaluator]
    change(cfg)
    cfg.dump(str(tmp_path / 'toy.py'))
    with pytest.raises(ConfigError, match=sentence) as error:
        run(TRAIN, tmp_path / 'toy.py', '--work-dir', tmp_path)
    assert error.value.field == f'{part}.dataset'


def test_no_checkpoint_to_test(case, run):
    """Before a model is built."""
    with pytest.raises(ConfigError, match="CHECKPOINT: .*'no.pth'"):
        run(TEST, case[0], 'no.pth')
