"""The losses with nothing but PyTorch."""
import re
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
OWN_LOOP = """
from torch.nn.functional import cross_entropy
student_logits = torch.randn(6, 5, requires_grad=True)
teacher_logits, labels = torch.randn(6, 5), torch.arange(6) % 5
"""


@pytest.fixture
def way():
    """There is one way only."""


@pytest.mark.slow
def test_the_functions_need_pytorch_alone(repo):
    """Neither MMEngine nor anything above it, nor Triton where asked for. The
    README's loop of one's own, too."""
    with open(f'{repo}/README.md', encoding='utf-8') as file:
        loop = re.search('```python\n(from mmdist.models.losses.*?)```',
                         file.read(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, '-c', CODE + OWN_LOOP + loop],
                          cwd=repo,
                          env=dict(PATH='', MMDIST_TRITON='1'),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('.') == 2
