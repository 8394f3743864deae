from .base import BaseDistiller
from .detector import DistillDetector
from .segmentor import DistillSegmentor

__all__ = ['BaseDistiller', 'DistillDetector', 'DistillSegmentor']
