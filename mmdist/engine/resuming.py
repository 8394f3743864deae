"""What lets a run that was killed go on as if it had not been."""
import glob
import os
import os.path as osp
import zipfile
from typing import List, Optional, Union

from mmengine.dist import get_rank
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import set_random_seed
from numpy.random import SeedSequence

from mmdist.registry import HOOKS

PARTIAL = '.partial'


@register_backend('mmdist.whole')
class WholeFiles(LocalBackend):
    """Files that are whole or not there, for ``CheckpointHook.backend_args``.

    MMEngine writes into the file itself, and removes the checkpoint that is
    one too many before it writes the next: a run that is killed, or a disk
    that is full, leaves half a file, and with ``max_keep_ckpts=1`` no other.
    Here a file appears under its name when it is complete, and what was to be
    removed stays until then.
    """
    # MMEngine builds one backend to remove and another to write.
    _outdated: List[str] = []

    def put(self, obj: bytes, filepath: Union[str, os.PathLike]) -> None:
        """Write a whole file.

        Args:
            obj (bytes): The content.
            filepath (str | Path): Where to.

        Raises:
            OSError: If it cannot be written; nothing was removed then.
        """
        part = f'{filepath}{PARTIAL}'
        try:
            super().put(obj, part)
            with open(part, 'rb') as file:
                os.fsync(file.fileno())  # before the name says it is whole
            os.replace(part, filepath)
        except OSError as error:
            if osp.exists(part):
                os.unlink(part)
            raise OSError(
                error.errno, f'{filepath} could not be written '
                f'({error.strerror}); the checkpoints before it were kept, '
                'so make room and go on with --resume') from error
        while self._outdated:
            super().remove(self._outdated.pop())

    def remove(self, filepath: Union[str, os.PathLike]) -> None:
        """Remove a file as soon as the next one is written."""
        self._outdated.append(str(filepath))


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds every iteration by its number.

    MMEngine saves no state of the random numbers: of a resumed run, RoIs are
    sampled and activations dropped otherwise than if it had gone on. Seeded
    so, an iteration does not depend on how the run came to it.

    What the workers of a data loader draw is theirs. MMEngine seeds them when
    they start, which is in every epoch unless ``persistent_workers`` is set.
    """

    def before_train_epoch(self, runner) -> None:
        """The order and the workers of a data loader draw from it."""
        self._seed(runner)

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch: Optional[dict] = None) -> None:
        """Whatever was drawn since the last iteration is forgotten."""
        self._seed(runner)

    def _seed(self, runner) -> None:
        ranks_differ = runner._randomness_cfg.get('diff_rank_seed', False)
        numbers = runner.seed, runner.iter, get_rank() * ranks_differ
        seed, = SeedSequence(numbers).generate_state(1)
        set_random_seed(int(seed))


def newest_checkpoint(work_dir: str,
                      names: Optional[str] = None) -> Optional[str]:
    """The newest checkpoint of a run that can be read.

    Args:
        work_dir (str): The run's.
        names (str, optional): ``filename_tmpl`` of its checkpoint hook.

    Returns:
        str | None: A path; None if there is none.
    """
    paths = filter(osp.exists, _checkpoints(work_dir, names))
    for path in sorted(paths, key=osp.getmtime, reverse=True):
        if is_whole(path):
            return path
        print_log(
            f'{path} is not complete and will be skipped', logger='current')
    return None


def _checkpoints(work_dir: str, names: Optional[str]) -> List[str]:
    """Those that the hook wrote, and the one MMEngine has noted as last."""
    folders, noted = {work_dir}, osp.join(work_dir, 'last_checkpoint')
    last = ''
    if osp.isfile(noted):
        with open(noted) as file:
            last = file.read().strip()
    if last:
        folders.add(osp.dirname(last))  # out_dir of the hook
    patterns = ['epoch_*.pth', 'iter_*.pth']
    if names:
        patterns = [names.replace('{}', '*')]
    found = {
        osp.normpath(path)
        for folder in folders
        for pattern in patterns
        for path in glob.glob(osp.join(glob.escape(folder), pattern))
    }
    return sorted(found | ({osp.normpath(last)} if last else set()))


def is_whole(path: str) -> bool:
    """Whether a checkpoint is complete.

    Args:
        path (str): A file that ``torch.save`` wrote, which is an archive with
            checksums, or a folder of DeepSpeed.

    Returns:
        bool: False also if there is no such file.
    """
    if osp.isdir(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False
