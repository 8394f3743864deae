"""Digit scenes: real handwritten digits composed into small images.

The digits are scikit-learn's 1,797 scans of 8x8 pixels. Every scene is drawn
from its own random stream, so scene ``i`` of a seed is the same image
however many scenes are made.
"""
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Tuple

import cv2
import numpy as np

from mmdist.errors import ConfigError
from .folder import dump_json, write_folder, write_png

CLASSES = tuple('0123456789')
SPLITS = ('train', 'val')
# Raised whenever the same parameters would draw other images.
GENERATOR_VERSION = 1

_VAL_FRACTION = 0.25
_POOL_STREAM = len(SPLITS)  # scenes use streams 0 and 1
_PLACEMENT_TRIES = 30
_BOX_GAP = 1  # px kept free between boxes, so that each box holds one digit


class DigitPool(NamedTuple):
    """Handwritten samples that one split may draw from."""
    images: np.ndarray  # ink in [0, 1], (N, 8, 8)
    labels: np.ndarray  # digits 0..9, (N, )
    indices: np.ndarray  # positions in sklearn.datasets.load_digits, (N, )


class Scene(NamedTuple):
    """One composed image."""
    image: np.ndarray  # BGR, uint8, (H, W, 3)
    mask: np.ndarray  # 0 for background, digit + 1 in ink, uint8, (H, W)
    boxes: np.ndarray  # tight (x, y, width, height), whole pixels, (N, 4)
    labels: np.ndarray  # digits 0..9, (N, )
    samples: np.ndarray  # their positions in load_digits, (N, )


def digit_pools(seed: int) -> Dict[str, DigitPool]:
    """Disjoint pools of handwritten samples: three quarters for 'train', the
    others for 'val'."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ConfigError(
            'digits', 'they come with scikit-learn, which is not installed',
            "pip install 'mmdist[demo]'") from error
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16.
    order = np.random.default_rng([seed,
                                   _POOL_STREAM]).permutation(len(labels))
    num_val = int(_VAL_FRACTION * len(labels))
    parts = dict(train=order[num_val:], val=order[:num_val])
    return {
        split: DigitPool(images[index], labels[index], index)
        for split, index in parts.items()
    }


def draw_scene(pool: DigitPool,
               rng: np.random.Generator,
               size: int = 160) -> Scene:
    """Draw one scene of ``size`` pixels in height and width.

    Digits vary in size (about 12 to 48 px high), slant, rotation, contrast
    and polarity; their boxes never overlap.
    """
    canvas = _background(rng, size)
    mask = np.zeros((size, size), np.uint8)
    taken = np.zeros((size, size), bool)  # by boxes
    boxes: List[Tuple[int, ...]] = []
    drawn: List[int] = []
    for _ in range(rng.integers(3, 8)):
        index = int(rng.integers(len(pool.labels)))
        ink = _warp_digit(pool.images[index], rng)
        height, width = ink.shape
        for _ in range(_PLACEMENT_TRIES if max(ink.shape) <= size else 0):
            x = int(rng.integers(0, size - width + 1))
            y = int(rng.integers(0, size - height + 1))
            if not taken[max(y - _BOX_GAP, 0):y + height + _BOX_GAP,
                         max(x - _BOX_GAP, 0):x + width + _BOX_GAP].any():
                break
        else:  # too crowded
            continue
        window = np.s_[y:y + height, x:x + width]
        _paint_ink(canvas[window], ink, _contrast(rng))
        mask[window][ink > 0] = int(pool.labels[index]) + 1
        taken[window] = True
        boxes.append((x, y, width, height))
        drawn.append(index)
    canvas += rng.normal(0, rng.uniform(2, 10), canvas.shape)
    return Scene(
        np.clip(canvas, 0, 255).astype(np.uint8), mask,
        np.array(boxes, np.int64).reshape(-1, 4), pool.labels[drawn],
        pool.indices[drawn])


def iter_scenes(split: str,
                num_scenes: int,
                seed: int = 0,
                size: int = 160) -> Iterator[Scene]:
    """Draw the scenes of a split ('train' or 'val') one after the other; see
    :func:`scenes_manifest`."""
    pool = digit_pools(seed)[split]
    for index in range(num_scenes):
        stream = np.random.default_rng([seed, SPLITS.index(split), index])
        yield draw_scene(pool, stream, size)


def scenes_manifest(num_train: int = 1000,
                    num_val: int = 240,
                    seed: int = 0,
                    size: int = 160) -> Dict[str, int]:
    """The parameters that determine every pixel of digit scenes.

    Args:
        num_train (int): Number of training scenes.
        num_val (int): Number of validation scenes.
        seed (int): Seed of the data set.
        size (int): Height and width in pixels.
    """
    return dict(
        generator_version=GENERATOR_VERSION,
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        size=size)


def write_digit_scenes(out_dir: str, **numbers: int) -> bool:
    """Write digit scenes as a COCO data set with semantic masks.

    The layout is ``images/{split}/*.png``, ``masks/{split}/*.png``,
    ``annotations/instances_{split}.json`` and ``manifest.json``. The folder
    appears only when all of it is written; one that already holds the same
    scenes is kept.

    Args:
        out_dir (str): Folder of the data set.
        **numbers (int): The arguments of :func:`scenes_manifest`.

    Returns:
        bool: Whether anything was written.
    """
    manifest = scenes_manifest(**numbers)

    def write(root: Path) -> None:
        for split in SPLITS:
            scenes = iter_scenes(split, manifest[f'num_{split}'],
                                 manifest['seed'], manifest['size'])
            _write_split(root, split, scenes)

    return write_folder(out_dir, 'digit scenes', manifest, write)


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Smooth colours crossed by pen strokes; float32, (size, size, 3)."""
    coarse = rng.uniform(40, 215, (4, 4, 3)).astype(np.float32)
    canvas = cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR)
    for _ in range(rng.integers(6, 16)):
        # An arc, as long and as thick as the strokes of a digit.
        centre = rng.integers(0, size, 2).tolist()
        axes = rng.integers(3, size // 6, 2).tolist()
        start = int(rng.integers(0, 360))
        x, y = centre
        colour = canvas[y, x] + _contrast(rng)
        cv2.ellipse(
            canvas,
            centre,
            axes,
            angle=int(rng.integers(0, 180)),
            startAngle=start,
            endAngle=start + int(rng.integers(40, 270)),
            color=colour.tolist(),
            thickness=int(rng.integers(1, 5)),
            lineType=cv2.LINE_AA)
    return canvas


def _contrast(rng: np.random.Generator) -> np.ndarray:
    """Difference of ink from its surroundings, brighter or darker; (3, )."""
    sign = rng.choice([-1, 1])
    return sign * rng.uniform(35, 110) + rng.uniform(-25, 25, 3)


def _warp_digit(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Scale, slant and turn the ink (8, 8) of a digit.

    The result is float32 opacity in [0, 1] of shape (h, w), cut so that its
    outermost rows and columns have ink.
    """
    # Log-uniform: as many doublings of small digits as of large ones.
    height = np.exp(rng.uniform(np.log(14), np.log(48)))
    turn, shear = rng.uniform(-0.3, 0.3, 2)
    scale = np.diag([height / 8 * rng.uniform(0.75, 1.2), height / 8])
    rotation = np.array([[np.cos(turn), -np.sin(turn)],
                         [np.sin(turn), np.cos(turn)]])
    linear = rotation @ np.array([[1, shear], [0, 1]]) @ scale
    side = int(2 * height)
    shift = side / 2 - linear @ np.array([3.5, 3.5])
    warped = cv2.warpAffine(
        image.astype(np.float32),
        np.column_stack([linear, shift]), (side, side),
        flags=cv2.INTER_CUBIC)
    opacity = np.clip((warped - 0.25) / 0.35, 0, 1)
    # Fainter pixels than this are drawn neither in the image nor the mask.
    opacity[opacity < 0.1] = 0
    rows, cols = np.nonzero(opacity)
    return opacity[rows.min():rows.max() + 1, cols.min():cols.max() + 1]


def _paint_ink(patch: np.ndarray, ink: np.ndarray,
               contrast: np.ndarray) -> None:
    """Mix ink (h, w) into a patch (h, w, 3), in place."""
    colour = np.clip(patch.mean((0, 1)) + contrast, 0, 255)
    patch += ink[..., None] * (colour - patch)


def _write_split(root: Path, split: str, scenes: Iterator[Scene]) -> None:
    """Write a split's images, masks and COCO annotations."""
    images: List[dict] = []
    annotations: List[dict] = []
    for index, scene in enumerate(scenes):
        name = f'{index:06d}.png'
        write_png(root / 'images' / split / name, scene.image)
        write_png(root / 'masks' / split / name, scene.mask)
        height, width = scene.mask.shape
        images.append(
            dict(id=index + 1, file_name=name, width=width, height=height))
        for box, label in zip(scene.boxes.tolist(), scene.labels.tolist()):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=index + 1,
                    category_id=label + 1,
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    dump_json(
        dict(images=images, annotations=annotations, categories=categories),
        root / 'annotations' / f'instances_{split}.json')
