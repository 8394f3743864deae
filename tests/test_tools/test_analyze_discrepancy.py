"""tools/analysis_tools/analyze_discrepancy.py on detectors and segmentors."""
import json
import os.path as osp
import runpy
import sys

import cv2
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset, RepeatDataset

from mmdist.errors import ConfigError
from tests import helpers, segmentors
from tests.refusals import refused
from tests.test_tools.conftest import (TASKS, teacher_of_more_classes,
                                       without_annotations)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOL = osp.join(ROOT, 'tools', 'analysis_tools', 'analyze_discrepancy.py')


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    monkeypatch.syspath_prepend(osp.dirname(TOOL))
    runpy.run_path(TOOL, run_name='__main__')


@pytest.mark.parametrize('name', TASKS)
def test_teachers_are_compared(name, prepared, tmp_path, monkeypatch):
    """The student itself is at no distance, another is at some."""
    config, own, other = prepared(name)
    out = tmp_path / 'out'
    run(monkeypatch, config, own, config, own, config, other, '--out-dir', out,
        '--batches', 2)
    results = json.loads((out / 'discrepancy.json').read_text())
    assert list(results) == [f'{name}_0', f'{name}_1']
    same, different = (r['groups']['all'] for r in results.values())
    assert same['rows'] == different['rows'] > 0
    assert same['kl'] == pytest.approx(0, abs=1e-6)
    assert different['kl'] > 1e-6
    assert same['top-1 agreement'] == 1 > different['top-1 agreement']
    assert any(row['labelled'] for row in results[f'{name}_0']['classes'])
    table = (out / 'discrepancy.md').read_text()
    assert f'| {name}_1 | foreground |' in table
    pictures = {path.name for path in out.glob('*.png')}
    assert pictures == {
        'classes.png', 'reliability.png', f'correlation_{name}_0.png',
        f'correlation_{name}_1.png'
    }


def test_all_parts_of_a_data_set_are_seen(prepared, tmp_path, monkeypatch):
    """Of a ConcatDataset, in training and in validation."""
    config, own, other = prepared('pspnet')
    cfg = Config.fromfile(config)
    part = cfg.val_dataloader.dataset
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset = dict(
            type='ConcatDataset', datasets=[part, dict(part)])
        loader.batch_size = 1
    cfg.train_dataloader.dataset.datasets[0].pipeline = Config.fromfile(
        config).train_dataloader.dataset.pipeline
    cfg.dump(str(tmp_path / 'both.py'))
    rows = []
    for name in (config, tmp_path / 'both.py'):
        run(monkeypatch, name, own, config, other, '--out-dir', tmp_path)
        found = json.loads((tmp_path / 'discrepancy.json').read_text())
        rows.append(found['pspnet']['groups']['all']['rows'])
    assert rows[1] == 2 * rows[0] > 0


def test_it_says_the_same_again(prepared, tmp_path, monkeypatch):
    """From a seed, the sampled RoIs included."""
    config, own, other = prepared('faster')
    found = []
    for folder in ('one', 'two'):
        run(monkeypatch, config, own, config, other, '--out-dir',
            tmp_path / folder)
        found.append((tmp_path / folder / 'discrepancy.json').read_text())
    assert found[0] == found[1]


def test_wrong_weights_are_refused(prepared, tmp_path, monkeypatch):
    """Of the student, by the name of the argument; nothing is written."""
    config, own, _ = prepared('retina')
    torch.save({'bbox_head.retina_cls.bias': torch.zeros(3)},
               tmp_path / 'bad.pth')
    for checkpoint in ('bad.pth', 'none.pth'):
        with refused('CHECKPOINT', checkpoint):
            run(monkeypatch, config, tmp_path / checkpoint, config, own,
                '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', TASKS)
def test_new_style_configs_say_the_same(name, prepared, tmp_path, monkeypatch):
    """The library and its names follow from the model's class."""
    config, own, other = prepared(name)
    (tmp_path / 'new').mkdir()
    new = tmp_path / 'new' / config.name
    helpers.write_new_style(Config.fromfile(str(config)), new)
    found = []
    for each in (config, new):
        run(monkeypatch, each, own, each, other, '--out-dir', tmp_path,
            '--batches', 1)
        found.append((tmp_path / 'discrepancy.json').read_text())
    assert found[0] == found[1]


def test_one_column_is_told_from_the_background(tmp_path, monkeypatch, capsys):
    """Random models are not always right, nor do they always agree."""
    data = segmentors.write_masks(tmp_path / 'data')
    for path in (data / 'ann').iterdir():
        mask = cv2.imread(str(path), 0)
        mask[(mask > 0) & (mask < segmentors.IGNORED)] = 1
        mask[:8] = segmentors.IGNORED  # a row of logits
        cv2.imwrite(str(path), mask)
    model = segmentors.one_column(0.5)
    cfg = segmentors.run_cfg(model, data, tmp_path, 1)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.metainfo = dict(classes=('ground', 'thing'))
    cfg.val_dataloader = cfg.test_dataloader
    cfg.dump(str(tmp_path / 'column.py'))
    own, other = (
        segmentors.save_teacher(model, tmp_path, seed)['checkpoint']
        for seed in (1, 2))
    # in the middle of what they say, so that both answers occur
    for path in (own, other):
        content = torch.load(path)
        built = segmentors.build(model)
        built.load_state_dict(content['state_dict'])
        inputs, _ = segmentors.prepared(built.eval(), segmentors.batch())
        with torch.no_grad():
            built.decode_head.conv_seg.bias -= built(inputs).median()
        content['state_dict'] = built.state_dict()
        torch.save(content, path)
    run(monkeypatch, tmp_path / 'column.py', own, tmp_path / 'column.py',
        other, '--out-dir', tmp_path / 'out')
    found = json.loads((tmp_path / 'out' / 'discrepancy.json').read_text())
    found = found['column']
    rows = {name: group['rows'] for name, group in found['groups'].items()}
    assert 0 < rows['foreground'] < rows['background']
    assert rows['foreground'] + rows['background'] < rows['all']  # ignored
    thing, ground = found['classes']
    # two heads answer for every pixel of theirs
    assert [thing['labelled'],
            ground['labelled']] == [rows['foreground'], rows['background']]
    assert 0 < found['groups']['all']['top-1 agreement'] < 1
    for side in ('student', 'teacher'):
        assert 0 < thing[side] < 1 or 0 < ground[side] < 1
    text = (tmp_path / 'out' / 'discrepancy.md').read_text()
    assert '| thing | ' in text and '| background | ' in text
    said = ('Left out for column, since it means nothing for its class '
            'logits: inter, spearman, kendall')
    assert said in text and said in capsys.readouterr().out
    assert (tmp_path / 'out' / 'classes.png').is_file()


@pytest.mark.parametrize('name', ['retina', 'yolox'])
def test_one_class_of_detectors(name, tmp_path, monkeypatch):
    """YOLOX's classes do not say whether there is an object."""
    model = helpers.detector(name, bbox_head=dict(num_classes=1))
    data = helpers.write_coco(tmp_path / 'data')
    cfg = helpers.run_cfg(model, data, tmp_path, 1)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.metainfo = dict(classes=helpers.CLASSES[:1])
    cfg.val_dataloader = cfg.test_dataloader
    config = tmp_path / 'one.py'
    cfg.dump(str(config))
    own, other = (
        helpers.save_teacher(model, tmp_path, seed)['checkpoint']
        for seed in (1, 2))
    run(monkeypatch, config, own, config, other, '--out-dir', tmp_path)
    found = json.loads((tmp_path / 'discrepancy.json').read_text())['one']
    assert found['left_out'][:3] == ['inter', 'spearman', 'kendall']
    if name == 'yolox':
        assert 'accuracy' in found['left_out']
        assert list(found['classes'][0]) == ['intra']
        assert 'top-1 agreement' not in found['groups']['all']
        return
    thing, background = found['classes']
    rows = {key: group['rows'] for key, group in found['groups'].items()}
    assert thing['labelled'] == rows['foreground'] > 0
    assert background['labelled'] == rows['background']
    # random weights say an object everywhere
    assert (thing['teacher'], background['teacher']) == (1, 0)


@pytest.mark.parametrize('interval', [1, 10])
def test_a_batch_may_be_resized_at_random(interval, prepared, tmp_path,
                                          monkeypatch):
    """As stock YOLOX does every tenth iteration, which must be known."""
    config, own, other = prepared('retina')
    cfg = Config.fromfile(str(config))
    cfg.model.data_preprocessor.batch_augments = [
        dict(
            type='BatchSyncRandomResize',
            random_size_range=(96, 192),
            interval=interval)
    ]
    cfg.dump(str(config))
    rows = []
    for _ in range(2):
        run(monkeypatch, config, own, config, other, '--out-dir', tmp_path)
        found = json.loads((tmp_path / 'discrepancy.json').read_text())
        rows.append(found['retina']['groups']['all']['rows'])
    assert rows[0] == rows[1] > 0  # sizes are those of the seed


@pytest.mark.parametrize('name', TASKS)
def test_data_without_annotations_are_refused(name, prepared, tmp_path,
                                              monkeypatch):
    """In one sentence; nothing is written."""
    config, own, other = prepared(name)
    without_annotations(config)
    with pytest.raises(
            ConfigError,
            match='STUDENT: its test_dataloader.dataset has no annotations'):
        run(monkeypatch, config, own, config, other, '--split', 'test',
            '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_a_teacher_of_more_classes(prepared, tmp_path, monkeypatch):
    """By names or by a list, which say the same; the error says how."""
    config, own, _ = prepared('retina')
    models = config, own, *teacher_of_more_classes(tmp_path)
    with refused('--class-map', 'predicts 5 classes'):
        run(monkeypatch, *models, '--out-dir', tmp_path)
    found = []
    for spec in (['names'], helpers.CLASSES, [3, 2, 1]):
        run(monkeypatch, *models, '--out-dir', tmp_path, '--class-map', *spec)
        found.append((tmp_path / 'discrepancy.json').read_text())
    assert found[0] == found[1] == found[2]
    run(monkeypatch, *models, '--out-dir', tmp_path, '--class-map', 1, 2, 3)
    assert found[0] != (tmp_path / 'discrepancy.json').read_text()


def test_classes_of_other_names_are_refused(prepared, tmp_path, monkeypatch):
    """As a training would; --class-map is what the sentence advises."""
    config, own, other = prepared('retina')
    content = torch.load(other)
    names = helpers.CLASSES[::-1]
    torch.save(
        dict(content, meta=dict(dataset_meta=dict(classes=names))), other)
    models = config, own, config, other
    with refused('--class-map', "label 0 is .* set it to 'names'"):
        run(monkeypatch, *models, '--out-dir', tmp_path)
    run(monkeypatch, *models, '--out-dir', tmp_path, '--class-map', 'names')


class Listed(BaseDataset):
    """A data set with given fields."""

    def __init__(self, infos):
        self.infos = infos
        super().__init__()

    def load_data_list(self):
        return self.infos


@pytest.mark.parametrize('infos, annotated', [
    ([dict(instances=[]),
      dict(instances=[dict(bbox_label=0)])], True),
    ([dict(instances=[]), dict(instances=[])], False),
    ([dict(img_path='a', reduce_zero_label=False)], False),
    ([dict(img_path='a', reduce_zero_label=False, seg_map_path='b')], True),
    ([dict(img_path='a', gt_label=1)], True),
    ([dict(img_path='a')], False),
    ([dict(img_path='a', mine=1)], True),
])
def test_which_data_have_annotations(infos, annotated, monkeypatch):
    """As the fields of MMDetection, MMSegmentation and MMPretrain say."""
    monkeypatch.syspath_prepend(osp.dirname(TOOL))
    from student_teachers import is_annotated
    dataset = Listed(infos)
    assert is_annotated(dataset) == annotated
    assert is_annotated(RepeatDataset(dataset, times=2)) == annotated
    assert is_annotated([1, 2])  # of another kind
