"""DIST over several processes equals one process with the whole batch."""
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdist.models.losses import DISTLoss
from tests.test_models.test_losses.test_pearson import NoReading, logits

NUM_CLASSES = 5
# Rows of each process.
PARTS = [(20, 4), (9, 0, 1, 14)]


@pytest.fixture(autouse=True)
def way():
    """There is one way only."""


def step(pictures, targets, wrap=lambda model: model, **options):
    """Loss terms and the gradient of a linear student."""
    torch.manual_seed(0)
    student = wrap(nn.Linear(pictures.shape[1], NUM_CLASSES).double())
    terms = DISTLoss(**options).terms(student(pictures), targets)
    (terms['inter'] + terms['intra']).backward()
    return ({
        name: float(term)
        for name, term in terms.items()
    }, [p.grad for p in student.parameters()])


def whole_batch(num_rows):
    """Inputs of the student, and the teacher's logits."""
    return logits((num_rows, NUM_CLASSES))


def process(rank, parts, store, folder):
    """One of several processes; leaves its results in a file."""
    dist.init_process_group(
        'gloo',
        init_method=f'file://{store}',
        rank=rank,
        world_size=len(parts))
    own = [x.split(parts)[rank] for x in whole_batch(sum(parts))]
    with NoReading():  # nor tensors made of values
        DISTLoss(sync_intra=True).terms(*own)
    results = [
        step(*own, DistributedDataParallel, sync_intra=sync)
        for sync in (True, False)
    ]
    torch.save(results, f'{folder}/{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('parts', PARTS)
def test_gradients_are_those_of_the_whole_batch(parts, tmp_path):
    """After the mean that DistributedDataParallel takes; parts may differ."""
    mp.spawn(process, (parts, tmp_path / 'store', tmp_path), len(parts))
    terms, gradient = step(*whole_batch(sum(parts)))
    ranks = [torch.load(tmp_path / f'{i}.pth') for i in range(len(parts))]
    for (synced, grads), (alone, _) in ranks:
        torch.testing.assert_close(grads, gradient, rtol=1e-9, atol=1e-12)
        assert synced['intra'] == pytest.approx(terms['intra'], rel=1e-9)
        assert alone['intra'] != pytest.approx(terms['intra'], rel=1e-3)
    inter = [synced['inter'] for (synced, _), _ in ranks]
    assert sum(inter) / len(inter) == pytest.approx(terms['inter'], rel=1e-9)


def test_one_process_needs_no_group():
    """The option changes nothing there."""
    batch = whole_batch(12)
    assert not dist.is_initialized() and 'torch.distributed' in sys.modules
    assert step(*batch, sync_intra=True)[0] == step(*batch)[0]
