"""Labels of rows of logits, and when one class is there.

Losses and the monitor of the teacher read them from a
:class:`~mmdist.models.taps.base.LogitPair`.
"""
from functools import partial
from typing import (TYPE_CHECKING, Any, Callable, Dict, List, NamedTuple,
                    Optional, Sequence, Tuple)

import torch
from torch import Tensor, nn

from .matching import Queries, place_cost

if TYPE_CHECKING:
    from .batch import TeacherBatch

NONE = -1
"""Label of a row that has none."""
IGNORED = -2
"""Label of a row of which nothing is known, where NONE says that the one
class is not there."""
# Sides of an object in strides of the level that it belongs to: RetinaNet's
# anchors have 4 to 6.3, FCOS's ranges 4 to 8.
STRIDES_PER_OBJECT = 5.6
LEAST_OVERLAP = 0.5
# Lower ones (RTMDet's 0.001, or 0) keep every box for the metric, and say
# nothing about objects.
LEAST_THRESHOLD = 0.05


class Objects(NamedTuple):
    """Ground truth of an image."""
    boxes: Tensor  # (K, 4), corners in pixels of the input
    labels: Tensor  # (K, ), int64
    masks: Any  # the sample's, if there are any
    size: Tuple[int, int]  # height and width of the padded input


def objects_of(samples: Any,
               num_images: Optional[int] = None) -> Optional[List[Objects]]:
    """The objects of each image of a batch; None if the samples hold no
    labelled boxes or are not `num_images`."""
    if not isinstance(samples,
                      (list, tuple)) or num_images not in (None, len(samples)):
        return None
    instances = [getattr(sample, 'gt_instances', None) for sample in samples]
    if not all(
            hasattr(i, 'bboxes') and hasattr(i, 'labels') for i in instances):
        return None
    objects = []
    for sample, i in zip(samples, instances):
        boxes = getattr(i.bboxes, 'tensor', i.bboxes)
        meta = sample.metainfo
        size = meta.get('batch_input_shape', meta['img_shape'])[:2]
        objects.append(
            Objects(boxes, i.labels, getattr(i, 'masks', None), tuple(size)))
    return objects


def object_labels(batch: 'TeacherBatch', num_images: int,
                  assign: Callable) -> Dict[str, Callable]:
    """The fields ``labels`` and ``areas`` of a pair whose rows are of objects.

    `assign` takes the objects of each image and returns for each row the label
    of its object, or ``NONE``."""

    def read(areas: bool = False) -> Optional[Tensor]:
        objects = objects_of(batch.samples, num_images)
        if objects and areas:  # rows get these as they get labels
            objects = [o._replace(labels=areas_of(o.boxes)) for o in objects]
        return objects and assign(objects)

    return dict(labels=read, areas=partial(read, areas=True))


def areas_of(boxes: Tensor) -> Tensor:
    """Areas of ``(K, 4)`` boxes in whole pixels, int64."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).long()


def labels_at(objects: Sequence[Objects], grid: Sequence[int],
              strides: Sequence[float], level: int, place: float) -> Tensor:
    """Labels ``(N, H, W)`` of the locations of a feature level.

    An object is at one location, of the level that suits its size. `strides`
    are those of all levels; empty if there is no more than one that is known.
    `place` is 0.5 for the centre of a box and 0 for its left top corner."""
    labels = torch.full((len(objects), *grid),
                        NONE,
                        device=objects[0].labels.device)
    last = torch.tensor(grid, device=labels.device) - 1
    for image, (boxes, classes, _, size) in zip(labels, objects):
        extent = boxes[:, 2:] - boxes[:, :2]
        here = slice(None)
        if strides:  # the level whose stride suits the size of the box
            sides = extent.clamp(min=1).prod(1).sqrt() / STRIDES_PER_OBJECT
            distances = sides.log()[:, None] - sides.new_tensor(strides).log()
            here = distances.abs().argmin(1) == level
        spots = (boxes[:, :2] + place * extent)[here].flip(1)
        places = spots / spots.new_tensor(size) * spots.new_tensor(grid)
        rows, columns = places.long().clamp(min=0).minimum(last).T
        image[rows, columns] = classes[here]
    return labels


def labels_of_boxes(objects: Sequence[Objects],
                    boxes: Sequence[Tensor]) -> Tensor:
    """Labels of all ``(R, 4)`` boxes, of the object that overlaps enough."""
    from mmdet.structures.bbox import bbox_overlaps
    labels = []
    for own, (truth, classes, *_) in zip(boxes, objects):
        if not len(classes):
            labels.append(classes.new_full((len(own), ), NONE))
            continue
        overlap, which = bbox_overlaps(own, truth).max(1)
        labels.append(
            torch.where(overlap >= LEAST_OVERLAP, classes[which], NONE))
    return torch.cat(labels)


@torch.no_grad()
def labels_of_queries(objects: Sequence[Objects], queries: Queries,
                      matches: Sequence[Tuple[Tensor, Tensor]]) -> Tensor:
    """Labels of matched queries: an object's goes to the match of the
    teacher's nearest query. See ``match_queries``."""
    from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
    labels = []
    for i, ((boxes, classes, masks, size),
            (_, match)) in enumerate(zip(objects, matches)):
        own = classes.new_full((len(match), ), NONE)
        labels.append(own)
        theirs = queries.of_image(i)
        # The objects as queries, with boxes or masks as the others have them.
        if theirs.boxes is not None:
            scale = boxes.new_tensor(size).flip(0).repeat(2)
            truth = Queries(classes, boxes=bbox_xyxy_to_cxcywh(boxes / scale))
        elif masks is not None:
            if not isinstance(masks, Tensor):  # BoxInst's are tensors
                masks = masks.to_tensor(torch.float32, classes.device)
            certain = 40 * masks.float() - 20
            truth = Queries(classes, masks=certain.unsqueeze(1))
        else:
            continue
        if len(classes):
            nearest = place_cost(truth, theirs).argmin(1)
            found, which = (nearest[:, None] == match).nonzero().T
            own[which] = classes[found]
    return torch.cat(labels)


def labels_of_maps(samples: Sequence[Any], size: Sequence[int],
                   align_corners: bool, points: Optional[Tensor]) -> Tensor:
    """The label under each logit of maps of a size, ``(N, *size)``, or at
    ``(N, P, 2)`` points in [0, 1]; int64."""
    labels = torch.stack([sample.gt_sem_seg.data for sample in samples])
    if points is not None:
        from mmcv.ops import point_sample
        found = point_sample(
            labels.float(),
            points,
            mode='nearest',
            align_corners=align_corners)
        return found[:, 0].long()
    under = []
    for length, count in zip(labels.shape[2:], size):
        if align_corners:
            index = torch.linspace(0, length - 1, count).round()
        else:
            index = (torch.arange(count) + 0.5) * length / count
        under.append(index.long().to(labels.device))
    return labels[:, 0, under[0][:, None], under[1]].long()


def labels_of_pixels(found: Tensor, head: nn.Module) -> Tensor:
    """Labels of the classes of a decode head, without those to ignore.

    One column is of the class 1; 0 says that it is not there.
    """
    if head.out_channels == 1:
        answers = found.new_tensor([NONE, 0])
        known = (found >= 0) & (found < 2) & (found != head.ignore_index)
        return torch.where(known, answers[found.clamp(0, 1)], IGNORED)
    others = (found == head.ignore_index) | (found >= head.out_channels)
    return found.masked_fill(others, NONE)


def labels_of_images(samples: Sequence[Any],
                     num_classes: int) -> Optional[Tensor]:
    """The label of each image; None of mixed images and of several labels.

    Of one class: 0 where an image has it, NONE, or IGNORED.
    """
    if num_classes == 1:
        # The score of the class, or 1 where it is among the labels.
        scores = torch.stack([
            sample.gt_score.max() if 'gt_score' in sample else
            sample.gt_label.new_tensor(sample.gt_label.numel() > 0).float()
            for sample in samples
        ])
        known = torch.where(scores > 0.5, 0, NONE)
        return known.masked_fill(scores < 0, IGNORED)
    labels = [getattr(sample, 'gt_label', None) for sample in samples]
    if any('gt_score' in sample or label is None or label.numel() != 1
           for sample, label in zip(samples, labels)):
        return None
    return torch.cat(labels)


def threshold_of(model: nn.Module, path: str) -> Optional[float]:
    """The probability from which a head says that a class is there, if any.

    It is ``threshold`` of a decode head, ``thr`` of a head of several labels,
    or ``score_thr`` of the ``test_cfg`` of a detector's head or a module
    around it, but at least ``LEAST_THRESHOLD``."""
    head = model.get_submodule(path)
    threshold = getattr(head, 'threshold', getattr(head, 'thr', None))
    while threshold is None and path:
        cfg = getattr(model.get_submodule(path), 'test_cfg', None) or {}
        if 'score_thr' in cfg:
            threshold = max(cfg['score_thr'], LEAST_THRESHOLD)
        path = path.rpartition('.')[0]
    return threshold
