"""The residual networks of CIFAR-100."""
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


def test_other_depths_are_refused():
    with refused('WideResNet.depth', 'must be 6 n'):
        build(classifier(dict(type='mmdist.WideResNet', depth=18), linear(64)))
