"""Digit images: the handwritten digits of the scenes, one per image."""
from pathlib import Path

import cv2
import numpy as np

from .digit_scenes import GENERATOR_VERSION, digit_pools
from .folder import write_folder, write_png


def write_digit_images(out_dir: str, seed: int = 0, size: int = 16) -> bool:
    """Write the digits that scenes draw from, split as for scenes.

    The layout is that of MMPretrain's ``CustomDataset``:
    ``{split}/{digit}/*.png``, of ``size`` pixels in height and width. See
    :func:`.folder.write_folder`.
    """
    manifest = dict(generator_version=GENERATOR_VERSION, seed=seed, size=size)

    def write(root: Path) -> None:
        for split, pool in digit_pools(seed).items():
            for ink, label, index in zip(*pool):  # white ink on black
                grey = cv2.resize(ink.astype(np.float32), (size, size))
                image = cv2.cvtColor((255 * grey).round().astype(np.uint8),
                                     cv2.COLOR_GRAY2BGR)
                write_png(root / split / str(label) / f'{index:04d}.png',
                          image)

    return write_folder(out_dir, 'digit images', manifest, write)
