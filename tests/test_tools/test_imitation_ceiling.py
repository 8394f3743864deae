"""tools/analysis_tools/imitation_ceiling.py against plain MMDetection."""
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'imitation_ceiling.py'
# Weights of the classification alone.
CLASSES = dict(
    retina=('bbox_head.cls_convs', 'bbox_head.retina_cls'),
    faster=('roi_head.bbox_head.fc_cls', ))
# What both models have in common: the features that classes are read from.
COMMON = ('backbone', 'neck', 'roi_head.bbox_head.shared_fcs')


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    monkeypatch.syspath_prepend(TOOL.parent)
    with helpers.quick():
        runpy.run_path(str(TOOL), run_name='__main__')


def mixed(one, other, names):
    """Weights of one model, those that begin with a name of another."""
    return {
        key: other[key] if key.startswith(names) else value
        for key, value in one.items()
    }


@pytest.fixture
def detections(tmp_path):
    """A config whose test writes what was detected; reads it, too."""

    def prepare(name):
        cfg = helpers.run_cfg(
            helpers.detector(name), helpers.write_coco(tmp_path / 'data'),
            tmp_path / 'plain', 1)
        cfg.test_evaluator.outfile_prefix = str(tmp_path / 'found')
        path = tmp_path / f'{name}.py'
        cfg.dump(str(path))
        return path

    def read():
        found = json.loads((tmp_path / 'found.bbox.json').read_text())
        assert len(found) > 5
        return sorted((one['image_id'], one['category_id'],
                       round(one['score'], 5), *one['bbox']) for one in found)

    return prepare, read


@pytest.mark.parametrize('name', CLASSES)
def test_boxes_are_the_students_and_classes_the_teachers(
        name, detections, tmp_path, monkeypatch):
    """As a student with the teacher's classification, by plain MMDetection.

    The teacher has the student's features, or its classification would see
    others there; its boxes are its own.
    """
    prepare, read = detections
    config = prepare(name)
    model = helpers.detector(name)
    student, other = (
        helpers.build(model, seed).state_dict() for seed in (1, 2))
    teacher = mixed(other, student, COMMON)
    weights = dict(
        student=student,
        teacher=teacher,
        both=mixed(student, teacher, CLASSES[name]))
    for key, value in weights.items():
        torch.save(dict(state_dict=value), tmp_path / f'{key}.pth')
    cfg = Config.fromfile(config)
    cfg.load_from = str(tmp_path / 'both.pth')
    with helpers.quick():
        metrics = Runner.from_cfg(cfg).test()
    expected = read()
    out = tmp_path / 'out'
    run(monkeypatch, config, tmp_path / 'student.pth', config,
        tmp_path / 'teacher.pth', '--split', 'test', '--work-dir', out)
    assert read() == [pytest.approx(row, abs=1e-4) for row in expected]
    results = json.loads((out / 'imitation_ceiling.json').read_text())
    assert list(results) == ['student', f'with logits of {name}']
    assert results[f'with logits of {name}'] == pytest.approx(metrics)


def test_of_another_kind_is_refused(detections, tmp_path, monkeypatch):
    """By their names; a detector's RoIs are no locations."""
    prepare, _ = detections
    configs = [prepare(name) for name in CLASSES]
    checkpoints = [
        helpers.save_teacher(helpers.detector(name), tmp_path,
                             seed)['checkpoint']
        for seed, name in enumerate(CLASSES)
    ]
    with pytest.raises(
            ValueError, match='both with a bbox_head, but they are Ret'):
        run(monkeypatch, configs[0], checkpoints[0], configs[1],
            checkpoints[1], '--split', 'test', '--work-dir', tmp_path / 'out')
