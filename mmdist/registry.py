"""Registries of mmdist.

``type='mmdist.X'`` in a config resolves here as soon as the package is
imported through ``custom_imports = dict(imports=['mmdist'])``.
"""
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

HOOKS = Registry('hook', parent=MMENGINE_HOOKS, locations=['mmdist.engine'])
MODELS = Registry(
    'model',
    parent=MMENGINE_MODELS,
    locations=['mmdist.models', 'mmdist.models.backbones'])
# Kinds of heads: MMEngine has no such registry.
TAPS = Registry('tap', locations=['mmdist.models.taps'])
