"""Parts of the stack that may be missing.

The functions of the losses (:mod:`mmdist.models.losses.functional`) need
PyTorch alone, so that the packages above them import without MMEngine. All
else of mmdist needs it.
"""
from importlib.util import find_spec

HAS_MMENGINE = find_spec('mmengine') is not None
