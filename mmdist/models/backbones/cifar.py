"""The networks of CIFAR-100 that papers on distillation compare.

They are those of Tian et al., *Contrastive Representation Distillation*, ICLR
2020 (https://github.com/HobbitLong/RepDistiller), which the authors of DIST
follow, for images of 32 pixels.
"""
from typing import Sequence, Tuple

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmpretrain.models.backbones import MobileNetV2, ShuffleNetV1, ShuffleNetV2
from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.registry import MODELS

DEPTHS = (8, 14, 20, 32, 44, 56, 110)


@MODELS.register_module()
class NarrowResNet(ResNet_CIFAR):
    """A ResNet of three stages: ResNet-20 is ``depth=20``, and ResNet-8x4
    ``depth=8, stem_channels=32, base_channels=64``.

    Args:
        depth (int): Layers, ``6 n + 2``.
        stem_channels (int): Channels before the first stage.
        base_channels (int): Channels of the first stage, doubled by each
            other.
        **kwargs: Arguments of ``mmpretrain.ResNet_CIFAR``.
    """
    arch_settings = {
        depth: (BasicBlock, ((depth - 2) // 6, ) * 3)
        for depth in DEPTHS
    }

    def __init__(self,
                 depth: int,
                 stem_channels: int = 16,
                 base_channels: int = 16,
                 **kwargs) -> None:
        settings = dict(
            num_stages=3,
            strides=(1, 2, 2),
            dilations=(1, 1, 1),
            out_indices=(2, ),
            zero_init_residual=False)
        super().__init__(
            depth,
            stem_channels=stem_channels,
            base_channels=base_channels,
            **{
                **settings,
                **kwargs
            })


class PreActBlock(nn.Module):
    """Two convolutions, each after its norm and ReLU.

    Args:
        in_channels (int): Channels of the input.
        channels (int): Channels of the output.
        stride (int): Stride of the first convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(
                in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        active = F.relu(self.norm1(x))
        residual = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (
            x if self.shortcut is None else self.shortcut(active))


@MODELS.register_module()
class WideResNet(BaseModule):
    """WRN-depth-width (Zagoruyko and Komodakis, *Wide Residual Networks*,
    BMVC 2016), without dropout.

    Args:
        depth (int): Layers, ``6 n + 4``.
        width (int): Multiplies the channels 16, 32 and 64 of the stages.
        init_cfg (list[dict]): As for ResNets.

    Raises:
        ConfigError: If there is no network of this depth.
    """

    def __init__(
        self,
        depth: int,
        width: int = 1,
        init_cfg: Sequence[dict] = (dict(type='Kaiming', layer='Conv2d'),
                                    dict(
                                        type='Constant',
                                        val=1,
                                        layer='BatchNorm2d'))
    ) -> None:
        super().__init__(list(init_cfg))
        if depth % 6 != 4:
            raise ConfigError(
                'backbone.depth', 'it must be 6 n + 4, such as '
                f'16, 28 or 40, but is {depth}')
        channels = 16
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for stage in range(3):
            wide = 16 * width * 2**stage
            blocks = [PreActBlock(channels, wide, min(stage + 1, 2))]
            blocks += [
                PreActBlock(wide, wide, 1) for _ in range((depth - 4) // 6 - 1)
            ]
            self.stages.append(nn.Sequential(*blocks))
            channels = wide
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tuple[Tensor]:
        """``(N, 3, H, W)`` to one map, ``(N, 64 * width, H / 4, W / 4)``."""
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return (F.relu(self.norm(x)), )


@MODELS.register_module()
class HalfMobileNetV2(MobileNetV2):
    """MobileNetV2 of half the width, whose second stage keeps the size.

    MMPretrain rounds channels to multiples of 8, so that this stage has 16
    where the network of the papers has 12.

    Args:
        **kwargs: Arguments of ``mmpretrain.MobileNetV2``.
    """
    arch_settings = [[*stage[:3], 1] if i == 1 else stage
                     for i, stage in enumerate(MobileNetV2.arch_settings)]

    def __init__(self, **kwargs) -> None:
        super().__init__(**{'widen_factor': 0.5, **kwargs})


@MODELS.register_module()
class CIFARShuffleNetV1(ShuffleNetV1):
    """ShuffleNetV1 whose stem keeps the size.

    Args:
        **kwargs: Arguments of ``mmpretrain.ShuffleNetV1``.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.conv1 = ConvModule(3, 24, 1, norm_cfg=dict(type='BN'))
        self.maxpool = nn.Identity()


@MODELS.register_module()
class CIFARShuffleNetV2(ShuffleNetV2):
    """ShuffleNetV2 whose stem keeps the size.

    Args:
        **kwargs: Arguments of ``mmpretrain.ShuffleNetV2``.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.conv1 = ConvModule(3, 24, 1, norm_cfg=dict(type='BN'))
        self.maxpool = nn.Identity()
