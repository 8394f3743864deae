from .monitor import TeacherMonitor
from .resuming import SeedHook, WholeFiles, is_whole, newest_checkpoint
from .schedule import DistillScheduleHook

__all__ = [
    'DistillScheduleHook', 'SeedHook', 'TeacherMonitor', 'WholeFiles',
    'is_whole', 'newest_checkpoint'
]
