"""Refusals of a user's config."""
from contextlib import contextmanager

import pytest

from mmdist.errors import ConfigError


@contextmanager
def refused(field, words=''):
    """Expect a ConfigError for a field, whose text matches."""
    with pytest.raises(ConfigError, match=words or None) as caught:
        yield
    assert caught.value.field == field
