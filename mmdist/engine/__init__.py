from .monitor import TeacherMonitor
from .resuming import SeedHook, WholeFiles, is_whole, newest_checkpoint

__all__ = [
    'SeedHook', 'TeacherMonitor', 'WholeFiles', 'is_whole', 'newest_checkpoint'
]
