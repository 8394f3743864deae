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
from tests.refusals import refused
from tests.test_tools.conftest import teacher_of_more_classes

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'imitation_ceiling.py'
# Weights of the classification alone, and of the boxes.
CLASSES = dict(
    retina=('bbox_head.cls_convs', 'bbox_head.retina_cls'),
    faster=('roi_head.bbox_head.fc_cls', ))
BOXES = dict(
    retina=('bbox_head.reg_convs', 'bbox_head.retina_reg'),
    faster=('roi_head.bbox_head.fc_reg', ))
# Parts that both models share: those that compute the features.
COMMON = ('backbone', 'neck', 'roi_head.bbox_head.shared_fcs')


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, arguments)])
    monkeypatch.syspath_prepend(TOOL.parent)
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
def test_predictions_are_those_of_mixed_weights(name, detections, tmp_path,
                                                monkeypatch):
    """As a student with the teacher's classification, its boxes, or both, by
    plain MMDetection.

    The teacher has the student's features, or its head would see others
    there; its proposals are its own.
    """
    prepare, read = detections
    config = prepare(name)
    model = helpers.detector(name)
    student, other = (
        helpers.build(model, seed).state_dict() for seed in (1, 2))
    teacher = mixed(other, student, COMMON)
    weights = dict(
        student=student,
        logits=mixed(student, teacher, CLASSES[name]),
        boxes=mixed(student, teacher, BOXES[name]),
        both=mixed(student, teacher, CLASSES[name] + BOXES[name]))
    metrics, found = {}, []
    for key, value in dict(weights, teacher=teacher).items():
        torch.save(dict(state_dict=value), tmp_path / f'{key}.pth')
    test = Runner.test

    def noted(runner):
        result = test(runner)
        found.append(read())
        return result

    monkeypatch.setattr(Runner, 'test', noted)
    for key in weights:
        cfg = Config.fromfile(config)
        cfg.load_from = str(tmp_path / f'{key}.pth')
        metrics[key] = Runner.from_cfg(cfg).test()
    out = tmp_path / 'out'
    run(monkeypatch, config, tmp_path / 'student.pth', config,
        tmp_path / 'teacher.pth', '--split', 'test', '--work-dir', out)
    assert len(found) == 8 and len(set(map(str, found[:4]))) == 4
    for expected, ours in zip(found[:4], found[4:]):
        assert ours == [pytest.approx(row, abs=1e-4) for row in expected]
    results = json.loads((out / 'imitation_ceiling.json').read_text())
    assert list(results) == [
        'student', *(f'with {part} of {name}' for part in list(weights)[1:])
    ]
    for ours, expected in zip(results.values(), metrics.values()):
        assert ours == pytest.approx(expected)


def test_boxes_that_mean_something_else_are_left_out(detections, tmp_path,
                                                     monkeypatch, capsys):
    """Deltas of other scales are other boxes."""
    prepare, _ = detections
    config = prepare('faster')
    cfg = Config.fromfile(config)
    stds = cfg.model.roi_head.bbox_head.bbox_coder.target_stds
    cfg.model.roi_head.bbox_head.bbox_coder.target_stds = [
        std / 2 for std in stds
    ]
    cfg.dump(str(tmp_path / 'other.py'))
    weights = helpers.save_teacher(helpers.detector('faster'),
                                   tmp_path)['checkpoint']
    out = tmp_path / 'out'
    run(monkeypatch, config, weights, tmp_path / 'other.py', weights,
        '--split', 'test', '--work-dir', out)
    assert 'bbox_coder is not the student' in capsys.readouterr().out
    results = json.loads((out / 'imitation_ceiling.json').read_text())
    assert list(results) == ['student', 'with logits of other']


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


def permuted(weights, order):
    """Weights of a model whose classes are in another order."""
    weights = dict(weights)
    for name, weight in weights.items():
        if 'retina_cls' in name or 'fc_cls' in name:
            number = helpers.NUM_CLASSES + ('fc_cls' in name)
            table = weight.unflatten(0, (-1, number)).clone()
            table[:, :len(order)] = table[:, order]
            weights[name] = table.flatten(0, 1)
        if 'fc_reg' in name:  # a box of each class
            table = weight.unflatten(0, (helpers.NUM_CLASSES, 4))
            weights[name] = table[order].flatten(0, 1)
    return weights


@pytest.mark.parametrize('name', CLASSES)
def test_a_teacher_of_classes_in_another_order(name, detections, tmp_path,
                                               monkeypatch):
    """With --class-map it says what it says in the student's order."""
    prepare, read = detections
    config = prepare(name)
    model = helpers.detector(name)
    student = helpers.save_teacher(model, tmp_path, 1)['checkpoint']
    weights = helpers.build(model, 2).state_dict()
    order, names = [2, 0, 1], helpers.CLASSES
    torch.save(dict(state_dict=weights), tmp_path / 'same.pth')
    meta = dict(dataset_meta=dict(classes=[names[i] for i in order]))
    torch.save(
        dict(state_dict=permuted(weights, order), meta=meta),
        tmp_path / 'other.pth')
    found = []
    for checkpoint, *flags in (('same.pth', ), ('other.pth', '--class-map',
                                                'names'),
                               ('other.pth', '--class-map', 1, 2, 0)):
        run(monkeypatch, config, student, config, tmp_path / checkpoint,
            '--split', 'test', '--work-dir', tmp_path / 'out', *flags)
        found.append(read())
    assert found[0] == found[1] == found[2]
    with refused('--class-map', "label 0 is .* set it to 'names'"):
        run(monkeypatch, config, student, config, tmp_path / 'other.pth',
            '--split', 'test', '--work-dir', tmp_path / 'out')


def test_a_teacher_of_more_classes(detections, tmp_path, monkeypatch):
    """The error advises --class-map, which works."""
    prepare, read = detections
    config = prepare('retina')
    student = helpers.save_teacher(helpers.detector('retina'), tmp_path,
                                   1)['checkpoint']
    arguments = (config, student, *teacher_of_more_classes(tmp_path),
                 '--split', 'test', '--work-dir', tmp_path / 'out')
    with refused('--class-map', "set it to 'names'"):
        run(monkeypatch, *arguments)
    run(monkeypatch, *arguments, '--class-map', 'names')
    assert {row[1] for row in read()} <= {1, 2, 3}


def test_a_new_style_config(detections, tmp_path, monkeypatch):
    """Says what the same config of strings says."""
    prepare, read = detections
    config = prepare('retina')
    new = tmp_path / 'new.py'
    helpers.write_new_style(Config.fromfile(str(config)), new)
    weights = [
        helpers.save_teacher(helpers.detector('retina'), tmp_path,
                             seed)['checkpoint'] for seed in (1, 2)
    ]
    found = []
    for each in (config, new):
        run(monkeypatch, each, weights[0], each, weights[1], '--split', 'test',
            '--work-dir', tmp_path / 'out')
        found.append(read())
    assert found[0] == found[1]
