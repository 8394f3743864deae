"""The teacher: what it loads, what it refuses, what it sees, what it keeps."""
import collections
import contextlib
import copy
import functools
import os
import pickle
import random
import subprocess
import threading
import zipfile
from http.server import HTTPServer, SimpleHTTPRequestHandler

import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmengine.config import Config
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import OneCycleLR
from mmengine.registry import DefaultScope
from mmengine.runner import Runner, save_checkpoint
from mmseg.models import SegDataPreProcessor
from safetensors.torch import save_file
from torch import nn

from mmdist import ConfigError
from mmdist.models.teacher import Renormalise, Teacher, preserve_rng
from ..helpers import (CLASSES, batch, build, build_distiller, detector,
                       prepared, save_teacher, write_coco)
from ..refusals import refused

IMAGENET = dict(
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    bgr_to_rgb=True)
CAFFE = dict(mean=[103.53, 116.28, 123.675], std=[1., 1., 1.])
MMDET_RTMDET = dict(
    mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395])
YOLOX = dict(pad_value=114)
GREY = dict(mean=[127.5], std=[127.5], rgb_to_bgr=True, pad_value=-1.5)
NORMALISATIONS = dict(
    imagenet=IMAGENET,
    caffe=CAFFE,
    rtmdet=MMDET_RTMDET,
    yolox=YOLOX,
    raw=dict(),
    grey=GREY)


@pytest.fixture(scope='module')
def retina():
    """The model dict of a narrow RetinaNet."""
    return detector('retina')


@pytest.fixture(scope='module')
def saved(retina, tmp_path_factory):
    """Its config and its checkpoint with one key, `state_dict`."""
    return save_teacher(retina, tmp_path_factory.mktemp('teacher'))


@pytest.fixture
def weights(saved):
    """The weights of that checkpoint."""
    return torch.load(saved['checkpoint'])['state_dict']


def make(config, checkpoint, student=None):
    """Build a teacher as the model of an mmdet config does."""
    with DefaultScope.overwrite_default_scope('mmdet'):
        return Teacher(config, checkpoint, student)


def save(content, folder, name='teacher.pth'):
    """Write a checkpoint and return its path."""
    path = str(folder / name)
    torch.save(content, path)
    return path


def assert_loaded(teacher, weights):
    """Every key of the model equals the checkpoint's."""
    state = teacher.model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], weights[key]) for key in state)


def refusal(config, checkpoint):
    """The sentence with which a checkpoint is refused."""
    with refused('model.teacher.checkpoint') as info:
        make(config, checkpoint)
    text = str(info.value)
    assert '. ' not in text, f'not one sentence: {text}'
    if checkpoint:
        assert repr(checkpoint) in text
    return text


# What it loads


def test_a_checkpoint_with_state_dict_is_loaded(saved, weights):
    """The common case."""
    assert_loaded(make(**saved), weights)


def test_a_plain_state_dict_is_loaded(retina, weights, tmp_path):
    """Torchvision and publishing scripts write such files."""
    assert_loaded(make(retina, save(weights, tmp_path)), weights)


def test_a_checkpoint_of_ddp_is_loaded(retina, weights, tmp_path):
    """The prefix `module.` is stripped."""
    content = {f'module.{key}': value for key, value in weights.items()}
    path = save(dict(state_dict=content), tmp_path)
    assert_loaded(make(retina, path), weights)


def test_keys_that_the_teacher_has_not_are_ignored(retina, weights, tmp_path):
    """MMEngine ignores them, too: checkpoints carry auxiliary heads."""
    path = save(dict(weights, extra=torch.zeros(1)), tmp_path)
    assert_loaded(make(retina, path), weights)


def test_batch_norms_that_did_not_count_are_loaded(retina, weights, tmp_path):
    """Checkpoints from before PyTorch 0.4.1 have no num_batches_tracked."""
    old = {k: v for k, v in weights.items() if 'num_batches' not in k}
    assert len(old) < len(weights)
    teacher = make(retina, save(old, tmp_path))
    state = teacher.model.state_dict()
    assert all(torch.equal(state[key], old[key]) for key in old)


def test_a_teacher_that_has_a_teacher_of_its_own(tmp_path):
    """The zoo's own knowledge distillation, whose `train` returns nothing."""
    loss = dict(type='KnowledgeDistillationKLDivLoss', T=10)
    model = detector(
        'gfl',
        type='KnowledgeDistillationSingleStageDetector',
        teacher_config=dict(model=detector('gfl')),
        bbox_head=dict(type='LDHead', loss_ld=loss))
    saved = save_teacher(model, tmp_path)
    teacher = make(**saved)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert_loaded(teacher, torch.load(saved['checkpoint'])['state_dict'])


def test_home_is_expanded(saved, tmp_path, monkeypatch, weights):
    """`~/teacher.pth` in a config works."""
    monkeypatch.setenv('HOME', str(tmp_path))
    save(weights, tmp_path)
    assert_loaded(make(saved['config'], '~/teacher.pth'), weights)


@pytest.fixture(scope='module')
def trained(retina, tmp_path_factory):
    """The checkpoint of MMEngine's Runner after two real iterations."""
    folder = tmp_path_factory.mktemp('trained')
    data_root = write_coco(folder / 'coco')
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=copy.deepcopy(retina),
            train_dataloader=dict(
                batch_size=2,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=False),
                dataset=dict(
                    type='RepeatDataset',
                    times=1,
                    dataset=dict(
                        type='CocoDataset',
                        data_root=str(data_root),
                        ann_file='coco.json',
                        data_prefix=dict(img=''),
                        metainfo=dict(classes=CLASSES),
                        pipeline=[
                            dict(type='LoadImageFromFile'),
                            dict(type='LoadAnnotations', with_bbox=True),
                            dict(type='PackDetInputs')
                        ]))),
            train_cfg=dict(by_epoch=False, max_iters=2),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=1e-3, momentum=0.9)),
            param_scheduler=[
                dict(type='LinearLR', start_factor=0.1, by_epoch=False)
            ],
            default_hooks=dict(
                checkpoint=dict(
                    type='CheckpointHook', interval=2, by_epoch=False)),
            work_dir=str(folder / 'work'),
            experiment_name=f'teacher_{os.getpid()}',
            log_level='ERROR'))
    cfg.dump(str(folder / 'config.py'))
    Runner.from_cfg(cfg).train()
    return dict(
        config=str(folder / 'config.py'),
        checkpoint=str(folder / 'work' / 'iter_2.pth'))


def test_a_checkpoint_of_the_runner_is_loaded(trained):
    """With its optimizer, schedulers and message_hub, restricted."""
    content = torch.load(trained['checkpoint'], weights_only=False)
    assert {'optimizer', 'message_hub', 'param_schedulers'} <= content.keys()
    assert content['message_hub']['log_scalars']
    teacher = make(**trained)
    assert_loaded(teacher, content['state_dict'])
    assert teacher.class_names == CLASSES


# What it refuses


@pytest.mark.parametrize('checkpoint', [None, '', 3, {}])
def test_no_checkpoint_is_refused(retina, checkpoint):
    """A random teacher is never used in silence."""
    assert 'must name a file or URL' in refusal(retina, checkpoint)


def test_a_missing_file_is_refused(retina, tmp_path):
    """Also a folder, as what it is."""
    for path, fault in ((tmp_path / 'no.pth', 'does not exist'),
                        (tmp_path, 'is a folder')):
        assert fault in refusal(retina, str(path))


@pytest.mark.parametrize('size', [0, 10, 1000, -100])
def test_an_empty_or_truncated_file_is_refused(saved, tmp_path, size):
    """Cut at the front, in the middle of the weights and at the end."""
    with open(saved['checkpoint'], 'rb') as file:
        content = file.read()
    path = tmp_path / 'truncated.pth'
    path.write_bytes(content[:size])
    assert 'truncated' in refusal(saved['config'], str(path))


def test_a_text_file_is_refused(retina, tmp_path):
    """Such as the error page of a download, or a Git LFS pointer."""
    path = tmp_path / 'page.pth'
    path.write_text('<html>404</html>\n')
    assert 'no PyTorch checkpoint' in refusal(retina, str(path))


@pytest.mark.parametrize('content', [
    [1, 2],
    torch.zeros(2),
    dict(state_dict=None),
    dict(state_dict=[torch.zeros(2)]),
    {
        0: torch.zeros(2)
    },
])
def test_something_else_than_weights_is_refused(retina, tmp_path, content):
    """The file is readable but holds no weights by name."""
    text = refusal(retina, save(content, tmp_path))
    assert 'weights' in text


@pytest.mark.parametrize('content', [{}, dict(state_dict={}), dict(a=3)])
def test_no_weights_are_refused(retina, tmp_path, content):
    """All keys are missing."""
    text = refusal(retina, save(content, tmp_path))
    assert 'missing, first backbone.conv1.weight, ' in text


def test_a_partial_checkpoint_is_refused(retina, weights, tmp_path):
    """The number and the first keys are named."""
    partial = {k: v for k, v in weights.items() if 'bbox_head' not in k}
    missing = [k for k in weights if k not in partial]
    text = refusal(retina, save(dict(state_dict=partial), tmp_path))
    assert f'{len(missing)} of {len(weights)} keys' in text
    assert f'first {", ".join(missing[:3])},' in text
    assert 'does not cover its config' in text


def test_one_missing_key_is_refused(retina, weights, tmp_path):
    """Every key must be covered."""
    del weights['bbox_head.retina_reg.bias']
    text = refusal(retina, save(weights, tmp_path))
    assert 'first bbox_head.retina_reg.bias,' in text


def test_another_number_of_classes_is_refused(retina, tmp_path):
    """The first key that does not fit is named, with both shapes."""
    other = detector('retina', bbox_head=dict(num_classes=5))
    path = save_teacher(other, tmp_path)['checkpoint']
    text = refusal(retina, path)
    assert 'bbox_head.retina_cls.weight' in text
    assert '[45, 16, 3, 3]' in text and '[27, 16, 3, 3]' in text


@pytest.mark.parametrize('other', ['faster', 'rtmdet'])
def test_another_architecture_is_refused(retina, tmp_path, other):
    """With a backbone in common, and without."""
    path = save_teacher(detector(other), tmp_path)['checkpoint']
    assert 'its config' in refusal(retina, path)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, path, by='system'):
        self.path, self.by = path, by

    def __reduce__(self):
        return dict(
            system=(os.system, (f'touch {self.path}', )),
            eval=(eval, (f'open({str(self.path)!r}, "w")', )),
            call=(subprocess.call, (['touch', str(self.path)], )),
            exec=(exec, (f'open({str(self.path)!r}, "w")', )))[self.by]


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('key', ['state_dict', 'backbone.conv1.weight'])
def test_malicious_weights_are_refused(retina, weights, tmp_path, zipped, key):
    """Nothing runs, and the culprit is named."""
    mark = tmp_path / 'it_ran'
    content = dict(state_dict=weights)
    (content if key in content else weights)[key] = Malicious(mark)
    path = str(tmp_path / 'malicious.pth')
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    text = refusal(retina, path)
    assert 'posix.system' in text and 'trust_checkpoint=True' in text
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert mark.exists()


@pytest.mark.parametrize('by', ['system', 'eval', 'call', 'exec'])
@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('key', ['meta', 'message_hub', 'optimizer'])
def test_malice_beside_the_weights_does_not_run(retina, weights, tmp_path, key,
                                                zipped, by):
    """The weights are read all the same."""
    mark, path = tmp_path / 'it_ran', str(tmp_path / 'malicious.pth')
    groups = [dict(lr=0.1, params=[0, Malicious(mark, by)])]
    state = dict(state={0: dict(momentum_buffer=None)}, param_groups=groups)
    torch.save(
        dict({
            'state_dict': weights,
            key: state
        }),
        path,
        _use_new_zipfile_serialization=zipped)
    assert_loaded(make(retina, path), weights)
    assert not mark.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert mark.exists()


class Hub(dict):
    """A class of the user's own; unpickling fills and calls it."""

    def __setstate__(self, state):
        raise AssertionError('it ran')


def test_what_hooks_store_is_left_unread(retina, weights, tmp_path):
    """Mappings, sets, paths, arrays, enums and objects with a state."""
    hub = Hub(a=1)
    hub.b = 2
    content = dict(
        meta=dict(dataset_meta=dict(classes=CLASSES), hub=hub),
        state_dict=weights,
        hook=[
            collections.defaultdict(list, a=[1]), {1, 2}, tmp_path,
            np.arange(3),
            np.float64(2),
            zipfile.ZipInfo('a'),
            functools.partial(print, 'it ran'),
            slice(2),
            Config(dict(a=1))
        ])
    path = save(content, tmp_path)
    teacher = make(retina, path)
    assert_loaded(teacher, weights)
    assert teacher.class_names == CLASSES
    torch.save(content, path, pickle_protocol=4)
    assert_loaded(make(retina, path), weights)


def test_a_teacher_that_was_trained_with_one_cycle_lr(retina, tmp_path):
    """Its scheduler keeps a method in MMEngine's checkpoint."""
    plain = build(retina, seed=5)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    scheduler = OneCycleLR(optimizer, eta_max=0.1, total_steps=10)
    path = save(
        dict(
            state_dict=plain.state_dict(),
            optimizer=optimizer.state_dict(),
            param_schedulers=[scheduler.state_dict()]), tmp_path)
    assert_loaded(make(retina, path), plain.state_dict())


@pytest.mark.parametrize(
    'name', ['../it_ran', '../../it_ran', '/{}/it_ran', 'a/../../it_ran'])
def test_a_zip_with_path_tricks(retina, weights, tmp_path, name):
    """Nothing is unpacked: a file of the archive cannot leave it."""
    name = name.format(tmp_path)
    path = save(weights, tmp_path)
    with zipfile.ZipFile(path, 'a') as archive:
        archive.writestr(name, 'it ran')
    before = sorted(tmp_path.parent.rglob('*'))
    try:
        assert_loaded(make(retina, path), weights)
    except ConfigError as error:
        assert error.field == 'model.teacher.checkpoint'
    assert sorted(tmp_path.parent.rglob('*')) == before


def test_a_checkpoint_of_ones_own_may_be_trusted(retina, weights, tmp_path):
    """The opt-in: whatever it names is imported, as long as it is a file."""
    mark, path = tmp_path / 'it_ran', str(tmp_path / 'own.pth')
    torch.save(dict(state_dict=weights, meta=dict(me=Malicious(mark))), path)
    with DefaultScope.overwrite_default_scope('mmdet'):
        teacher = Teacher(retina, path, trust_checkpoint=True)
    assert mark.exists()
    assert_loaded(teacher, weights)
    with DefaultScope.overwrite_default_scope('mmdet'), refused(
            'model.teacher.checkpoint', 'trust_checkpoint is for files'):
        Teacher(retina, 'https://127.0.0.1/own.pth', trust_checkpoint=True)


def test_safetensors(retina, weights, tmp_path):
    """Weights alone, in a format that cannot hold anything else."""
    path = tmp_path / 'teacher.safetensors'
    save_file(weights, path)
    assert_loaded(make(retina, str(path)), weights)
    os.truncate(path, path.stat().st_size // 2)
    assert 'may be truncated' in refusal(retina, str(path))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(retina, weights, tmp_path,
                                                 value):
    """A training that diverged leaves such weights."""
    weights['bbox_head.retina_cls.bias'][1] = value
    weights['backbone.bn1.running_var'][0] = value
    text = refusal(retina, save(weights, tmp_path))
    assert 'inf or nan): 2, first backbone.bn1.running_var' in text
    assert 'bbox_head.retina_cls.bias' in text


@pytest.mark.parametrize('key', [None, 'state_dict', 'model', 'net'])
@pytest.mark.parametrize('prefix', [
    '', 'module.', 'model.', 'student.', 'architecture.', '_orig_mod.',
    'module._orig_mod.'
])
def test_weights_under_another_key_or_prefix(retina, weights, tmp_path, key,
                                             prefix):
    """timm, DDP, an EMA, MMRazor and torch.compile write such files."""
    own = {f'{prefix}{name}': value for name, value in weights.items()}
    own['steps'] = torch.tensor(3)  # an EMA counts them
    content = own if key is None else {key: own, 'epoch': 3}
    assert_loaded(make(retina, save(content, tmp_path)), weights)


def test_parts_that_were_compiled(retina, weights, tmp_path):
    """``torch.compile`` of a backbone, not of the whole."""
    own = {
        name.replace('backbone.', 'backbone._orig_mod.'): value
        for name, value in weights.items()
    }
    assert_loaded(make(retina, save(own, tmp_path)), weights)


def test_several_models_in_one_file_are_refused(retina, weights, tmp_path):
    """Soft Teacher keeps two: nothing says which is meant."""
    own = {
        f'{prefix}.{name}': value
        for prefix in ('student', 'teacher')
        for name, value in weights.items()
    }
    text = refusal(retina, save(own, tmp_path))
    assert "several models, under 'student.' and 'teacher.'" in text


def test_the_keys_that_were_found_are_shown(retina, weights, tmp_path):
    """The error shows them where no prefix is understood."""
    own = {f'x{name}': value for name, value in weights.items()}
    text = refusal(retina, save(own, tmp_path))
    assert 'its own keys are like xbackbone.conv1.weight, ' in text


def test_a_malicious_plain_pickle_is_refused(retina, tmp_path):
    """Also a file that PyTorch never wrote."""
    mark, path = tmp_path / 'it_ran', tmp_path / 'malicious.pth'
    path.write_bytes(pickle.dumps(Malicious(mark)))
    refusal(retina, str(path))
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()


class Quiet(SimpleHTTPRequestHandler):
    """A file server that does not log."""

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of a folder: (folder, its URL)."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with HTTPServer(('127.0.0.1', 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield folder, f'http://127.0.0.1:{http.server_port}'
        http.shutdown()
        thread.join()


def test_a_url_is_downloaded_and_loaded(retina, weights, server):
    """Once: the second build finds it in the cache."""
    folder, url = server
    path = save(weights, folder)
    assert_loaded(make(retina, f'{url}/teacher.pth'), weights)
    os.remove(path)
    assert_loaded(make(retina, f'{url}/teacher.pth'), weights)


def test_a_url_that_leads_nowhere_is_refused(retina, server):
    """The URL and the server's answer are named."""
    text = refusal(retina, f'{server[1]}/no.pth')
    assert '404' in text and 'cannot be downloaded' in text


def test_a_malicious_download_is_refused(retina, server, tmp_path):
    """Downloads are unpickled as restrictedly as files."""
    folder, url = server
    mark = tmp_path / 'it_ran'
    save(dict(state_dict=Malicious(mark)), folder)
    assert 'posix.system' in refusal(retina, f'{url}/teacher.pth')
    assert not mark.exists()


@pytest.mark.parametrize('change', [
    dict(type='NoSuchDetector'),
    dict(no_such_argument=1),
    dict(neck=dict(type='NoSuchNeck')),
])
def test_a_config_that_cannot_be_built_is_refused(saved, change):
    """The message names the field and what is wrong."""
    name = list(change.values())[0]
    config = dict(saved['config'], **change)
    culprit = name['type'] if isinstance(name, dict) else name
    with refused('model.teacher.config', f'{culprit}|no_such'):
        make(config, saved['checkpoint'])


def test_a_model_dict_without_type_is_refused(saved):
    """The message names the field."""
    config = dict(saved['config'])
    del config['type']
    with refused('model.teacher.config', 'no `type`'):
        make(config, saved['checkpoint'])


# What it sees


def features_alone(model, data):
    """Features by plain MMDetection of raw images."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model.extract_feat(prepared(model, data)[0])


def features_of(teacher, inputs, data_samples):
    """The teacher's features of a batch of the student's."""
    batch = teacher.batch(inputs, data_samples)
    return batch.features(batch.images)


def pixel_tolerance(teacher):
    """Round-off of two roundings of a pixel in 0..255, divided by std."""
    std = min(teacher.get('std', [1.]))
    return dict(atol=4 * 255 * 2**-24 / std, rtol=1e-6)


@pytest.mark.parametrize('student', NORMALISATIONS)
@pytest.mark.parametrize('teacher', NORMALISATIONS)
def test_the_teacher_gets_the_image_that_it_expects(student, teacher):
    """Its own preprocessor would make the same of the raw images."""
    student, teacher = NORMALISATIONS[student], NORMALISATIONS[teacher]
    preprocessors = [
        DetDataPreprocessor(pad_size_divisor=32, **{
            'pad_value': 0,
            **cfg
        }) for cfg in (student, teacher)
    ]
    data = batch(sizes=((50, 70), (64, 33), (60, 96)))
    inputs, expected = (
        p(copy.deepcopy(data))['inputs'] for p in preprocessors)
    before = inputs.clone()
    ours = Renormalise(*preprocessors)(inputs, [(50, 70), (64, 33), (60, 96)])
    torch.testing.assert_close(ours, expected, **pixel_tolerance(teacher))
    pad = torch.tensor(teacher.get('pad_value', 0.), dtype=torch.float32)
    assert (ours[0, :, 50:] == pad).all() and (ours[0, :, :, 70:] == pad).all()
    assert torch.equal(inputs, before)  # the student still needs them


def test_segmentors_preprocessors_are_understood():
    """MMSegmentation names its channel swap and pad value differently."""
    cfgs = (dict(IMAGENET, pad_val=0), dict(CAFFE, pad_val=7))
    preprocessors = [SegDataPreProcessor(size=(64, 96), **c) for c in cfgs]
    data = batch(sizes=((50, 70), (64, 96)))
    for sample in data['data_samples']:
        sample.gt_sem_seg = _labels(sample.img_shape)
    inputs, expected = (
        p(copy.deepcopy(data), training=True)['inputs'] for p in preprocessors)
    ours = Renormalise(*preprocessors)(inputs, [(50, 70), (64, 96)])
    torch.testing.assert_close(ours, expected, **pixel_tolerance(CAFFE))


def _labels(size):
    from mmengine.structures import PixelData
    return PixelData(data=torch.zeros(1, *size, dtype=torch.long))


def test_preprocessors_of_several_branches_are_understood():
    """Soft Teacher wraps its own; nothing is normalised twice."""
    from mmdet.models.data_preprocessors import MultiBranchDataPreprocessor
    from mmengine.registry import DefaultScope
    with DefaultScope.overwrite_default_scope('mmdet'):
        wrapped = MultiBranchDataPreprocessor(
            dict(type='DetDataPreprocessor', **IMAGENET))
    plain = DetDataPreprocessor(**IMAGENET)
    inputs = torch.randn(1, 3, 4, 4)
    assert Renormalise(wrapped, plain)(inputs, [(4, 4)]) is inputs
    assert Renormalise(plain, wrapped)(inputs, [(4, 4)]) is inputs


def test_the_same_preprocessor_passes_the_very_tensor():
    """No round-off and no copy where nothing differs."""
    preprocessors = [DetDataPreprocessor(**IMAGENET) for _ in range(2)]
    inputs = torch.randn(1, 3, 4, 4)
    assert Renormalise(*preprocessors)(inputs, [(4, 4)]) is inputs
    assert Renormalise(None, preprocessors[0])(inputs, [(4, 4)]) is inputs


@pytest.mark.parametrize('student', [IMAGENET, CAFFE, YOLOX])
def test_features_are_those_of_the_raw_images(retina, tmp_path, student):
    """End to end, with mmdet's own preprocessing beside."""
    saved = save_teacher(retina, tmp_path)
    preprocessor = DetDataPreprocessor(pad_size_divisor=32, **student)
    teacher = make(**saved, student=preprocessor)
    data = batch(sizes=((128, 100), (70, 128)))
    expected = features_alone(teacher.model, data)
    features = features_of(teacher, **preprocessor(copy.deepcopy(data)))
    assert len(features) == len(expected) == 5
    for ours, theirs in zip(features, expected):
        # float32 through some twenty layers, relative to the largest feature
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


# What it keeps


class Student(nn.Module):
    """A module that holds a teacher as an attribute."""

    def __init__(self, teacher):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.teacher = teacher


def test_it_is_in_no_module_tree(saved):
    """Not in state_dict, parameters, buffers, modules; not moved, not set."""
    student = Student(make(**saved))
    assert set(student.state_dict()) == {'layer.weight', 'layer.bias'}
    assert len(list(student.parameters())) == 2
    assert not list(student.buffers())
    assert len(list(student.modules())) == 2
    student.train()
    student.requires_grad_(True)
    student.double()
    model = student.teacher.model
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert next(model.parameters()).dtype == torch.float32


def test_deep_copies_and_ema_share_it(saved):
    """No second teacher in memory."""
    student = Student(make(**saved))
    assert copy.deepcopy(student).teacher is student.teacher
    ema = ExponentialMovingAverage(student)
    assert ema.module.teacher is student.teacher
    assert ema.module.layer is not student.layer


def test_features_change_nothing_and_carry_no_gradient(saved):
    """Running statistics stay, though the input asks for a gradient."""
    teacher = make(**saved)
    state = copy.deepcopy(teacher.model.state_dict())
    inputs, samples = prepared(teacher.model, batch())
    features = features_of(teacher, inputs.requires_grad_(), samples)
    assert not any(level.requires_grad for level in features)
    assert_loaded(teacher, state)
    again = features_of(teacher, inputs, samples)
    assert all(map(torch.equal, features, again))


def test_it_follows_the_device_of_its_input(saved):
    """PyTorch's `meta` device, which computes shapes only, is one, too."""
    teacher = make(**saved)
    inputs, samples = prepared(teacher.model, batch())
    on_cpu = features_of(teacher, inputs, samples)
    on_meta = features_of(teacher, inputs.to('meta'), samples)
    assert [x.shape for x in on_meta] == [x.shape for x in on_cpu]
    assert {x.device.type for x in on_meta} == {'meta'}
    assert {p.device.type for p in teacher.model.parameters()} == {'meta'}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason='this machine has no CUDA device')
def test_it_follows_its_input_to_the_gpu_and_back(saved):
    """With the values that it has on the CPU."""
    teacher = make(**saved)
    inputs, samples = prepared(teacher.model, batch())
    on_cpu = features_of(teacher, inputs, samples)
    on_gpu = features_of(teacher, inputs.cuda(), samples)
    for gpu, cpu in zip(on_gpu, on_cpu):
        # TF32 convolutions: ten bits
        assert (gpu.cpu() - cpu).abs().max() < 1e-2 * cpu.abs().max()
    again = features_of(teacher, inputs, samples)
    assert all(map(torch.equal, again, on_cpu))


def random_numbers():
    """The next numbers of the three generators."""
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [
        random.random() for _ in range(3)
    ]


def seed_all():
    """The same start for the three generators."""
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


@pytest.mark.parametrize('works', [True, False])
def test_building_leaves_the_random_numbers_alone(saved, tmp_path, works):
    """The student of a seed stays the plain student of that seed."""
    seed_all()
    expected = random_numbers()
    seed_all()
    if works:
        make(**saved)
    else:
        refusal(saved['config'], save({}, tmp_path))
    assert random_numbers() == expected
    seed_all()
    build(saved['config'], seed=3)  # which does draw
    assert random_numbers()[0] != expected[0]


def test_a_config_that_cannot_be_built_leaves_them_alone(saved):
    """Whatever was drawn before the error."""
    config = copy.deepcopy(saved['config'])
    config['bbox_head']['type'] = 'NoSuchHead'
    seed_all()
    expected = random_numbers()
    seed_all()
    with refused('model.teacher.config', 'NoSuchHead'):
        make(config, saved['checkpoint'])
    assert random_numbers() == expected


@pytest.mark.parametrize('error', [None, RuntimeError])
def test_preserve_rng_covers_all_three_generators(error):
    """Whatever is drawn inside, and whether or not that fails."""
    seed_all()
    expected = random_numbers()
    seed_all()
    with contextlib.suppress(RuntimeError), preserve_rng():
        random_numbers()
        if error:
            raise error
    assert random_numbers() == expected


# The names of its classes


@pytest.mark.parametrize('meta, expected', [
    (dict(dataset_meta=dict(classes=('a', 'b', 'c'))), ('a', 'b', 'c')),
    (dict(dataset_meta=dict(CLASSES=['a', 'b', 'c'])), ('a', 'b', 'c')),
    (dict(CLASSES=('a', 'b', 'c')), ('a', 'b', 'c')),
    (dict(CLASSES=['a']), ('a', )),
    (dict(CLASSES='cell'), ('cell', )),
    (dict(dataset_meta=None, CLASSES=None), None),
    (None, None),
])
def test_class_names_of_a_checkpoint(retina, tmp_path, meta, expected):
    """MMEngine's, and the first of MMDetection 3 and MMCV 1."""
    saved = save_teacher(retina, tmp_path, meta=meta)
    assert make(**saved).class_names == expected


def test_class_names_of_the_checkpoint_go_before_the_configs(
        retina, weights, tmp_path):
    """A fine-tuned teacher with the zoo's config knows its own classes."""
    path = str(tmp_path / 'config.py')
    Config(
        dict(
            default_scope='mmdet',
            model=copy.deepcopy(retina),
            train_dataloader=dict(
                dataset=dict(
                    type='CocoDataset', metainfo=dict(
                        classes=('x', 'y', 'z')))))).dump(path)
    checkpoint = save(dict(state_dict=weights), tmp_path)
    assert make(path, checkpoint).class_names == ('x', 'y', 'z')
    meta = dict(dataset_meta=dict(classes=CLASSES))
    checkpoint = save(dict(state_dict=weights, meta=meta), tmp_path)
    assert make(path, checkpoint).class_names == CLASSES


def test_a_checkpoint_of_mmengines_save_checkpoint(retina, tmp_path):
    """Built in the config's own scope, whatever that of the caller."""
    config = str(tmp_path / 'config.py')
    Config(dict(default_scope='mmdet',
                model=copy.deepcopy(retina))).dump(config)
    plain = build(retina, seed=5)
    path = str(tmp_path / 'teacher.pth')
    save_checkpoint(
        dict(state_dict=plain.state_dict(), meta=dict(epoch=1)), path)
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert_loaded(Teacher(config, path), plain.state_dict())


def kd_losses(saved, **options):
    """Losses of a student that learns from a teacher with options."""
    wrapper = build_distiller(detector('retina'), {**saved, **options}).train()
    losses = wrapper.loss(*prepared(wrapper, batch()))
    return torch.stack([losses['loss_kd_inter'],
                        losses['loss_kd_intra']]).detach()


@pytest.mark.parametrize('options, difference', [
    (dict(dtype='float32'), 0),
    (dict(dtype='bfloat16'), 0.05),
])
def test_a_teacher_of_another_precision(saved, options, difference):
    """Its logits are rounded, and the losses nearly the same."""
    expected = kd_losses(saved)
    got = kd_losses(saved, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=difference, atol=0)
    assert torch.equal(got, expected) == (difference == 0)


def test_a_teacher_of_full_precision_beside_an_autocast_student(saved):
    """Its convolutions return float32, the student's do not."""
    wrapper = build_distiller(
        detector('retina'), dict(saved, dtype='float32')).train()
    # Until the teacher is judged, it computes twice.
    wrapper.distillation.monitor.judged = True
    dtypes = []
    for model in (wrapper.distillation.teacher.model, wrapper):
        model.bbox_head.retina_cls.register_forward_hook(
            lambda _, inputs, output: dtypes.append(output.dtype))
    inputs, samples = prepared(wrapper, batch())
    with torch.autocast('cpu', torch.bfloat16):
        wrapper.loss(inputs, samples)
    assert dtypes == 5 * [torch.bfloat16] + 5 * [torch.float32]


def test_operators_without_bfloat16_are_refused(tmp_path):
    """When the model is built, not in its first iteration."""
    saved = save_teacher(detector('faster'), tmp_path)
    with refused('model.teacher.dtype', "RoIAlign.*'bfloat16'"):
        build_distiller(detector('faster'), dict(saved, dtype='bfloat16'))


def test_an_unknown_precision_is_refused(saved):
    """The error names the field."""
    with refused('model.teacher.dtype', "must be 'float32'.*'half'"):
        Teacher(**saved, dtype='half')
