"""Classification heads: a row is an image."""
from functools import partial
from typing import TYPE_CHECKING, Dict, List

from torch import nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from ..class_mapping import check_numbers
from .base import LogitPair, LogitTap, pair_of
from .columns import ClassLogits, Columns
from .labels import labels_of_images
from .watch import Call, LossCall, tensors_in

if TYPE_CHECKING:
    from ..teacher.batch import TeacherBatch


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
        for model, paths, field in ((student, list(self.heads),
                                     'model.student'),
                                    (teacher, found, 'model.teacher.config')):
            if len(paths) > 1:
                raise ConfigError(
                    field, f'it is a {type(model).__name__} with several '
                    f'heads ({", ".join(paths)}), of which nothing says which '
                    'to distil', 'choose a model with one')
        return super()._match(student, teacher, found)

    def pairs(self, call: Call, batch: 'TeacherBatch') -> List[LogitPair]:
        """One pair of ``(N, C)`` logits for each output of the head."""
        twin = self.heads[call.path]
        activation_s = _activation_of(call.head)
        activation_t = _activation_of(batch.model.get_submodule(twin))
        outputs_s = call.logits
        outputs_t = list(tensors_in(batch.head_outputs([twin])[twin]))
        if len(outputs_t) != len(outputs_s):
            outputs_t = [sum(outputs_t)] * len(outputs_s)
        pairs = []
        for i, (logits_s, logits_t) in enumerate(zip(outputs_s, outputs_t)):
            number_s, number_t = logits_s.shape[1], logits_t.shape[1]
            # Some heads do not say how many classes they have.
            check_numbers(number_s, number_t, self.class_map)
            pairs.append(
                pair_of(
                    self,
                    call,
                    batch,
                    ClassLogits(logits_s, Columns(number_s, activation_s)),
                    ClassLogits(logits_t, Columns(number_t, activation_t)),
                    name=f'output {i}',
                    labels=partial(labels_of_images,
                                   call.arguments['data_samples'], number_s)))
        return pairs

    def is_classification_loss(self, name: str) -> bool:
        """All losses of a classifier are."""
        return 'loss' in name

    def _describe_rows(self, student: nn.Module) -> str:
        head = student.get_submodule(next(iter(self.heads)))
        number = getattr(head, 'num_classes', None) or 'classes'
        return f'images x {number} ({_activation_of(head)})'


def _activation_of(head: nn.Module) -> str:
    """Activation by which a head predicts: 'sigmoid' for several labels of an
    image, whatever it was trained with."""
    from mmpretrain.models.heads import MultiLabelClsHead
    return 'sigmoid' if isinstance(head, MultiLabelClsHead) else 'softmax'
