"""Both ways in which DIST is computed pass every test of the losses."""
import pytest

from mmdist.models.losses import blocks, direct


@pytest.fixture(autouse=True, params=['whole', 'in blocks'])
def way(request, monkeypatch):
    """Small tables whole, or all in blocks of a few rows."""
    if request.param == 'in blocks':
        monkeypatch.setattr(direct, 'SMALL', 0)
        monkeypatch.setattr(blocks, 'BLOCKS', dict(cpu=(24, 24)))
        monkeypatch.setattr(blocks, 'LANES', 1)
    return request.param
