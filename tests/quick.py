"""Runners without what takes seconds and is not tested."""
from contextlib import contextmanager
from unittest import mock

from mmengine.runner import Runner


@contextmanager
def quick():
    """Runners give no report on compilers (4 s a run), and configs are not
    formatted (3 s a run); the fork's module formats fast."""
    with mock.patch.object(Runner, '_log_env', lambda *_: None), mock.patch(
            'mmengine.config.config.FormatCode',
            lambda text, **_: (text, True),
            create=True):
        yield
