"""Exact resumption of killed runs: whole checkpoints and seeded iterations."""
import os
import os.path as osp
import re
import zipfile
from logging import WARNING
from typing import Dict, Iterable, List, Optional, Union

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

    MMEngine writes into the file itself, and removes an outdated checkpoint
    before it writes the next. So a killed run or a full disk leaves half a
    file, and with ``max_keep_ckpts=1`` no other. Here a file appears under its
    name when it is complete, and outdated files stay until then.
    """
    # MMEngine builds one backend to remove and another to write.
    _outdated: List[str] = []

    def put(self, obj: bytes, filepath: Union[str, os.PathLike]) -> None:
        """Write a whole file, or raise OSError and remove nothing."""
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
        outdated, self._outdated[:] = set(self._outdated), []
        # The best checkpoint may follow one of the same name.
        for path in outdated - {osp.abspath(filepath)}:
            if osp.exists(path):
                super().remove(path)

    def remove(self, filepath: Union[str, os.PathLike]) -> None:
        """Remove a file as soon as the next one is written."""
        self._outdated.append(osp.abspath(filepath))


@HOOKS.register_module()
class SeedHook(Hook):
    """Seeds every iteration by its number.

    MMEngine does not save the state of random numbers. Without this hook a
    resumed run samples other RoIs and drops other activations than a run that
    was not interrupted. ``custom_hooks = [dict(type='mmdist.SeedHook')]`` in a
    config makes the two equal, under every tool.

    Workers of a data loader have random numbers of their own. MMEngine seeds
    them when they start: in every epoch, unless ``persistent_workers`` is set.
    """
    priority = 'HIGHEST'

    def before_train_epoch(self, runner) -> None:
        """Seed the order and the workers of the data loader."""
        # Each rank has random numbers of its own.
        numbers = runner.seed, runner.iter, get_rank()
        seed, = SeedSequence(numbers).generate_state(1)
        set_random_seed(int(seed))

    def before_train_iter(self,
                          runner,
                          batch_idx: int,
                          data_batch: Optional[dict] = None) -> None:
        """Seed the iteration, whatever was drawn before."""
        self.before_train_epoch(runner)


def newest_checkpoint(work_dir: str,
                      names: Optional[str] = None) -> Optional[str]:
    """The path of the newest checkpoint of a run that can be read.

    MMEngine notes the last checkpoint. It is taken unless it is incomplete or
    a later one is complete: a run may be killed before the note.

    Args:
        work_dir (str): The work directory of the run.
        names (str, optional): ``filename_tmpl`` of its checkpoint hook.

    Returns:
        str | None: Also the URL that is noted; None if there is none.
    """
    noted, note = '', osp.join(work_dir, 'last_checkpoint')
    if osp.isfile(note):
        with open(note) as file:
            noted = file.read().strip()
    if '://' in noted:
        return noted
    if noted and not osp.exists(noted):  # the folder was moved
        noted = osp.join(work_dir, osp.basename(noted))
    noted = noted and osp.normpath(noted)
    steps = _checkpoints({work_dir, osp.dirname(noted) or work_dir}, names)
    if osp.isfile(noted):
        steps.setdefault(noted, -1)

    def order(path: str) -> tuple:
        """Times are lost when a folder is copied, so the note goes first,
        unless a later checkpoint is newer."""
        time, step = osp.getmtime(path), steps[path]
        later = noted in steps and (step > steps[noted]
                                    and time >= osp.getmtime(noted))
        return later, path == noted, time, step

    for path in sorted(steps, key=order, reverse=True):
        if is_whole(path):
            return path
        print_log(
            f'{path} is not complete and will be skipped',
            logger='current',
            level=WARNING)
    return None


def _checkpoints(folders: Iterable[str],
                 names: Optional[str]) -> Dict[str, int]:
    """Checkpoints that a hook wrote, and their epochs or iterations."""
    found = {}
    for template in [names] if names else ['epoch_{}.pth', 'iter_{}.pth']:
        # not files made of them later, e.g. epoch_12-1a2b3c4d.pth
        name = re.compile(r'(\d+)'.join(
            re.escape(part) for part in re.split(r'{[^}]*}', template)))
        for folder in filter(osp.isdir, folders):
            for match in filter(None, map(name.fullmatch, os.listdir(folder))):
                path = osp.normpath(osp.join(folder, match[0]))
                found[path] = int(match[1]) if match.groups() else 0
    return found


def is_whole(path: str) -> bool:
    """Whether a checkpoint is there and complete: a file of ``torch.save``,
    which is an archive with checksums, or a folder of DeepSpeed."""
    path = osp.expanduser(path)
    if osp.isdir(path):
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # zipfile has many words for a broken archive
        return False
