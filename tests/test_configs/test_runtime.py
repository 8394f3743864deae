"""Lines of all configs that let killed runs resume exactly."""
from pathlib import Path

import pytest
from mmengine.config import Config

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
PATHS = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py')
    if path.parts[len(CONFIGS.parts)] not in ('_base_', 'dist_cls'))


def assert_resumes_exactly(path):
    """Iterations are seeded and checkpoints whole, under every tool."""
    cfg = Config.fromfile(str(path))
    assert 'mmdist' in cfg.custom_imports.imports
    assert dict(type='mmdist.SeedHook') in cfg.custom_hooks
    assert cfg.default_hooks.checkpoint.backend_args.backend == 'mmdist.whole'


@pytest.mark.parametrize('path', PATHS)
def test_killed_runs_resume_exactly(path):
    assert_resumes_exactly(CONFIGS / path)
