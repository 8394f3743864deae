"""MobileNet, the first version, which MMPretrain lacks."""
from typing import Tuple

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmdist.registry import MODELS

# channels and stride of each block
BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
          *[(512, 1)] * 5, (1024, 2), (1024, 1))


@MODELS.register_module()
class MobileNetV1(BaseModule):
    """MobileNet of full width (Howard et al., *MobileNets*, 2017).

    Args:
        init_cfg (list[dict]): As for ``mmpretrain.MobileNetV2``.
    """

    def __init__(
        self,
        init_cfg=(dict(type='Kaiming', layer='Conv2d'),
                  dict(type='Constant', val=1, layer='_BatchNorm'))
    ) -> None:
        super().__init__(list(init_cfg))
        norm = dict(norm_cfg=dict(type='BN'))
        layers = [ConvModule(3, 32, 3, stride=2, padding=1, **norm)]
        channels = 32
        for out_channels, stride in BLOCKS:
            layers.append(
                DepthwiseSeparableConvModule(
                    channels, out_channels, 3, stride, padding=1, **norm))
            channels = out_channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tuple[Tensor]:
        """``(N, 3, H, W)`` to one map, ``(N, 1024, H / 32, W / 32)``."""
        return (self.layers(x), )
