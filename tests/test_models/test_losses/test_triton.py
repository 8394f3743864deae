"""The kernels in Triton, by its interpreter, in a process of their own."""
import os
import subprocess
import sys

import pytest

pytest.importorskip('triton', reason='Triton comes with PyTorch on Linux')
NAME = 'tests.test_models.test_losses.triton_cases'


@pytest.fixture(autouse=True)
def way():
    """There is one way only."""


@pytest.mark.slow
@pytest.mark.parametrize('case, interpret', [('values', '1'), ('opt_in', '1'),
                                             ('compiled', '0')])
def test_kernels(case, interpret, repo, tmp_path):
    """TRITON_INTERPRET stands before Triton is imported."""
    env = dict(
        os.environ,
        TRITON_INTERPRET=interpret,
        TRITON_CACHE_DIR=str(tmp_path),
        PYTHONPATH=repo)
    done = subprocess.run([sys.executable, '-m', NAME, case],
                          cwd=repo,
                          env=env,
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith('done\n')
