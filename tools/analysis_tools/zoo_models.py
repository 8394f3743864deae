"""Models of the zoos' configs and synthetic batches that they can train on.

Nothing is downloaded: pretrained weights are left out.
"""
import copy
import importlib
import re
import tempfile
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn

from mmdist.utils import find_config
from mmdist.utils.config import WRAPPERS

PACKAGES = dict(mmdet='MMDetection', mmseg='MMSegmentation')
# Sides of square images, from the smallest; some models need larger ones.
SIZES = (128, 256, 512)
NUM_PROPOSALS = 20
TEXT = tuple('person dog cat car bus bird boat bottle chair sofa'.split())

LANGUAGE_MODEL = 'bert-base-uncased'


def tell_progress() -> None:
    """Say that a training begins, as a runner does: some models ask."""
    for unit in ('iter', 'epoch'):
        MessageHub.get_current_instance().update_info(unit, 0)


def mim_folder(package: str) -> Path:
    """The folder in which an installed package keeps its configs."""
    return Path(importlib.import_module(package).__file__).parent / '.mim'


def zoo_configs(package: str) -> Dict[str, List[str]]:
    """Names of a package's configs, e.g. ``mmdet::atss/….py``, by family, the
    shortest ones first."""
    families, root = {}, mim_folder(package) / 'configs'
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        files = sorted(
            folder.glob('*.py'), key=lambda file: (len(file.name), file.name))
        names = [
            f'{package}::{folder.name}/{file.name}' for file in files
            if _has_model(file)
        ]
        if names and folder.name != '_base_':
            families[folder.name] = names
    return families


def _has_model(file: Path) -> bool:
    """Whether a config builds a model; some only hold data or schedules."""
    text = file.read_text()
    inherits = '_base_' in text and not file.stem.endswith('_tta')
    return inherits or re.search(r'^model\s*=', text, re.M) is not None


def load(config: str) -> Config:
    """A config for one process on the CPU, without pretrained weights."""
    cfg = Config.fromfile(find_config(config, '--config'))
    if 'model' not in cfg:
        raise ValueError('a config of data or a schedule, without a model')
    model = _for_cpu(cfg.model.to_dict())
    if 'data_preprocessor' in cfg:
        # as a runner does
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    _keep_size(model.get('data_preprocessor') or {})
    cfg.model = model
    return cfg


def _keep_size(preprocessor: Dict[str, Any]) -> None:
    """Do not pad small images to the size of the zoo's crops."""
    divisor = preprocessor.get('size_divisor') or 1
    if 'size' in preprocessor or divisor > SIZES[0]:
        preprocessor.update(size=None, size_divisor=1)
    if preprocessor.get('batch_augments'):
        preprocessor['batch_augments'] = [
            augment for augment in preprocessor['batch_augments']
            if augment['type'] != 'BatchFixedSizePad'
        ]


def _for_cpu(part: Any) -> Any:
    if isinstance(part, (list, tuple)):
        return type(part)(_for_cpu(item) for item in part)
    if part == LANGUAGE_MODEL:
        return random_bert().name
    if not isinstance(part, dict):
        # SyncBN asks for a process group.
        return 'BN' if part in ('SyncBN', 'MMSyncBN') else part
    if 'templates' in part:  # of captions, which CLIP encodes for all classes
        part = dict(part, templates=['a photo of a {}.'])
    # SAN does not initialise its parts without a file.
    nothing = empty_checkpoint().name if 'image_encoder' in part else None
    return {
        key:
        _for_cpu(value) if not _is_pretrained(key, value) else
        False if value is True else nothing
        for key, value in part.items()
    }


def _is_pretrained(key: str, value: Any) -> bool:
    if key in ('pretrained', 'teacher_ckpt', 'pretrain_img_encoder'):
        return isinstance(value, str) or value is True
    parts = value if isinstance(value, list) else [value]
    return key == 'init_cfg' and any(
        isinstance(part, dict) and 'checkpoint' in part for part in parts)


@lru_cache(maxsize=None)
def empty_checkpoint() -> Any:
    """A file with the weights of nothing."""
    file = tempfile.NamedTemporaryFile(suffix='.pth')
    torch.save({}, file.name)
    return file


@lru_cache(maxsize=None)
def random_bert() -> tempfile.TemporaryDirectory:
    """A folder with a random BERT of two layers that knows ``TEXT``.

    It stands for the one that models of texts download.
    """
    from transformers import BertConfig, BertModel, BertTokenizer
    folder = tempfile.TemporaryDirectory()
    words = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', *TEXT]
    vocabulary = Path(folder.name, 'vocab.txt')
    vocabulary.write_text('\n'.join(words))
    BertTokenizer(str(vocabulary)).save_pretrained(folder.name)
    config = BertConfig(vocab_size=len(words), num_hidden_layers=2)
    BertModel(config).save_pretrained(folder.name)
    return folder


def build(model: dict, package: str, seed: int) -> nn.Module:
    """Build a model and initialise its weights, from a seed."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(package), _empty_is_nan():
        built = MODELS.build(Config(dict(model=copy.deepcopy(model))).model)
        built.init_weights()
    for weight in built.parameters():
        if weight.isnan().any():
            nn.init.normal_(weight, std=0.02)
    return built


def build_wrapper(student: dict, teacher: dict, weights: Dict[str, Any],
                  package: str, folder: Path, **fields: Any) -> nn.Module:
    """Build the wrapper of a student, from a seed.

    Args:
        student (dict): The model.
        teacher (dict): ``model.teacher`` without a checkpoint.
        weights (dict): The teacher's; written to a checkpoint.
        package (str): 'mmdet' or 'mmseg'.
        folder (Path): For the checkpoint.
        fields: Further fields of the wrapper, such as its losses.
    """
    checkpoint = str(folder / 'teacher.pth')
    torch.save(dict(state_dict=weights), checkpoint)
    return build(
        dict(
            type=WRAPPERS[package],
            student=student,
            teacher=dict(teacher, checkpoint=checkpoint),
            **fields),
        package,
        seed=0)


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Tell weights that only a checkpoint fills (CLIP's) from others."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def batch_for(model: nn.Module, cfg: Config, package: str,
              size: int) -> Dict[str, Any]:
    """A batch as a data loader yields it, for a kind of model.

    Args:
        model (nn.Module): The model.
        cfg (Config): Its config; its pipeline says what it learns from.
        package (str): 'mmdet' or 'mmseg'.
        size (int): Height and width of the images in pixels.
    """
    # classes that all heads know, but for proposals; SSD's backbone has -1
    num_classes = min(
        (module.num_classes for path, module in model.named_modules()
         if isinstance(getattr(module, 'num_classes', None), int)
         and 'rpn' not in path and module.num_classes > 0),
        default=1)
    if package == 'mmseg':
        return _segmentation_batch(num_classes, size)
    masks = bool(_find(cfg.get('train_dataloader', {}), 'with_mask'))
    if _takes_videos(model):
        return _video_batch(num_classes, size, masks)
    if hasattr(model, 'semi_train_cfg'):
        return _semi_supervised_batch(num_classes, size, masks)
    text = hasattr(model, 'language_model')
    batch = _detection_batch(num_classes, size, masks, text)
    if hasattr(model, 'roi_head') and not model.with_rpn:  # Fast R-CNN
        for sample in batch['data_samples']:
            sample.proposals = _proposals(size)
    return batch


def _takes_videos(model: nn.Module) -> bool:
    from mmdet.models.mot import BaseMOTModel
    trains_on_images = getattr(model.data_preprocessor, 'use_det_processor',
                               False)
    return isinstance(model, BaseMOTModel) and not trains_on_images


def _find(part: Any, key: str) -> Optional[Any]:
    """The first true value of a key anywhere in a config."""
    if isinstance(part, dict):
        if part.get(key):
            return part[key]
        part = list(part.values())
    found = (_find(item, key)
             for item in part) if isinstance(part, (list, tuple)) else ()
    return next((value for value in found if value), None)


def _detection_batch(num_classes: int,
                     size: int,
                     masks: bool,
                     text: bool = False) -> Dict[str, Any]:
    from mmdet.testing import demo_mm_inputs
    options = dict(texts=[TEXT] * 2, custom_entities=True) if text else {}
    # MMDetection draws labels of 8 bits.
    num_classes = min(num_classes, len(TEXT) if text else 250)
    data = demo_mm_inputs(
        image_shapes=(3, size, size),
        num_items=[4, 3],
        # its labels begin at 1
        num_classes=num_classes + 1,
        with_mask=masks,
        with_semantic=True,
        **options)
    for sample in data['data_samples']:
        sample.gt_instances.labels -= 1
        sample.gt_sem_seg.sem_seg %= num_classes
    return data


def _proposals(size: int) -> InstanceData:
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, 0.6, (NUM_PROPOSALS, 2))
    sides = rng.uniform(0.1, 0.4, (NUM_PROPOSALS, 2))
    boxes = np.concatenate([corners, corners + sides], 1) * size
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32),
        scores=torch.rand(NUM_PROPOSALS))


def _video_batch(num_classes: int, size: int, masks: bool) -> Dict[str, Any]:
    from mmdet.testing import demo_track_inputs
    return demo_track_inputs(
        num_frames=2,
        key_frames_inds=[0],
        image_shapes=(3, size, size),
        num_items=[3],
        num_classes=num_classes,
        with_mask=masks)


def _semi_supervised_batch(num_classes: int, size: int,
                           masks: bool) -> Dict[str, Any]:
    """The three branches of a semi-supervised detector."""
    batch: Dict[str, Any] = dict(inputs={}, data_samples={})
    for branch in ('sup', 'unsup_teacher', 'unsup_student'):
        part = _detection_batch(num_classes, size, masks)
        for sample in part['data_samples']:
            sample.set_metainfo(
                dict(homography_matrix=np.eye(3, dtype=np.float32)))
        for key in batch:
            batch[key][branch] = part[key]
    return batch


def _segmentation_batch(num_classes: int, size: int) -> Dict[str, Any]:
    from mmseg.structures import SegDataSample
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        blocks = rng.integers(0, max(num_classes, 2), (size // 8, size // 8))
        labels = torch.from_numpy(np.kron(blocks, np.ones((8, 8), np.int64)))
        edges = torch.zeros(1, size, size, dtype=torch.long)
        shape = (size, size)
        samples.append(
            SegDataSample(
                gt_sem_seg=PixelData(data=labels[None]),
                gt_edge_map=PixelData(data=edges),
                gt_depth_map=PixelData(data=edges.float() + 1),
                metainfo=dict(
                    img_shape=shape, ori_shape=shape, pad_shape=shape)))
    inputs = [
        torch.from_numpy(rng.integers(0, 256, (3, size, size), np.uint8))
        for _ in samples
    ]
    return dict(inputs=inputs, data_samples=samples)


def last_line(error: BaseException) -> str:
    """The error in one line, without addresses and folders."""
    # PyTorch may write the frames of its own stack behind.
    said = re.split(r'\n?(?:Exception raised from|frame #\d)', str(error))[0]
    text = next((line for line in reversed(said.splitlines()) if line), '')
    text = re.sub(r'\b0x[0-9a-f]+', '0x…', ' '.join(text.split()))
    text = re.sub(r'(/[\w.+-]+)+/', '…/', text)
    return f'{type(error).__name__}: {text}'.strip(': ')[:300]
