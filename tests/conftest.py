"""Fixtures that every test may use."""
import os
import os.path as osp

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

import mmdist.utils
from tests.quick import quick

REPO = osp.dirname(osp.dirname(osp.abspath(__file__)))


@pytest.fixture(scope='session', autouse=True)
def one_thread():
    """Tests that run side by side must not fight for the cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope='session', autouse=True)
def quick_runners():
    """See :func:`tests.quick.quick`."""
    with quick():
        yield


@pytest.fixture(autouse=True)
def no_traces():
    """A runner leaves its scope, scalars and visualizer behind; the next test
    must not see them."""
    yield
    # Every class keeps instances of its own, subclasses too.
    for manager in (DefaultScope, MessageHub, Visualizer,
                    *Visualizer.__subclasses__()):
        manager._instance_dict.clear()


@pytest.fixture(autouse=True)
def errors_themselves(monkeypatch):
    """Tests of a tool want its error, not the sentence that users see."""
    monkeypatch.setattr(mmdist.utils, 'run_tool', lambda main: main())


@pytest.fixture(scope='session')
def repo():
    """The folder of the checkout."""
    return REPO


@pytest.fixture(scope='session')
def shared():
    """The folder of real data and reference vectors beside the checkout."""
    folder = os.environ.get('MMDIST_SHARED', osp.join(REPO, '..', 'shared'))
    if not osp.isdir(folder):
        pytest.skip('no shared data: set MMDIST_SHARED to their folder')
    return folder
