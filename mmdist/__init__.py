"""DIST for MMDetection, MMSegmentation and MMPretrain.

Importing the package registers its losses and wrappers, so that a config
needs no more than ``custom_imports = dict(imports=['mmdist'])``.
"""
from .errors import ConfigError
from .optional import HAS_MMENGINE
from .version import __version__

if HAS_MMENGINE:
    import mmcv
    import mmengine
    import torch

    from . import models
    from .utils import (allow_mmengine_checkpoints, check_version,
                        find_forks_configs)

    for _module in (torch, mmengine, mmcv):
        check_version(_module.__name__, _module.__version__)
    allow_mmengine_checkpoints()
    find_forks_configs()

__all__ = ['ConfigError', '__version__', 'models']
