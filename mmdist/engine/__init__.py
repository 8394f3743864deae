from .monitor import TeacherMonitor

__all__ = ['TeacherMonitor']
