from .monitor import TeacherMonitor
from .resuming import SeedHook, WholeFiles, newest_checkpoint

__all__ = ['SeedHook', 'TeacherMonitor', 'WholeFiles', 'newest_checkpoint']
