from mmdist.optional import HAS_MMENGINE

if HAS_MMENGINE:
    from .base import LogitLoss
    from .dist_loss import DISTLoss
    from .kd_loss import KDLoss
    from .mimic_loss import MimicLoss

    __all__ = ['DISTLoss', 'KDLoss', 'LogitLoss', 'MimicLoss']
