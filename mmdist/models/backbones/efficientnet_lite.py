"""EfficientNet-Lite, small backbones with public ImageNet weights."""
import math
from typing import Any

from mmdist.errors import ConfigError
from mmdist.registry import MODELS

try:
    from mmdet.models.backbones import efficientnet
except ImportError:
    from mmpretrain.models.backbones import efficientnet

# kernel, channels, stride and blocks of each stage; stages in one list leave
# one feature map
STAGES = (((3, 16, 1, 1), ), ((3, 24, 2, 2), ), ((5, 40, 2, 2), ),
          ((3, 80, 2, 3), (5, 112, 1, 3)), ((5, 192, 2, 4), (3, 320, 1, 1)))
# factors of width and depth
SCALES = dict(
    lite0=(1.0, 1.0),
    lite1=(1.0, 1.1),
    lite2=(1.1, 1.2),
    lite3=(1.2, 1.4),
    lite4=(1.4, 1.8))


def _layers(width: float, depth: float) -> list:
    """The blocks of one size, written as ``EfficientNet.layer_settings``."""
    layers = [[[3, 32, 0, 2, 0, -1]]]
    for stages in STAGES:
        layer = []
        for kernel, channels, stride, blocks in stages:
            # The first and the last stage are not deepened.
            if channels not in (16, 320):
                blocks = math.ceil(depth * blocks)
            channels_out = efficientnet.make_divisible(channels * width, 8)
            expansion = 1 if channels == 16 else 6
            layer += [[
                kernel, channels_out, 0, 1 if i else stride, expansion, 0
            ] for i in range(blocks)]
        layers.append(layer)
    return layers + [[[1, 1280, 0, 1, 0, -1]]]


@MODELS.register_module()
class EfficientNetLite(efficientnet.EfficientNet):
    """EfficientNet without squeeze-and-excitation, with ReLU6.

    The networks of TensorFlow's ``efficientnet/lite``: the stem and the last
    convolution keep their width, the first and the last stage their depth.
    ``tools/model_converters/efficientnet_lite.py`` writes their ImageNet
    weights, which take RGB images with mean 127 and standard deviation 128.
    The class derives from MMDetection's ``EfficientNet``, or without
    MMDetection from MMPretrain's.

    Args:
        arch (str): 'lite0' to 'lite4'.
        **kwargs: Other arguments of ``EfficientNet``. ``out_indices`` (3, 4,
            5) are the maps of strides 8, 16 and 32; they have 40, 112 and 320
            channels in lite0, 48, 120 and 352 in lite2.

    Raises:
        ConfigError: If ``arch`` is another.
    """
    # EfficientNet looks up layers by the first letter of ``arch``.
    layer_settings = {
        name[-1]: _layers(*scale)
        for name, scale in SCALES.items()
    }
    arch_settings = {name[-1]: (1.0, 1.0, None) for name in SCALES}

    def __init__(self, arch: str = 'lite0', **kwargs: Any) -> None:
        if arch not in SCALES:
            raise ConfigError('backbone.arch', f'there is no {arch!r}',
                              f'choose one of {", ".join(SCALES)}')
        kwargs = {
            'norm_cfg': dict(type='BN', eps=1e-3, momentum=0.01),
            'act_cfg': dict(type='ReLU6'),
            **kwargs
        }
        super().__init__(arch[-1], **kwargs)
