"""RoI heads: a row is one of the student's sampled boxes."""
import inspect
from functools import partial
from typing import TYPE_CHECKING, Dict, List, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from .base import LogitPair, LogitTap, pair_of
from .columns import ClassLogits, Columns, activation_of, class_logits
from .labels import NONE, areas_of
from .watch import Call, LossCall, owner_of

if TYPE_CHECKING:
    from ..teacher.batch import TeacherBatch


@TAPS.register_module()
class RoITap(LogitTap):
    """Box heads that classify RoIs with one softmax (or sigmoid) for a box.

    The teacher is scored on the very RoIs that the student sampled, as in the
    authors' detection code (https://github.com/hunto/DIST_KD): it pools its
    own features at them, and neither proposes nor samples. Stage i of a
    cascade learns from stage i, and from the last where the teacher has
    fewer. A head that predicts several boxes for a RoI (CrowdDet) has as many
    rows.
    """
    priority = 50
    # `loss_and_target` ends in this call, which PISA and Soft Teacher make
    # themselves. PISA's sampler makes it, too, without naming the RoIs.
    reads = (LossCall('loss', ('cls_score', ), needs=('rois', )), )
    rows = 'RoIs'

    @classmethod
    def find(cls, model: nn.Module) -> List[str]:
        """Box heads; DIIHead inherits the loss call but does not make it."""

        def takes_rois(head: nn.Module) -> bool:
            targets = getattr(head, 'loss_and_target', None)
            return not targets or 'rois' in inspect.signature(
                targets).parameters

        return [
            path for path in super().find(model)
            if takes_rois(model.get_submodule(path))
        ]

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        return {
            path: found[min(split_stage(path)[1],
                            len(found) - 1)]
            for path in self.heads
        }

    def _check_heads(self, head_s: nn.Module, head_t: nn.Module) -> None:
        for head, field in ((head_s, 'model.student'),
                            (head_t, 'model.teacher.config')):
            width = getattr(
                getattr(head, 'fc_cls', None), 'out_features', None)
            known = None, head.num_classes, head.num_classes + 1
            # Seesaw loss turns logits into probabilities itself.
            custom = getattr(head, 'custom_activation', False)
            if width not in known and not custom:
                raise ConfigError(
                    field, f'it scores a RoI with {width} numbers for '
                    f'{head.num_classes} classes', 'use a loss_cls with one '
                    'column for each class and one for the background')

    def _check_images(self, calls: List[Call], batch: 'TeacherBatch') -> None:
        """RoIs may be of any images whose features are known."""
        if any(call.images is None for call in calls):
            raise ConfigError(
                'model.student', 'it does not compute its features by '
                '`extract_feat`, so the teacher cannot be shown the images '
                'of its RoIs')

    def pairs(self, call: Call, batch: 'TeacherBatch') -> List[LogitPair]:
        """One pair of ``(RoIs, classes + background)`` logits."""
        rois = call.arguments['rois']
        own = roi_logits(call.arguments['cls_score'], call.head)
        theirs = score_rois(batch, self.heads[call.path], call.images, rois)
        others = dict(
            weight=stage_weight(call),
            name=f'stage {split_stage(call.path)[1]}',
            areas=partial(areas_of, rois[:, 1:]))
        labels = call.arguments.get('labels')
        # CrowdDet has two for each RoI.
        if labels is not None and labels.shape == (len(own.logits), ):
            background = labels >= own.columns.num_classes
            others['labels'] = partial(labels.masked_fill, background, NONE)
        return [pair_of(self, call, batch, own, theirs, **others)]

    def _describe_rows(self, student: nn.Module) -> str:
        columns = roi_columns(student.get_submodule(next(iter(self.heads))))
        return f'RoIs x {columns.number} ({columns.activation})'


def split_stage(path: str) -> Tuple[str, int]:
    """``'roi_head.bbox_head.2'`` -> the RoI head's path and the stage."""
    roi_head, _, stage = path.partition('.bbox_head')
    return roi_head, int(stage[1:] or 0)


def stage_weight(call: Call) -> float:
    """The weight that a RoI head gives the loss of a stage."""
    path, stage = split_stage(call.path)
    roi_head = call.student.get_submodule(path)
    weights = getattr(roi_head, 'stage_loss_weights', None)
    return weights[stage] if weights else 1.0


def roi_columns(head: nn.Module) -> Columns:
    """The columns of the class logits of a box head."""
    # Whether there is one for the background does not follow from the
    # activation: BBoxHead always has it, a sigmoid DIIHead has not.
    classifier = getattr(head, 'fc_cls', None)
    activation = activation_of(head)
    if hasattr(classifier, 'out_features') and not getattr(
            head, 'custom_activation', False):
        background = classifier.out_features > head.num_classes
    else:
        several = isinstance(classifier, nn.ModuleList)
        background = several or activation == 'softmax'
    return Columns(head.num_classes, activation, background)


def roi_logits(cls_score: Tensor, head: nn.Module) -> ClassLogits:
    """``(R, C)`` logits, a distribution per row."""
    columns = roi_columns(head)
    logits = class_logits(cls_score, head).reshape(-1, columns.number)
    return ClassLogits(logits, columns)


def score_rois(batch: 'TeacherBatch', path: str, images: Tensor,
               rois: Tensor) -> ClassLogits:
    """The teacher's class logits ``(R, C)`` for given RoIs.

    Args:
        batch (TeacherBatch): The batch.
        path (str): The teacher's box head.
        images (Tensor): ``(N, C, H, W)``, the student's.
        rois (Tensor): ``(R, 5)``: the index of the image, and corners.
    """
    roi_path, stage = split_stage(path)
    features = batch.features(images, owner_of(batch.model, path))
    num_images = len(features[0])
    # A student that multiplies its images (TridentNet) puts the copies
    # behind them.
    rois = torch.cat([rois[:, :1] % num_images, rois[:, 1:]], dim=1)
    roi_head = batch.model.get_submodule(roi_path)
    arguments = dict(stage=stage, x=features, rois=rois)
    names = inspect.signature(roi_head._bbox_forward).parameters
    if set(names) - set(arguments):
        # HTC's semantics and the like: the head computes them itself when
        # it is given the RoIs as proposals.
        proposals = [
            InstanceData(bboxes=rois[rois[:, 0] == i, 1:])
            for i in range(num_images)
        ]
        more = batch.arguments_of(roi_path, '_bbox_forward', roi_head.predict,
                                  features, proposals, batch.samples)
        arguments = {**(more or {}), **arguments}
    with batch.computing():
        scores = roi_head._bbox_forward(**{
            n: x
            for n, x in arguments.items() if n in names
        })['cls_score']
    return roi_logits(scores, batch.model.get_submodule(path))
