"""Checkpoints of teachers: read without running code, loaded strictly."""
import os
import os.path as osp
import pickle
import re
from collections import OrderedDict
from functools import partial
from types import ModuleType
from typing import Any, Dict, Set, Tuple
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.utils import allow_mmengine_checkpoints

FIELD = 'model.teacher.checkpoint'


def _refusal(field: str,
             checkpoint: str,
             problem: str,
             remedy: str = '') -> ConfigError:
    return ConfigError(field, f'{checkpoint!r} {problem}', remedy)


def read_checkpoint(checkpoint: str,
                    trusted: bool = False,
                    field: str = FIELD) -> Dict[str, Any]:
    """Read a checkpoint to the CPU, without running code in it.

    PyTorch's restricted unpickler refuses a whole file for one object that it
    does not know, e.g. a scheduler beside the weights. Here such objects
    become :class:`Unread`.

    Args:
        checkpoint (str): A path or URL of a file of PyTorch, or a path of one
            of safetensors.
        trusted (bool): Let a file of PyTorch call any function that it names.
        field (str): The field of the user's config, for errors.

    Raises:
        ConfigError: If there is no such file, or it cannot be read.
    """
    refusal = partial(_refusal, field, checkpoint)
    path = osp.expanduser(checkpoint)
    scheme, is_url, _ = checkpoint.partition('://')
    # MMEngine's loaders of other URLs read without the restriction.
    if is_url and (trusted or scheme not in ('http', 'https')):
        raise refusal(
            'is not downloaded: only http and https are, and '
            'trust_checkpoint is for files of your own',
            'download it and name the file')
    if not (is_url or osp.isfile(path)):
        raise refusal('is a folder' if osp.isdir(path) else 'does not exist')
    unread: Set[str] = set()
    try:
        if is_url:
            path = _download(checkpoint)
        if path.endswith('.safetensors'):
            content = load_file(path)
        elif trusted:
            content = torch.load(path, map_location='cpu', weights_only=False)
        else:
            content, unread = _read_restricted(path)
    except URLError as error:
        raise refusal(f'cannot be downloaded ({error})',
                      'download it elsewhere and name the file') from error
    except Exception as error:
        # PyTorch may add a page of advice to the first sentence.
        reason = re.split(r'\.\s|\n|\.$', str(error).strip())[0]
        reason = f'{type(error).__name__}: {reason}'.rstrip(': ')
        raise refusal('cannot be read; it may be truncated or no PyTorch '
                      f'checkpoint ({reason})') from error
    weights = _weights_of(content)
    parts = weights.values() if isinstance(weights, dict) else [weights]
    names = ', '.join(sorted(unread))
    if any(isinstance(part, Unread) for part in parts):
        remedy = 'keep the weights alone in a file of their own'
        if field == FIELD:
            remedy += (', or, if you made it yourself, set '
                       'model.teacher.trust_checkpoint=True')
        raise refusal(f'is not loaded: reading its weights would run {names}',
                      remedy)
    if unread:
        print_log(
            f'{path}: beside the weights, {names} was left unread',
            logger='current')
    if not isinstance(content, dict):
        raise refusal(
            f'holds a {type(content).__name__} instead of a dict of weights')
    return content


def _download(url: str) -> str:
    """The path of a downloaded file, in the cache of PyTorch."""
    path = osp.join(torch.hub.get_dir(), 'checkpoints',
                    osp.basename(urlparse(url).path))

    def fetch() -> None:
        if not osp.exists(path):
            os.makedirs(osp.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path)

    try:
        if is_main_process():
            fetch()
    finally:  # if this failed, the others must not wait for ever
        barrier()
    fetch()  # on another machine the cache is empty
    return path


class Unread:
    """Stands for an object of a checkpoint that is neither tensor nor data: it
    can be called, filled and given a state, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any) -> 'Unread':
        return self

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


REBUILD = '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'
READABLE = {
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    **{
        f'torch._utils.{name}': getattr(torch._utils, name)
        for name in REBUILD
    }
}


def _read_restricted(path: str) -> Tuple[Any, Set[str]]:
    """Read tensors, numbers, strings and their containers, and run nothing;
    also return the names of what became :class:`Unread`."""
    # Loading by the fork of MMEngine takes back what the import allowed.
    allow_mmengine_checkpoints()
    unread: Set[str] = set()
    try:
        return torch.load(path, map_location='cpu', weights_only=True), unread
    except pickle.UnpicklingError:
        pass

    class Unpickler(pickle.Unpickler):

        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{module}.{name}'
            if full_name not in READABLE:
                unread.add(full_name)
                return Unread
            found = READABLE[full_name]
            # A pickle can set attributes of what it names: give it a copy.
            return found if isinstance(found, type) else partial(found)

    reader = ModuleType('reader')  # what torch.load asks of a pickle module
    reader.Unpickler = Unpickler
    reader.load = lambda file, **options: Unpickler(file, **options).load()
    return torch.load(
        path, map_location='cpu', weights_only=False,
        pickle_module=reader), unread


def load_strictly(model: nn.Module,
                  content: Dict[str, Any],
                  checkpoint: str,
                  field: str = FIELD) -> None:
    """Load weights that must cover every key of the model.

    ``content`` is that of a checkpoint, or a plain state dict. All keys of the
    model may have one prefix (``module.`` of DDP or an EMA, ``architecture.``
    of MMRazor, ``_orig_mod.`` of ``torch.compile``); keys that the model does
    not have are ignored. ``checkpoint`` and ``field`` are for errors.

    Raises:
        ConfigError: If there are no weights or several models', a key is
            missing or has another shape, or a weight is no number.
    """
    refusal = partial(_refusal, field, checkpoint)
    weights = _weights_of(content)
    if not (isinstance(weights, dict)
            and all(isinstance(key, str) for key in weights)):
        raise refusal('holds no weights by name under `state_dict`, but '
                      f'{", ".join(map(str, content)) or "nothing"}')
    # torch.compile puts this before the keys of whatever it compiles.
    plain = {key.replace('_orig_mod.', ''): w for key, w in weights.items()}
    if len(plain) == len(weights) and plain.keys() != weights.keys():
        weights = plain  # otherwise its metadata, read by old layers, is kept
    keys = list(model.state_dict())
    prefixes = [
        key[:-len(keys[0])] for key in weights
        if key.endswith(f'.{keys[0]}') and all(
            key[:-len(keys[0])] + other in weights for other in keys)
    ]
    if keys[0] not in weights and prefixes:
        if len(prefixes) > 1:
            raise refusal(
                'holds several models, under '
                f'{" and ".join(map(repr, prefixes))}', 'keep one of them in '
                'a file of its own, its keys without the prefix')
        weights = {
            key[len(prefixes[0]):]: weight
            for key, weight in weights.items() if key.startswith(prefixes[0])
        }
    remedy = 'name the config that it was trained with'
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # shapes
        lines = str(error).strip().split('\n\t')
        raise refusal(f'does not fit its config: {lines[:2][-1].rstrip(".")}',
                      remedy) from error
    # Old batch norms did not count; MMEngine lets this pass, too.
    missing = [key for key in missing if 'num_batches_tracked' not in key]
    if missing:
        raise refusal(
            f'does not cover its config: {len(missing)} of {len(keys)} keys '
            f'are missing, first {", ".join(missing[:3])}, and its own keys '
            f'are like {", ".join(list(weights)[:3]) or "nothing"}', remedy)
    parameters = dict(model.named_parameters())
    broken = [
        name for name, weight in model.state_dict().items()
        # Other buffers may be infinite on purpose, as masks are.
        if (name in parameters or 'running_' in name)
        and not weight.isfinite().all()
    ]
    if broken:
        raise refusal(
            f'has weights that are no numbers (inf or nan): {len(broken)}, '
            f'first {", ".join(broken[:3])}', 'choose an earlier checkpoint')


def _weights_of(content: Any) -> Any:
    """The part under ``state_dict``, or under the only key with tensors."""
    if not isinstance(content, dict):
        return content
    if 'state_dict' in content:
        return content['state_dict']
    nested = [
        part for part in content.values() if isinstance(part, dict) and any(
            isinstance(value, Tensor) for value in part.values())
    ]
    return nested[0] if len(nested) == 1 else content
