"""The losses with nothing but PyTorch."""
import subprocess
import sys

import pytest

pytestmark = pytest.mark.usefixtures('way')
BLOCKED = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'numpy',
           'scipy', 'triton')
CODE = f"""
import sys
sys.modules.update(dict.fromkeys({BLOCKED}))  # None: cannot be imported
import torch
import mmdist, mmdist.models, mmdist.models.losses
from mmdist.models.losses.functional import dist_terms, kd_terms, mimic_terms
student, teacher = torch.randn(2, 6, 5)
student.requires_grad_()
terms = dist_terms(student, teacher) | kd_terms(student, teacher)
(sum(terms.values()) + mimic_terms([student], [teacher])['mimic']).backward()
assert student.grad.isfinite().all()
assert not [n for n in sys.modules if n.startswith('mmdist.registry')]
print(mmdist.__version__)
"""


@pytest.fixture
def way():
    """There is one way only."""


@pytest.mark.slow
def test_the_functions_need_pytorch_alone(repo):
    """Neither MMEngine nor anything above it, nor Triton where asked for."""
    done = subprocess.run([sys.executable, '-c', CODE],
                          cwd=repo,
                          env=dict(PATH='', MMDIST_TRITON='1'),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('.') == 2
