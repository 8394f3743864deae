"""Matches of queries, which have no order, by the assignment of least cost."""
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.nn import functional as F

from .columns import Columns, class_probabilities

# Weights of the costs of a match, those of Deformable DETR and Mask2Former.
CLASS_COST, L1_COST, GIOU_COST, DICE_COST = 2., 5., 2., 5.


class Queries(NamedTuple):
    """Predictions of a model for its queries, in its last decoder layer."""
    logits: Tensor  # of classes, (N, Q, C)
    columns: Optional[Columns] = None  # the meaning of C
    boxes: Optional[Tensor] = None  # (N, Q, 4), cx, cy, w, h over image size
    masks: Optional[Tensor] = None  # logits (N, Q, T, H, W); of images T is 1

    def of_image(self, index: Union[int, slice]) -> 'Queries':
        """The queries of one image, without the first dimension, or of a slice
        of the images."""
        return Queries(*(part[index] if isinstance(part, Tensor) else part
                         for part in self))


@torch.no_grad()
def match_queries(student_queries: Queries,
                  teacher_queries: Queries,
                  class_map: Optional[Sequence[int]] = None,
                  one_to_one: bool = True) -> List[Tuple[Tensor, Tensor]]:
    """The indices of matched queries of student and teacher for each image,
    by the least cost; without `one_to_one`, several of the student's may have
    one of the teacher's."""
    from scipy.optimize import linear_sum_assignment
    matches = []
    for i in range(len(student_queries.logits)):
        own, theirs = student_queries.of_image(i), teacher_queries.of_image(i)
        p_s, p_t = (
            class_probabilities(each.logits, each.columns)
            for each in (own, theirs))
        if class_map is not None:
            p_t = p_t[:, list(class_map)]
        # half the absolute difference
        cost = CLASS_COST * torch.cdist(p_s, p_t, p=1) / 2
        # Predictions that overflowed match nothing in particular.
        cost = (cost + place_cost(own, theirs)).nan_to_num(1e6, 1e6, 1e6)
        if one_to_one:
            match = linear_sum_assignment(cost.cpu())
        else:
            match = range(len(cost)), cost.argmin(dim=1)
        matches.append(
            tuple(torch.as_tensor(x, device=cost.device) for x in match))
    return matches


def place_cost(own: Queries, theirs: Queries) -> Tensor:
    """Cost ``(S, T)`` of the places of queries of one image: L1 and GIoU of
    boxes, and the Dice distance of masks at the smaller size."""
    from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_overlaps
    cost = theirs.logits.new_zeros(())
    # A mask of ones overflows in half precision.
    with torch.autocast(cost.device.type, enabled=False):
        if own.boxes is not None and theirs.boxes is not None:
            a, b = own.boxes.float(), theirs.boxes.float()
            overlaps = bbox_overlaps(
                bbox_cxcywh_to_xyxy(a), bbox_cxcywh_to_xyxy(b), 'giou')
            cost = cost + (
                L1_COST * torch.cdist(a, b, p=1) + GIOU_COST * (1 - overlaps))
        if own.masks is not None and theirs.masks is not None:
            size = min(own.masks.shape[-2:], theirs.masks.shape[-2:])
            a, b = (
                F.interpolate(
                    masks.float(), size, mode='bilinear',
                    align_corners=False).sigmoid().flatten(1)
                for masks in (own.masks, theirs.masks))
            squares = a.square().sum(1)[:, None] + b.square().sum(1)
            dice = 2 * a @ b.T / squares.clamp(min=1e-6)
            cost = cost + DICE_COST * (1 - dice)
    return cost
