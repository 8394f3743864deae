"""Rank correlations, against scipy's."""
import pytest
import torch
from scipy import stats

from mmdist.analysis import kendall, spearman

MEASURES = [(spearman, stats.spearmanr), (kendall, stats.kendalltau)]


@pytest.mark.parametrize('ours, theirs', MEASURES)
@pytest.mark.parametrize('ties', [False, True])
def test_rows_are_scipys(ours, theirs, ties):
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 20, 7, generator=rng)
    if ties:
        x, y = x.round(), y.round()
    expected = [theirs(a, b).statistic for a, b in zip(x.numpy(), y.numpy())]
    assert ours(x, y).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('ours, _', MEASURES)
def test_a_constant_row_has_no_order(ours, _):
    assert ours(torch.ones(1, 5), torch.randn(1, 5)).tolist() == [0]
