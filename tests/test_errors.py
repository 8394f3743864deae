"""The error that names a field."""
import pickle

import pytest
from mmengine.registry import Registry

from mmdist.errors import ConfigError


def test_one_sentence_names_the_field():
    """Field, problem and remedy stand in one line, in this order."""
    error = ConfigError('model.alpha', '-1 is negative', 'use 0 or more')
    assert str(error) == 'model.alpha: -1 is negative; use 0 or more'
    assert str(ConfigError(
        'model.alpha', '-1 is negative')) == ('model.alpha: -1 is negative')


def test_the_field_survives_a_registry_and_a_process():
    """MMEngine's registries raise errors again, with a text alone; workers
    send them as pickles."""
    models = Registry('model')

    @models.register_module()
    class Model:

        def __init__(self):
            raise ConfigError('model.alpha', '-1 is negative')

    with pytest.raises(ConfigError) as raised:
        models.build(dict(type='Model'))
    for error in (raised.value, pickle.loads(pickle.dumps(raised.value))):
        assert (error.field, error.problem) == ('model.alpha',
                                                '-1 is negative')
