from .base import BaseDistiller
from .detector import DistillDetector

__all__ = ['BaseDistiller', 'DistillDetector']
