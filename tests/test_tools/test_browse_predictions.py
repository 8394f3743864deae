"""tools/analysis_tools/browse_predictions.py: three panels a picture."""
import os.path as osp
import runpy
import sys

import cv2
import pytest
from mmengine.config import Config

from tests import helpers
from tests.refusals import refused
from tests.test_tools.conftest import TASKS, without_annotations

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOL = osp.join(ROOT, 'tools', 'analysis_tools', 'browse_predictions.py')


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    monkeypatch.syspath_prepend(osp.dirname(TOOL))
    runpy.run_path(TOOL, run_name='__main__')


def panels(path):
    """The three thirds of a row, without its titles."""
    row = cv2.imread(str(path))[40:]
    width = row.shape[1] // 3
    return [row[:, i * width:(i + 1) * width] for i in range(3)]


@pytest.mark.parametrize('name', TASKS)
def test_each_picture_has_three_panels(name, prepared, tmp_path, monkeypatch):
    """A model beside itself says the same, beside another it does not."""
    config, own, other = prepared(name)
    rows = {}
    for title, teacher in (('same', own), ('different', other)):
        out = tmp_path / title
        run(monkeypatch, config, own, config, teacher, '--number', 2,
            '--score-thr', 0, '--out-dir', out)
        files = sorted(out.iterdir())
        assert len(files) == 2
        rows[title] = panels(files[0])
    assert abs(rows['same'][1].astype(int) - rows['same'][2]).mean() < 1
    difference = abs(rows['different'][1].astype(int) - rows['different'][2])
    assert difference.mean() > 1
    # the truth of these data sets is not what random weights predict
    assert abs(rows['same'][0].astype(int) - rows['same'][1]).mean() > 1


def test_a_teacher_has_names_of_its_own(prepared, tmp_path, monkeypatch):
    """One that knows more classes than the student."""
    config, own, _ = prepared('retina')
    model = helpers.detector('retina', bbox_head=dict(num_classes=7))
    teacher = helpers.save_teacher(
        model,
        tmp_path,
        seed=3,
        meta=dict(dataset_meta=dict(classes=[*'abcdefg'])))
    Config(dict(model=model,
                default_scope='mmdet')).dump(str(tmp_path / 'teacher.py'))
    run(monkeypatch, config, own, tmp_path / 'teacher.py',
        teacher['checkpoint'], '--number', 1, '--score-thr', 0, '--out-dir',
        tmp_path / 'out')
    run(monkeypatch, config, own, config, own, '--number', 1, '--score-thr', 0,
        '--out-dir', tmp_path / 'same')
    other, same = (
        panels(next((tmp_path / name).iterdir())) for name in ('out', 'same'))
    for panel in (0, 1):  # the student's are not drawn with these names
        assert (other[panel] == same[panel]).all()
    assert (other[2] != same[2]).any()


def test_no_data_is_refused(prepared, tmp_path, monkeypatch):
    config, own, other = prepared('retina')
    cfg = Config.fromfile(config)
    cfg.pop('val_dataloader')
    cfg.dump(str(config))
    with pytest.raises(ValueError, match='STUDENT: it has no val_dataload'):
        run(monkeypatch, config, own, config, other)


def test_wrong_weights_are_refused(prepared, tmp_path, monkeypatch):
    """By the name of the field; no folder is made."""
    config, own, _ = prepared('retina')
    with refused('TEACHER.checkpoint', 'none.pth'):
        run(monkeypatch, config, own, config, tmp_path / 'none.pth',
            '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', TASKS)
def test_images_without_annotations_are_drawn(name, prepared, tmp_path,
                                              monkeypatch):
    """With both predictions; where the truth stands is the image alone."""
    config, own, other = prepared(name)
    rows = []
    for split in ('val', 'test'):
        if split == 'test':
            without_annotations(config)
        out = tmp_path / split
        run(monkeypatch, config, own, config, other, '--split', split,
            '--number', 2, '--score-thr', 0, '--out-dir', out)
        files = sorted(out.iterdir())
        assert len(files) == 2
        rows.append(panels(files[0]))
    with_truth, without = rows
    assert (with_truth[0] != without[0]).any()
    for panel in (1, 2):
        assert (with_truth[panel] == without[panel]).all()


@pytest.mark.parametrize('name', TASKS)
def test_new_style_configs_are_drawn_alike(name, prepared, tmp_path,
                                           monkeypatch):
    """By the visualizer of the model's library."""
    config, own, other = prepared(name)
    (tmp_path / 'new').mkdir()
    new = tmp_path / 'new' / config.name
    helpers.write_new_style(Config.fromfile(str(config)), new)
    rows = []
    for i, each in enumerate((config, new)):
        out = tmp_path / f'out{i}'
        run(monkeypatch, each, own, each, other, '--number', 1, '--out-dir',
            out)
        rows.append(cv2.imread(str(next(out.iterdir()))))
    assert (rows[0] == rows[1]).all()
