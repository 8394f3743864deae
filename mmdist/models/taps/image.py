"""Classification heads: a row is an image."""
from functools import partial
from typing import Dict, List

from torch import nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from ..class_mapping import check_numbers
from .base import LogitPair, LogitTap, pair_of
from .batch import TeacherBatch
from .columns import Columns
from .labels import labels_of_images
from .watch import Call, LossCall, tensors_in


@TAPS.register_module()
class ImageTap(LogitTap):
    """Heads that classify whole images (MMPretrain).

    As in the authors' classification code (https://github.com/hunto/DIST_KD),
    the rows are the images of the batch and the columns its classes. The
    teacher is shown the very images that the student sees, after mixup,
    CutMix and the like.

    A head with several outputs (Conformer) learns from as many of the
    teacher; if the teacher has another number, each learns from the
    teacher's sum, by which such heads predict.
    """
    priority = 90
    reads = (LossCall('_get_loss', ('cls_score', )), )
    rows = 'images'

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        for paths, field in ((list(self.heads), 'model.student'),
                             (found, 'model.teacher.config')):
            if len(paths) > 1:
                raise ConfigError(
                    field, f'it has several heads ({", ".join(paths)}), and '
                    'it is not clear which one to distil',
                    'choose a model with one')
        return super()._match(student, teacher, found)

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(N, C)`` logits for each output of the head."""
        twin = self.heads[call.path]
        activation = _activation_of(batch.model.get_submodule(twin))
        outputs = list(tensors_in(batch.head_outputs([twin])[twin]))
        if len(outputs) != len(call.logits):
            outputs = [sum(outputs)] * len(call.logits)
        pairs = []
        for i, (own, theirs) in enumerate(zip(call.logits, outputs)):
            # Some heads do not say how many classes they have.
            number = own.shape[1]
            check_numbers(number, theirs.shape[1], self.class_map)
            pair = pair_of(self, call, batch,
                           (own, Columns(number, _activation_of(call.head))),
                           (theirs, Columns(theirs.shape[1], activation)))
            pair.name = f'output {i}'
            pair.labels = partial(labels_of_images,
                                  call.arguments['data_samples'], number)
            pairs.append(pair)
        return pairs

    def is_classification_loss(self, name: str) -> bool:
        """Always True of a loss: a classifier has no others."""
        return 'loss' in name

    def _describe_rows(self, student: nn.Module, path: str) -> str:
        head = student.get_submodule(path)
        number = getattr(head, 'num_classes', None) or 'classes'
        return f'images x {number} ({_activation_of(head)})'


def _activation_of(head: nn.Module) -> str:
    """Activation by which a head predicts: 'sigmoid' for several labels of an
    image, whatever it was trained with."""
    from mmpretrain.models.heads import MultiLabelClsHead
    return 'sigmoid' if isinstance(head, MultiLabelClsHead) else 'softmax'
