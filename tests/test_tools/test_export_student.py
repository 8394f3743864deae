"""tools/model_converters/export_student.py: what MMDetection alone loads."""
import os.path as osp
import runpy
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import load_file

from mmdist.errors import ConfigError
from tests.helpers import (assert_same, build, checkpoint, detector,
                           distiller_cfg, run_cfg, save_teacher, train,
                           write_coco)

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOL = osp.join(ROOT, 'tools', 'model_converters', 'export_student.py')
EMA = dict(type='EMAHook', momentum=0.5)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with mimic and an EMA: (its folder, its config)."""
    root = tmp_path_factory.mktemp('export')
    data = write_coco(root / 'data')
    model = distiller_cfg(
        detector('retina'),
        save_teacher(detector('retina'), root),
        mimic_loss=dict(type='mmdist.MimicLoss'))
    cfg = run_cfg(model, data, root, custom_hooks=[EMA])
    cfg.dump(str(root / 'config.py'))
    train(model, data, root, custom_hooks=[EMA])
    return root, str(root / 'config.py')


@pytest.fixture
def export(monkeypatch):
    """Run the tool in this process."""

    def export(*arguments):
        monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
        runpy.run_path(TOOL, run_name='__main__')

    return export


def test_the_plain_student_loads_it(run, export, tmp_path):
    """Strictly; the averaged weights, and nothing else but names."""
    root, config = run
    export(config, root / 'epoch_2.pth', tmp_path / 'student.pth')
    content = torch.load(tmp_path / 'student.pth', weights_only=True)
    assert set(content) == {'meta', 'state_dict'}
    assert content['meta']['epoch'] == 2 and 'cfg' not in content['meta']
    assert len(content['meta']['dataset_meta']['classes']) == 3
    model = build(detector('retina'))
    model.load_state_dict(content['state_dict'], strict=True)
    trained = checkpoint(root, 2)
    assert any('distiller' in name for name in trained['state_dict'])
    assert_same(model.state_dict(), {
        k: v
        for k, v in trained['state_dict'].items() if 'distiller' not in k
    })
    size = (tmp_path / 'student.pth').stat().st_size
    assert size < 0.6 * (root / 'epoch_2.pth').stat().st_size


def test_the_last_weights(run, export, tmp_path):
    """--last takes what the EMAHook put aside."""
    root, config = run
    for name, flags in (('average', []), ('last', ['--last'])):
        export(config, root / 'epoch_2.pth', tmp_path / f'{name}.safetensors',
               *flags)
    average, last = (
        load_file(tmp_path / f'{name}.safetensors')
        for name in ('average', 'last'))
    aside = checkpoint(root, 2)['ema_state_dict']
    assert_same(
        last, {
            name: aside[f'module.{name}']
            for name in build(detector('retina')).state_dict()
        })
    name = 'bbox_head.retina_cls.weight'
    assert not torch.equal(average[name], last[name])


def test_what_is_refused(run, export, tmp_path):
    """Nothing is overwritten, and no wrong student is written."""
    root, config = run
    out = tmp_path / 'student.pth'
    out.write_text('mine')
    with pytest.raises(ConfigError, match='--force'):
        export(config, root / 'epoch_2.pth', out)
    with pytest.raises(ValueError, match='must end with .pth'):
        export(config, root / 'epoch_2.pth', tmp_path / 'student.onnx')
    cfg = Config.fromfile(config)
    cfg.model.student.bbox_head.num_classes = 4
    cfg.dump(str(tmp_path / 'other.py'))
    with pytest.raises(ValueError, match='not of the student of this config'):
        export(tmp_path / 'other.py', root / 'epoch_2.pth', out, '--force')
    export(config, root / 'epoch_2.pth', out, '--force')
    with pytest.raises(ValueError, match='EMAHook'):
        export(config, out, out, '--force', '--last')
    assert 'state_dict' in torch.load(out, weights_only=True)


@pytest.mark.slow
def test_mmdetection_alone_reads_it(run, export, tmp_path):
    """In an interpreter that never imports mmdist."""
    root, config = run
    export(config, root / 'epoch_2.pth', tmp_path / 'student.pth')
    cfg = Config(dict(model=Config.fromfile(config).model.student))
    cfg.test_dataloader = Config.fromfile(config).test_dataloader
    cfg.dump(str(tmp_path / 'plain.py'))
    code = ('import sys; from mmdet.apis import init_detector; '
            'm = init_detector("plain.py", "student.pth", device="cpu"); '
            'assert "mmdist" not in sys.modules; print(m.dataset_meta)')
    done = subprocess.run([sys.executable, '-c', code],
                          cwd=tmp_path,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert 'square' in done.stdout
