"""RoI heads: a row is one of the student's sampled boxes."""
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import TAPS
from .base import LogitPair, LogitTap, pair_of
from .batch import Answered, TeacherBatch
from .columns import ClassLogits, Columns, activation_of, class_logits
from .labels import NONE, areas_of
from .watch import Call, LossCall, owner_of, signature_of, watch_method


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
        paths = []
        for path in super().find(model):
            targets = getattr(
                model.get_submodule(path), 'loss_and_target', None)
            if not targets or 'rois' in signature_of(targets).parameters:
                paths.append(path)
        return paths

    def _match(self, student: nn.Module, teacher: nn.Module,
               found: List[str]) -> Dict[str, str]:
        return {
            path: found[min(split_stage(path)[1],
                            len(found) - 1)]
            for path in self.heads
        }

    def _check_heads(self, student_head: nn.Module,
                     teacher_head: nn.Module) -> None:
        for head, field in ((student_head, 'model.student'),
                            (teacher_head, 'model.teacher.config')):
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

    def _check_images(self, calls: List[Call], batch: TeacherBatch) -> None:
        """RoIs may be of any images whose features are known."""
        if any(call.images is None for call in calls):
            raise ConfigError(
                'model.student', 'it does not compute its features by '
                '`extract_feat`, so the teacher cannot be shown the images '
                'of its RoIs',
                'let its loss call `extract_feat`, or choose another student')

    def pairs(self, call: Call, batch: TeacherBatch) -> List[LogitPair]:
        """One pair of ``(RoIs, classes + background)`` logits."""
        rois = call.arguments['rois']
        logits, columns = own = roi_logits(call.arguments['cls_score'],
                                           call.head)
        fields = dict(areas=partial(areas_of, rois[:, 1:]))
        labels = call.arguments.get('labels')
        # CrowdDet has two for each RoI.
        if labels is not None and labels.shape == (len(logits), ):
            background = labels >= columns.num_classes
            fields['labels'] = partial(labels.masked_fill, background, NONE)
        theirs = score_rois(batch, self.heads[call.path], call.images, rois)
        pair = pair_of(self, call, batch, own, theirs, **fields)
        pair.weight = stage_weight(call)
        pair.name = f'stage {split_stage(call.path)[1]}'
        return [pair]

    def _describe_rows(self, student: nn.Module, path: str) -> str:
        columns = roi_columns(student.get_submodule(path))
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
    return logits, columns


def score_rois(batch: TeacherBatch, path: str, images: Tensor,
               rois: Tensor) -> ClassLogits:
    """The class logits ``(R, C)`` of the teacher's head at ``path``, for RoIs
    ``(R, 5)`` of the student's images: the index of the image, and corners.
    """
    roi_path, stage = split_stage(path)
    features = batch.features(images, owner_of(batch.model, path))
    # A student that multiplies its images (TridentNet) puts the copies
    # behind them.
    index = rois[:, 0] % len(features[0])
    rois = torch.cat([index[:, None], rois[:, 1:]], dim=1)
    roi_head = batch.model.get_submodule(roi_path)
    arguments = dict(stage=stage, x=features, rois=rois)
    names = signature_of(roi_head._bbox_forward).parameters
    if set(names) - set(arguments):
        # HTC's semantics and the like: the head computes them itself when
        # it is given the RoIs as proposals.
        found: Dict[str, Any] = {}

        def note(given: Dict[str, Any]) -> None:
            found.update(given)
            raise Answered

        proposals = [
            InstanceData(bboxes=rois[index == i, 1:])
            for i in range(len(features[0]))
        ]
        with watch_method(roi_head, '_bbox_forward', before=note):
            batch.run([], roi_head.predict, features, proposals, batch.samples)
        arguments = {**found, **arguments}
    with batch.computing():
        scores = roi_head._bbox_forward(**{
            n: x
            for n, x in arguments.items() if n in names
        })['cls_score']
    return roi_logits(scores, batch.model.get_submodule(path))
