"""What tests of the monitor share."""
import logging

import pytest
from mmengine.logging import MMLogger


@pytest.fixture
def log(caplog):
    """What is logged as a warning, or said."""
    logger = MMLogger.get_instance('monitor', logger_name='monitor')
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    MMLogger._instance_dict.pop('monitor', None)
