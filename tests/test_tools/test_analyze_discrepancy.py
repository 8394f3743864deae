"""tools/analysis_tools/analyze_discrepancy.py on detectors and segmentors."""
import json
import os.path as osp
import runpy
import sys

import pytest
import torch
from mmengine.config import Config

from tests import helpers
from tests.test_tools.conftest import TASKS

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOL = osp.join(ROOT, 'tools', 'analysis_tools', 'analyze_discrepancy.py')


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    monkeypatch.syspath_prepend(osp.dirname(TOOL))
    with helpers.quick():
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
        with pytest.raises((ValueError, FileNotFoundError),
                           match='CHECKPOINT'):
            run(monkeypatch, config, tmp_path / checkpoint, config, own,
                '--out-dir', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
