"""Folders of generated data, which are whole or not there."""
import json
import os
import tempfile
from pathlib import Path
from typing import Callable

import cv2
import numpy as np

from mmdist.errors import ConfigError

MANIFEST = 'manifest.json'


def write_folder(out_dir: str, what: str, manifest: dict,
                 write: Callable[[Path], None]) -> bool:
    """Write a folder that appears only when all of it is written.

    ``what`` it holds is for messages, ``manifest`` has the parameters that
    decide about its content, and ``write`` fills an empty folder. A folder
    with the same manifest is kept. Returns whether anything was written.

    Raises:
        ConfigError: If the folder holds something else.
    """
    out = Path(out_dir)
    if _is_reusable(out, what, manifest):
        return False
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename stays on one file system.
    with tempfile.TemporaryDirectory(
            prefix=f'.{out.name}_', dir=out.parent) as partial:
        root = Path(partial, out.name)
        root.mkdir()
        write(root)
        dump_json(manifest, root / MANIFEST)
        try:
            os.rename(root, out)
        except OSError:  # another may have made it meanwhile
            if _is_reusable(out, what, manifest):
                return False
            raise
    return True


def _is_reusable(out: Path, what: str, manifest: dict) -> bool:
    """Whether the folder has this manifest; refuse any other content."""
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError('out_dir', f'{out} exists but holds no {what}',
                          'choose another folder')
    found = json.loads((out / MANIFEST).read_text())
    if found != manifest:
        raise ConfigError(
            'out_dir',
            f'{out} holds {what} made with other parameters ({found})',
            'remove it or choose another folder')
    return True


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image or raise OSError; ``cv2.imwrite`` only returns False."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image):
        raise OSError(f'Could not write {path}.')


def dump_json(content: dict, path: Path) -> None:
    """Write JSON with a fixed layout, the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, sort_keys=True) + '\n')
