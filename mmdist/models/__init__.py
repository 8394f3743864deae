from mmdist.optional import HAS_MMENGINE

if HAS_MMENGINE:
    from .distillers import *  # noqa: F401,F403
    from .losses import *  # noqa: F401,F403
