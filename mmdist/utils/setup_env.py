"""Checks and preparations of ``import mmdist``."""
import importlib.metadata
import warnings
from typing import Any

import numpy as np
import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.utils import digit_version

# module: (lowest version it works with, highest version it was tested with)
SUPPORTED_VERSIONS = dict(
    torch=('2.6.0', '2.14.1'),
    mmengine=('0.10.5', '0.10.12'),
    mmcv=('2.1.0', '2.3.6'),
    mmdet=('3.3.0', '3.5.1'),
    mmseg=('1.2.2', '1.4.2'),
    mmpretrain=('1.2.0', '1.3.6'))


def check_version(module: str, version: str) -> None:
    """Compare the version of a dependency with ``SUPPORTED_VERSIONS``.

    Raises:
        AssertionError: If it is below the lower bound.
    """
    lowest, highest = SUPPORTED_VERSIONS[module]
    version = version.partition('+')[0]  # 2.13.0+cpu
    assert digit_version(version) >= digit_version(lowest), (
        f'{module}=={version} is used but mmdist needs {module}>={lowest}; '
        'please upgrade it.')
    if digit_version(version) > digit_version(highest):
        warnings.warn(f'{module}=={version} is newer than {highest}, the '
                      'newest that mmdist was tested with.')


def find_forks_configs() -> None:
    """Let MMEngine find ``'mmseg::…'`` bases of any distribution of mmseg.

    MMEngine asks for the distribution ``mmsegmentation``, which the maintained
    fork is not; the name of the imported package serves as well.
    """
    try:
        importlib.metadata.version(MODULE2PACKAGE['mmseg'])
    except importlib.metadata.PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'mmseg'


# MMEngine's checkpoints pickle these as ``getattr(owner, name)``: statistics
# of logged numbers, and how OneCycleLR anneals.
READABLE_ATTRIBUTES = {
    HistoryBuffer: ('min', 'max', 'current', 'mean'),
    OneCycleParamScheduler: ('_annealing_cos', '_annealing_linear')
}


def _attribute(owner: Any, name: str) -> Any:
    """``getattr`` for ``READABLE_ATTRIBUTES`` and no more.

    Allowing the real ``getattr`` would hand every attribute of every class to
    an untrusted file.
    """
    if not (isinstance(owner, type)
            and name in READABLE_ATTRIBUTES.get(owner, ())):
        raise AttributeError(f'a checkpoint may not read {owner}.{name}')
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read MMEngine's checkpoints.

    PyTorch loads with a restricted unpickler since 2.6 and refuses what
    MMEngine writes beside the weights: buffers of logged numbers, and the
    state of OneCycleLR. Exactly their globals are allowed; everything else
    stays refused.
    """
    multiarray = getattr(np, '_core', None) or np.core
    reconstruct = multiarray.multiarray._reconstruct
    scalar = multiarray.multiarray.scalar
    number_types = (np.float32, np.float64, np.int32, np.int64, np.bool_)
    torch.serialization.add_safe_globals([
        (_attribute, 'builtins.getattr'),
        *READABLE_ATTRIBUTES,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(number))
          for number in number_types},
        # NumPy 1 and 2 write different names for the same function.
        (reconstruct, 'numpy.core.multiarray._reconstruct'),
        (reconstruct, 'numpy._core.multiarray._reconstruct'),
        (scalar, 'numpy.core.multiarray.scalar'),
        (scalar, 'numpy._core.multiarray.scalar'),
    ])
