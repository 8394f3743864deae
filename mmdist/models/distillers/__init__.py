from .base import BaseDistiller
from .classifier import DistillClassifier
from .detector import DistillDetector
from .segmentor import DistillSegmentor

__all__ = [
    'BaseDistiller', 'DistillClassifier', 'DistillDetector', 'DistillSegmentor'
]
