"""Real digits through the command line, as a user runs them."""
import os
import os.path as osp
import pickle
import re
import subprocess
import sys

import pytest
import torch

from .models import classifier  # noqa: F401, without MMPretrain it skips

from mmdist.datasets import write_digit_images  # isort: skip

pytestmark = pytest.mark.slow
ROOT = osp.dirname(osp.dirname(osp.dirname(__file__)))
NAMES = dict(
    teacher='resnet14-w16_1xb32-10e_digits.py',
    alone='resnet8-w2_1xb32-10e_digits.py',
    dist='dist_resnet8-w2-resnet14-w16_1xb32-10e_digits.py')


def run(tool, name, folder, *more):
    """One of the tools, and what it logged."""
    data = os.path.join(folder, 'data')
    options = [
        f'{part}_dataloader.{key}'
        for part, split in (('train', 'train'), ('val', 'val'), ('test',
                                                                 'val'))
        for key in (f'dataset.data_root={data}/{split}', 'num_workers=0',
                    'persistent_workers=False')
    ]
    done = subprocess.run([
        sys.executable,
        osp.join(ROOT, 'tools', tool),
        osp.join(ROOT, 'configs', 'dist_cls',
                 NAMES[name]), *more, '--work-dir',
        osp.join(folder, name), '--cfg-options', *options,
        *([f'model.teacher.checkpoint={folder}/teacher/epoch_10.pth']
          if name == 'dist' else [])
    ],
                          cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS='1'),
                          capture_output=True,
                          text=True)
    assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def accuracy(log):
    """The last one that was logged, in percent."""
    return float(re.findall(r'accuracy/top1: ([\d.]+)', log)[-1])


def test_digits(tmp_path):
    """The distilled student is better, and its weights are a plain one's."""
    folder = str(tmp_path)
    write_digit_images(osp.join(folder, 'data'))
    found = {name: accuracy(run('train.py', name, folder)) for name in NAMES}
    assert found['teacher'] > 97
    assert found['dist'] > found['alone'] + 2
    checkpoint = osp.join(folder, 'dist', 'epoch_10.pth')
    keys = torch.load(checkpoint, weights_only=True)['state_dict'].keys()
    plain = osp.join(folder, 'alone', 'epoch_10.pth')
    assert keys == torch.load(plain, weights_only=True)['state_dict'].keys()
    for config in ('alone', 'dist'):
        drawn = osp.join(folder, 'drawn', config)
        log = run('test.py', config, folder, checkpoint, '--out',
                  f'{drawn}.pkl', '--show-dir', drawn)
        assert accuracy(log) == found['dist']
        with open(f'{drawn}.pkl', 'rb') as file:
            assert len(pickle.load(file)) == 449
        assert os.listdir(drawn)
    # flipped digits are others, but most are still found
    log = run('test.py', 'alone', folder, plain, '--tta')
    assert 30 < accuracy(log) < 100
    assert len(browsed(folder)) == 3


def browsed(folder):
    """The pictures of the student beside its teacher."""
    models = [
        osp.join(folder, name, file) for name in ('alone', 'teacher')
        for file in (NAMES[name], 'epoch_10.pth')
    ]
    out = osp.join(folder, 'browsed')
    tool = osp.join(ROOT, 'tools', 'analysis_tools', 'browse_predictions.py')
    subprocess.run(
        [sys.executable, tool, *models, '--number', '3', '--out-dir', out],
        cwd=ROOT,
        check=True)
    return os.listdir(out)
