"""Layers of a teacher's head that nobody reads are not run."""
import pytest
import torch
from torch import nn

from mmdist.models.taps.probe import left_out, unread_layers
from tests.helpers import (batch, build, build_distiller, detector, prepared,
                           save_teacher)


def classes(outputs):
    """The class logits of most dense heads."""
    return outputs[0]


@pytest.mark.parametrize('name, unread', [
    ('retina', {'reg_convs', 'retina_reg'}),
    ('fcos', {'reg_convs', 'conv_reg', 'conv_centerness', 'scales'}),
    ('gfl', {'reg_convs', 'gfl_reg', 'scales'}),
])
def test_boxes_are_unread(name, unread):
    """Names are MMDetection's; the other layers are needed."""
    model = build(detector(name)).eval().requires_grad_(False)
    found = unread_layers(model, 'bbox_head', classes)
    assert {path.partition('.')[0] for path in found} == unread
    assert not any(p.requires_grad for p in model.parameters())
    assert not any('forward' in m.__dict__ for m in model.modules())


def test_a_step_does_not_run_them(tmp_path):
    """Counted in the teacher, whose class branch does run."""
    model = detector('retina')
    wrapper = build_distiller(model, save_teacher(model, tmp_path)).train()
    # Until the teacher is judged, they would run twice.
    wrapper.distillation.monitor.judged = True
    ran = []
    head = wrapper.distillation.teacher.model.bbox_head

    def note(path, output):
        if output.any():  # zeros stand for what is not computed
            ran.append(path.partition('.')[0])

    for path, layer in head.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _, inputs, output, path=path: note(path, output))
    wrapper.loss(*prepared(wrapper, batch()))
    assert ran == 5 * ['cls_convs', 'retina_cls']  # at five levels


class TwoBranches(nn.Module):
    """A head whose classes depend on its boxes in a way of its own."""

    def __init__(self, weigh):
        super().__init__()
        self.ran = []
        self.cls, self.reg = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 1)
        self.weigh = weigh

    def forward(self, features):
        boxes = self.reg(features[0])
        self.ran.append(float(torch.rand(())))
        return [self.weigh(self.cls(features[0]), boxes)], [boxes]


class InTraining(TwoBranches):
    """One whose classes depend on its boxes only in training mode."""

    def forward(self, features):
        classes, boxes = super().forward(features)
        if self.training:
            classes = [classes[0] * boxes[0][:, :1].sigmoid()]
        return classes, boxes


class Model(nn.Module):
    """The parts of a detector that are used."""

    def __init__(self, head):
        super().__init__()
        self.bbox_head = head

    def extract_feat(self, images):
        return [images]


@pytest.mark.parametrize('weigh, unread', [
    (lambda scores, boxes: scores, {
        'reg': 4
    }),
    (lambda scores, boxes: scores * boxes[:, :1], {}),
    (lambda scores, boxes: scores * boxes[:, :1].detach(), {}),
    (lambda scores, boxes: scores.permute(0, 2, 3, 1)[boxes[:, 0] > 0], {}),
    (lambda scores, boxes: scores.masked_fill(boxes[:, :1] > 50., 0), {}),
])
def test_what_classes_depend_on_is_run(weigh, unread):
    """With a gradient, without one, and by a choice."""
    model = Model(TwoBranches(weigh)).eval()
    assert unread_layers(model, 'bbox_head', classes) == unread


def test_the_mode_in_which_the_head_is_asked_counts():
    """Teachers' heads return what they return in training."""
    model = Model(InTraining(lambda scores, boxes: scores)).eval()
    assert unread_layers(model, 'bbox_head', classes) == {}
    assert not model.bbox_head.training


def test_a_mistake_in_reading_is_not_hidden():
    """Only the model may fail on features alone."""
    model = Model(TwoBranches(lambda scores, boxes: scores)).eval()
    with pytest.raises(IndexError):
        unread_layers(model, 'bbox_head', lambda outputs: outputs[7])


def test_a_head_that_takes_more_than_features_is_left_alone():
    """Only the saving is lost."""
    model = Model(nn.Bilinear(3, 3, 2)).eval()
    assert unread_layers(model, 'bbox_head', classes) == {}


def test_zeros_stand_for_what_is_left_out():
    """Size and dtype are the result's, and only within the context."""
    layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 6).double()
    with left_out(layer, {'0': 4}):
        result = layer(x)
    assert torch.equal(result, torch.zeros(2, 4, 5, 6, dtype=torch.float64))
    assert layer(x.float()).abs().sum() > 0


def test_random_numbers_are_left_alone():
    """A student of a seed stays what it is, whatever the head draws."""
    model = Model(TwoBranches(lambda scores, boxes: scores)).eval()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    unread_layers(model, 'bbox_head', classes)
    assert model.bbox_head.ran and torch.equal(torch.rand(4), expected)
