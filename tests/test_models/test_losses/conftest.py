"""DIST in one chunk and in many passes every test of the losses."""
import pytest

from mmdist.models.losses import pearson


@pytest.fixture(autouse=True, params=['whole', 'in chunks'])
def way(request, monkeypatch):
    """Small tables whole, or all in chunks of a few rows, in the dtype and
    with what is kept of large ones."""
    if request.param == 'in chunks':
        in_chunks(monkeypatch)
    return request.param


def in_chunks(monkeypatch):
    """Small tables are computed as large ones are."""
    monkeypatch.setattr(pearson, 'SMALL_NUMEL', 0)
    monkeypatch.setattr(pearson, 'CHUNK_NUMEL', 24)
    monkeypatch.setattr(pearson, 'CHUNKS', 1)
