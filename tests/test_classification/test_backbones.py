"""The networks of CIFAR-100, and MobileNet."""
import pytest
import torch

from ..refusals import refused
from .models import build, classifier, linear

# Millions of parameters, as papers on distillation give them (e.g. Tian et
# al., ICLR 2020): kind, arguments, channels of the last map.
NETWORKS = [
    ('NarrowResNet', dict(depth=20), 64, 0.28),
    ('NarrowResNet', dict(depth=56), 64, 0.86),
    ('NarrowResNet', dict(depth=8, stem_channels=32,
                          base_channels=64), 256, 1.23),
    ('NarrowResNet', dict(depth=32, stem_channels=32,
                          base_channels=64), 256, 7.43),
    ('WideResNet', dict(depth=40, width=1), 64, 0.57),
    ('WideResNet', dict(depth=40, width=2), 128, 2.26),
]


@pytest.mark.parametrize('kind, arguments, channels, millions', NETWORKS)
def test_they_are_as_large_as_published(kind, arguments, channels, millions):
    model = build(
        classifier(
            dict(type=f'mmdist.{kind}', **arguments), linear(channels, 100)))
    number = sum(p.numel() for p in model.parameters())
    assert round(number / 1e6, 2) == millions
    features, = model.extract_feat(torch.rand(2, 3, 32, 32), 'backbone')
    assert features.shape == (2, channels, 8, 8)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


# With a linear head for 100 classes (MobileNet: 1,000). The papers give 4.2,
# 0.81, 0.95 and 1.36 million: MMPretrain rounds the channels of MobileNetV2,
# and its ShuffleNetV1 has wider bottlenecks where it halves the size.
MOBILE = [
    ('MobileNetV1', 1024, 1000, 4.23, (224, 7)),
    ('HalfMobileNetV2', 1280, 100, 0.82, (32, 2)),
    ('CIFARShuffleNetV1', 960, 100, 1.00, (32, 4)),
    ('CIFARShuffleNetV2', 1024, 100, 1.36, (32, 4)),
]


@pytest.mark.parametrize('kind, channels, classes, millions, sizes', MOBILE)
def test_mobile_networks(kind, channels, classes, millions, sizes):
    model = build(
        classifier(dict(type=f'mmdist.{kind}'), linear(channels, classes)))
    number = sum(p.numel() for p in model.parameters())
    assert round(number / 1e6, 2) == millions
    images = torch.rand(2, 3, sizes[0], sizes[0])
    features, = model.extract_feat(images, 'backbone')
    assert features.shape == (2, channels, sizes[1], sizes[1])


def test_other_depths_are_refused():
    with refused('backbone.depth', 'must be 6 n'):
        build(classifier(dict(type='mmdist.WideResNet', depth=18), linear(64)))
