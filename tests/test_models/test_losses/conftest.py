"""Both ways in which DIST is computed pass every test of the losses."""
import pytest

from mmdist.models.losses import functional, fused


@pytest.fixture(autouse=True, params=['as written', 'in blocks'])
def way(request, monkeypatch):
    """Small tables as written, or all in blocks of a few rows."""
    if request.param == 'in blocks':
        monkeypatch.setattr(functional, 'SMALL', 0)
        monkeypatch.setattr(fused, 'BLOCKS', dict(cpu=(24, 24)))
    return request.param
