from .base import BaseDistiller
from .wrappers import DistillClassifier, DistillDetector, DistillSegmentor

__all__ = [
    'BaseDistiller', 'DistillClassifier', 'DistillDetector', 'DistillSegmentor'
]
