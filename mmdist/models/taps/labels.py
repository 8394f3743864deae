"""The labels of rows of logits, where the ground truth says them."""
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

NONE = -1
"""The label of a row that has none."""
IGNORED = -2
"""The label of a row of which nothing is known, where NONE says that the one
class is not there."""
# Sides of an object in strides of the level that it belongs to: RetinaNet's
# anchors have 4 to 6.3, FCOS's ranges 4 to 8.
STRIDES_AN_OBJECT = 5.6
LEAST_OVERLAP = 0.5


class Objects(NamedTuple):
    """The ground truth of a picture.

    Attributes:
        boxes (Tensor): ``(K, 4)``, corners in pixels of the input.
        labels (Tensor): ``(K, )``, int64.
        masks (Any): Of the data sample; None if there are none.
        size (tuple[int, int]): Height and width of the padded input.
    """
    boxes: Tensor
    labels: Tensor
    masks: Any
    size: Tuple[int, int]


def objects_of(samples: Any, areas: bool = False) -> Optional[List[Objects]]:
    """The objects of each picture of a batch.

    Args:
        samples (Any): Data samples, of any kind.
        areas (bool): Whether the boxes' areas, whole pixels, stand in place of
            the labels, so that rows get them as they get labels.

    Returns:
        list[Objects] | None: None if they hold no labelled boxes.
    """
    if not isinstance(samples, (list, tuple)):
        return None
    instances = [getattr(sample, 'gt_instances', None) for sample in samples]
    if not all(
            hasattr(i, 'bboxes') and hasattr(i, 'labels') for i in instances):
        return None
    objects = [
        Objects(
            getattr(i.bboxes, 'tensor', i.bboxes), i.labels,
            getattr(i, 'masks', None),
            tuple(
                sample.metainfo.get('batch_input_shape',
                                    sample.metainfo['img_shape'])[:2]))
        for sample, i in zip(samples, instances)
    ]
    if areas:
        return [o._replace(labels=areas_of(o.boxes)) for o in objects]
    return objects


def areas_of(boxes: Tensor) -> Tensor:
    """Areas of ``(K, 4)`` boxes in whole pixels, int64."""
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1).long()


def labels_at(objects: Sequence[Objects], grid: Tuple[int, int],
              strides: Sequence[float], level: int, place: float) -> Tensor:
    """Labels of the locations of a feature level.

    An object is at one location, of the level for its size.

    Args:
        objects (Sequence[Objects]): Of each picture.
        grid (tuple[int, int]): Locations ``(H, W)`` of the level.
        strides (Sequence[float]): Of all levels; empty if there is no more
            than one that is known.
        level (int): The level.
        place (float): 0.5 for the centre of a box, 0 for its left top corner.

    Returns:
        Tensor: ``(N, H, W)``, int64.
    """
    labels = torch.full((len(objects), *grid),
                        NONE,
                        device=objects[0].labels.device)
    for picture, (boxes, classes, _, size) in zip(labels, objects):
        extent = boxes[:, 2:] - boxes[:, :2]
        here = _level_of(extent, strides) == level if strides else slice(None)
        spots = (boxes[:, :2] + place * extent)[here].flip(1)
        places = (spots / spots.new_tensor(size) * spots.new_tensor(grid))
        last = torch.tensor(grid, device=labels.device) - 1
        rows, columns = places.long().clamp(min=0).minimum(last).T
        picture[rows, columns] = classes[here]
    return labels


def _level_of(extent: Tensor, strides: Sequence[float]) -> Tensor:
    """The level whose stride suits the size of each box."""
    sides = extent.clamp(min=1).prod(1).sqrt() / STRIDES_AN_OBJECT
    distances = sides.log()[:, None] - sides.new_tensor(strides).log()
    return distances.abs().argmin(1)


def labels_of_boxes(objects: Sequence[Objects],
                    boxes: Sequence[Tensor]) -> Tensor:
    """Labels of boxes, of the object that overlaps enough.

    Args:
        objects (Sequence[Objects]): Of each picture.
        boxes (Sequence[Tensor]): ``(R, 4)`` of each, corners in pixels.

    Returns:
        Tensor: All boxes' labels, int64.
    """
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
