"""Classification heads: an image a row."""
import copy

import pytest
import torch

from .models import (NUM_CLASSES, batch, build, build_distiller, conformer,
                     models, outputs_of, resnet, save_teacher)

from mmpretrain.structures import DataSample  # isort: skip
from mmdist.models.taps import build_tap, pair_logits  # isort: skip
from mmdist.models.taps import watch_heads  # isort: skip
from mmdist.models.teacher import TeacherBatch  # isort: skip


def watched_pairs(student, teacher, inputs, samples, class_map=None):
    """Pairs as mmdist makes them."""
    tap = build_tap(student)
    tap.connect(student, teacher, class_map)
    with watch_heads(tap, student) as calls:
        student.loss(inputs, copy.deepcopy(samples))
    return pair_logits(tap, calls, TeacherBatch(teacher, inputs, samples))


@pytest.mark.parametrize('name', models())
def test_logits_are_those_of_the_plain_forward(name):
    """Of both models, in eval mode, one pair an output."""
    size = 224 if name == 'conformer' else 32
    student, teacher = (build(models()[name], s).eval() for s in (0, 1))
    inputs, samples = batch(student, num=2, size=size)
    pairs = watched_pairs(student, teacher, inputs, samples)
    expected = [outputs_of(model, inputs) for model in (student, teacher)]
    assert len(pairs) == len(expected[0]) == (2 if name == 'conformer' else 1)
    activation = 'sigmoid' if name == 'multi_label' else 'softmax'
    for pair, own, theirs in zip(pairs, *expected):
        torch.testing.assert_close(pair.student, own)
        torch.testing.assert_close(pair.teacher, theirs)
        assert pair.student.requires_grad and not pair.teacher.requires_grad
        assert pair.student_activation == activation
        assert pair.teacher_activation == activation
        assert pair.weight == 1 and pair.num_classes == NUM_CLASSES


def test_two_outputs_learn_from_what_another_head_predicts():
    """And one learns from the sum, by which Conformer predicts."""
    plain, double = build(resnet(), 0).eval(), build(conformer(), 1).eval()
    inputs, samples = batch(plain, num=2, size=224)
    for pair in watched_pairs(double, plain, inputs, samples):
        torch.testing.assert_close(pair.teacher, outputs_of(plain, inputs)[0])
    pair, = watched_pairs(plain, double, inputs, samples)
    torch.testing.assert_close(pair.teacher, sum(outputs_of(double, inputs)))


def test_labels_are_the_ground_truth():
    """But mixed pictures have none, nor those with several."""
    model = build(resnet()).eval()
    inputs, samples = batch(model)
    pair, = watched_pairs(model, build(resnet(), 1).eval(), inputs, samples)
    assert pair.labels().tolist() == list(range(6))
    for sample in samples:
        sample.set_gt_score(torch.full((NUM_CLASSES, ), 0.1))
    pair, = watched_pairs(model, build(resnet(), 1).eval(), inputs, samples)
    assert pair.labels() is None


def test_a_class_map_picks_columns():
    student = build(resnet(num_classes=3)).eval()
    teacher = build(resnet(), 1).eval()
    inputs, samples = batch(student, num=3)
    pair, = watched_pairs(student, teacher, inputs, samples, [7, 0, 2])
    whole, = outputs_of(teacher, inputs)
    torch.testing.assert_close(pair.teacher, whole[:, [7, 0, 2]])


@pytest.mark.parametrize('name', ['linear', 'lenet'])
def test_other_numbers_of_classes_are_refused(name, tmp_path):
    """When the model is built, if its heads say how many they have."""
    student = models()[name]
    teacher = resnet(num_classes=12)
    words = 'predicts 12 classes but model.student predicts 10'
    if name == 'linear':
        with pytest.raises(ValueError, match=words):
            build_distiller(student, save_teacher(teacher, tmp_path))
    else:
        wrapper = build_distiller(student, save_teacher(teacher, tmp_path))
        with pytest.raises(ValueError, match=words):
            wrapper.loss(*batch(wrapper))


def test_one_class_is_there_or_not():
    """A head of several labels that has one, by its own threshold."""
    model = models()['multi_label']
    model['head'].update(num_classes=1, thr=0.3)
    student = build(model).eval()
    model['head'].update(thr=0.6)
    teacher = build(model, 1).eval()
    inputs, _ = batch(student, num=4)
    samples = [DataSample() for _ in range(4)]
    for sample, labels in zip(samples, ([0], [], [0], [])):
        sample.set_gt_label(torch.tensor(labels, dtype=torch.long))
    pair, = watched_pairs(student, teacher, inputs, samples)
    assert pair.num_answers == 2 and pair.thresholds == (0.3, 0.6)
    assert pair.truth().tolist() == [0, 1, 0, 1]
    for sample, score in zip(samples, (0., 1., -1., 1.)):
        sample.set_gt_score(torch.tensor([score]))
    pair, = watched_pairs(student, teacher, inputs, samples)
    assert pair.truth().tolist() == [1, 0, -1, 0]
