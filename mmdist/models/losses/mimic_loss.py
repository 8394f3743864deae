"""Imitation of the teacher's feature pyramid, DIST's partner on COCO."""
from typing import Dict, Sequence, Union

from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import MODELS
from .base import check_weight
from .functional import mimic_terms


@MODELS.register_module()
class MimicLoss(nn.Module):
    """Mean squared error between feature levels, summed over the levels.

    A 1x1 convolution per level takes the student's channels to the teacher's
    (Huang et al., NeurIPS 2022, Section 5.3). The convolutions are trained
    with the student and are no part of it.

    Args:
        student_channels (Sequence[int]): Channels of the student's levels.
            Without them there are no convolutions, as where ``feature_loss``
            has its own.
        teacher_channels (Sequence[int]): Channels of the teacher's levels, as
            many as the student's.
        loss_weight (float): Weight of the loss.

    Raises:
        ConfigError: If the numbers of levels differ or the weight is out of
            its range.
    """

    where = 'neck'  # the maps that it compares as mimic_loss

    def __init__(self,
                 student_channels: Sequence[int] = (),
                 teacher_channels: Sequence[int] = (),
                 loss_weight: float = 1.0) -> None:
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise ConfigError(
                'teacher_channels',
                f'it has {len(teacher_channels)} levels, but student_channels '
                f'has {len(student_channels)}')
        self.loss_weight = check_weight('loss_weight', loss_weight)
        self.projections = nn.ModuleList(
            nn.Conv2d(c_s, c_t, kernel_size=1)
            for c_s, c_t in zip(student_channels, teacher_channels))

    def terms(self,
              student_feats: Union[Tensor, Sequence[Tensor]],
              teacher_feats: Union[Tensor, Sequence[Tensor]],
              activation: str = 'none') -> Dict[str, Tensor]:
        """The term 'mimic'.

        Args:
            student_feats (Tensor | Sequence[Tensor]): ``(N, C_s, H, W)`` of
                each level.
            teacher_feats (Tensor | Sequence[Tensor]): ``(N, C_t, H, W)`` of
                each level; get no gradient.
            activation (str): 'none', which is all that feature maps have.

        Returns:
            dict[str, Tensor]: A scalar in float32.

        Raises:
            ConfigError: If the student has another number of levels.
            ValueError: If the teacher's levels or sizes differ.
        """
        if isinstance(student_feats, Tensor):
            student_feats, teacher_feats = [student_feats], [teacher_feats]
        if self.projections:
            if len(student_feats) != len(self.projections):
                raise ConfigError(
                    'model.mimic_loss.student_channels',
                    f'it has {len(self.projections)} levels, but the student '
                    f'gives {len(student_feats)}')
            student_feats = [
                project(feat)
                for project, feat in zip(self.projections, student_feats)
            ]
        terms = mimic_terms(student_feats, teacher_feats)
        return dict(mimic=self.loss_weight * terms['mimic'])

    def forward(self, *args) -> Tensor:
        """The loss, a scalar; the arguments are those of :meth:`terms`."""
        return sum(self.terms(*args).values())
