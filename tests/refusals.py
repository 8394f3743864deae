"""Assertions about refused input."""
import re
from contextlib import contextmanager

import pytest

from mmdist import ConfigError


@contextmanager
def refused(field, *words):
    """The block ends with an error that names this field and these words."""
    with pytest.raises(ConfigError) as info:
        yield info
    assert info.value.field == field, info.value
    for word in words:
        assert re.search(word, str(info.value)), info.value
    assert '\n' not in str(info.value)
