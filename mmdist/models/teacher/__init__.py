from ..taps.batch import TeacherBatch
from .checkpoint import load_strictly, read_checkpoint
from .model import Renormalise, Teacher, build_model, preserve_rng

__all__ = [
    'Renormalise', 'Teacher', 'TeacherBatch', 'build_model', 'load_strictly',
    'preserve_rng', 'read_checkpoint'
]
