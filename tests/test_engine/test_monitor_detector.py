"""The monitor on detectors: teachers that were trained, then spoilt."""
import copy
import logging

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmdist import ConfigError
from tests.helpers import (NUM_CLASSES, build, build_distiller, detector,
                           prepared)

# BGR; red and blue of the first two exchanged are each other's, the third is
# its own, so that no order of classes explains what an exchange does.
COLOURS = np.array([[210, 120, 40], [40, 120, 210], [70, 190, 70]])
SIZE = 96
# optimizer, its rate, and iterations
TRAINING = dict(
    retina=(torch.optim.Adam, 3e-3, 120), faster=(torch.optim.SGD, 0.02, 200))


def painted(seed, num=4):
    """Pictures with two objects, whose colours are their classes."""
    rng = np.random.default_rng(seed)
    inputs, samples = [], []
    for _ in range(num):
        picture = rng.integers(60, 100, (SIZE, SIZE, 3))
        boxes, labels = [], rng.integers(0, NUM_CLASSES, 2)
        for i, label in enumerate(labels):
            x, y = 4 + 46 * i, int(rng.integers(4, 52))
            w, h = rng.integers(26, 42, 2)
            picture[y:y + h, x:x + w] = COLOURS[label]
            boxes.append([x, y, x + w, y + h])
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(SIZE, SIZE),
                ori_shape=(SIZE, SIZE),
                pad_shape=(SIZE, SIZE),
                scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(boxes, dtype=torch.float32),
            labels=torch.from_numpy(labels))
        inputs.append(
            torch.from_numpy(picture.astype(np.uint8)).permute(2, 0, 1))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


@pytest.fixture(scope='module', params=list(TRAINING))
def trained(request):
    """A teacher that has learnt the colours: its config and weights."""
    cfg = detector(request.param)
    # What is random here would be frozen.
    cfg['backbone'].update(frozen_stages=-1, norm_eval=False)
    return taught(cfg, painted, *TRAINING[request.param])


def taught(cfg, images, kind, rate, iters):
    """A config, and the weights of a model that has learnt from images."""
    model = build(cfg, 1).train()
    optimizer = kind(model.parameters(), lr=rate)
    for seed in range(iters):
        losses = model.loss(*prepared(model, images(seed)))
        loss, _ = model.parse_losses(losses)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
    return cfg, model.state_dict()


def distil(trained, folder, change=None, images=painted, **options):
    """Judge a teacher that was changed."""
    cfg, weights = copy.deepcopy(trained)
    if change:
        change(cfg, weights)
    path = str(folder / 'teacher.pth')
    torch.save(dict(state_dict=weights), path)
    student = copy.deepcopy(trained[0])
    wrapper = build_distiller(student, dict(config=cfg, checkpoint=path),
                              **options).train()
    for seed in range(10):
        wrapper.loss(*prepared(wrapper, images(1000 + seed)))


def other_std(cfg, weights):
    """Of a Caffe model, whose pictures are not divided."""
    cfg['data_preprocessor'].update(std=[1.] * 3)


def swapped(cfg, weights):
    """Blue for red."""
    cfg['data_preprocessor'].update(bgr_to_rgb=False)


def permuted(cfg, weights):
    """Labels of another order; a background stays last."""
    for name, weight in weights.items():
        if 'retina_cls' in name or 'fc_cls' in name:
            classes = weight.unflatten(0,
                                       (-1, NUM_CLASSES + ('fc_cls' in name)))
            classes[:, :NUM_CLASSES] = classes[:, [2, 0, 1]]


def untrained(cfg, weights):
    """What is random was saved."""
    weights.update(build(cfg, 5).state_dict())


@pytest.mark.slow
def test_a_good_teacher_is_praised(trained, tmp_path, log):
    """Well above chance, and no warning."""
    distil(trained, tmp_path, strict_teacher=True)
    judged, = (r.message for r in log.records if 'is right' in r.message)
    assert float(judged.split('right about ')[1][:5]) > 0.7
    assert not [r for r in log.records if r.levelno >= logging.WARNING]


@pytest.mark.slow
@pytest.mark.parametrize(
    'change, match',
    [(other_std, 'model.teacher.config: .*correct mean and std'),
     (swapped, 'model.teacher.config: .*correct bgr_to_rgb'),
     (permuted, 'model.teacher: .*class_map'),
     (untrained, 'model.teacher: .*was not trained')])
def test_a_bad_teacher_is_noticed(trained, tmp_path, log, change, match):
    """Strictly, it ends the run."""
    with pytest.raises(ConfigError, match=match):
        distil(trained, tmp_path, change, strict_teacher=True)


ONE = dict(num_classes=1)
ONE_CLASS = dict(
    retina=dict(bbox_head=ONE), faster=dict(roi_head=dict(bbox_head=ONE)))


def of_one_class(seed):
    """Images with objects of one class."""
    data = painted(seed)
    for sample in data['data_samples']:
        sample.gt_instances.labels.zero_()
    return data


@pytest.mark.slow
@pytest.mark.parametrize('name', list(ONE_CLASS))
def test_one_class_is_told_from_the_background(name, tmp_path, log):
    """A good teacher is praised, one that was not trained is noticed."""
    cfg = detector(name, **ONE_CLASS[name])
    cfg['backbone'].update(frozen_stages=-1, norm_eval=False)
    good = taught(cfg, of_one_class, *TRAINING[name])
    distil(good, tmp_path, None, of_one_class, strict_teacher=True)
    judged, = (r.message for r in log.records if 'is right' in r.message)
    assert float(judged.split('right about ')[1][:5]) > 0.7
    with pytest.raises(ConfigError, match='was not trained'):
        distil(good, tmp_path, untrained, of_one_class, strict_teacher=True)
