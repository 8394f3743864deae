"""Checkpoints of teachers: read without running code, loaded strictly."""
import os
import os.path as osp
import pickle
import re
from collections import OrderedDict
from functools import partial
from types import ModuleType
from typing import Any, Dict
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import print_log
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdist.utils import allow_mmengine_checkpoints


def read_checkpoint(checkpoint: str,
                    trusted: bool = False,
                    field: str = 'model.teacher.checkpoint') -> Dict[str, Any]:
    """Read a checkpoint to the CPU, without running code in it.

    Args:
        checkpoint (str): A path or a URL, of a file of PyTorch, or a path of
            one of safetensors.
        trusted (bool): Let a file of PyTorch name any function, which is
            called then. Without it, only tensors, numbers, strings and their
            containers are read.
        field (str): The field of the user's config, for errors.

    Returns:
        dict: The content.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file cannot be read.
    """
    _check_place(checkpoint, trusted, field)
    try:
        content = _read(checkpoint, trusted)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{field}={checkpoint!r}: {error}') from error
    except URLError as error:
        raise ValueError(
            f'{field}={checkpoint!r} cannot be downloaded '
            f'({error}); download it elsewhere and name the file') from error
    except _Refused as error:
        raise ValueError(
            f'{field}={checkpoint!r} is not loaded: to read '
            f'its weights would run {error}; keep the weights alone in a file '
            'of their own, or, if you made it yourself, set '
            'model.teacher.trust_checkpoint=True') from error
    except Exception as error:
        raise ValueError(f'{field}={checkpoint!r} cannot be read; it may '
                         f'be truncated or no PyTorch checkpoint '
                         f'({_reason(error)})') from error
    if not isinstance(content, dict):
        raise ValueError(
            f'{field}={checkpoint!r} holds a '
            f'{type(content).__name__} instead of a dict of weights')
    return content


def _check_place(checkpoint: str, trusted: bool, field: str) -> None:
    """Raise ValueError for a URL that is not read."""
    scheme, separator, _ = checkpoint.partition('://')
    if separator and scheme not in ('http', 'https'):
        # MMEngine's loaders of these read without the restriction.
        raise ValueError(f'{field}={checkpoint!r}: of URLs only http and '
                         'https are read; download it and name the file')
    if separator and trusted:
        raise ValueError(
            'model.teacher.trust_checkpoint is for files of your own, but '
            f'{field}={checkpoint!r}; download it first')


def _reason(error: Exception) -> str:
    """The sentence that says what is wrong."""
    # PyTorch may add a page of advice.
    lines = str(error).strip().splitlines() or ['']
    sentence = re.split(r'\.\s', lines[0].strip())[0].rstrip('.')
    return ': '.join(filter(None, [type(error).__name__, sentence]))


def _read(checkpoint: str, trusted: bool) -> Any:
    if checkpoint.startswith(('http://', 'https://')):
        checkpoint = _download(checkpoint)
    path = osp.expanduser(checkpoint)
    if not osp.isfile(path):
        raise FileNotFoundError(
            'it is a folder' if osp.isdir(path) else 'there is no such file')
    if path.endswith('.safetensors'):
        return load_file(path)
    if trusted:
        return torch.load(path, map_location='cpu', weights_only=False)
    # Loading by the fork of MMEngine takes back what the import allowed.
    allow_mmengine_checkpoints()
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        return _read_tensors(path)


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
    """Stands for an object of a checkpoint that is neither tensor nor data.

    It can be called, filled and given a state like any object that a pickle
    makes, and does nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any) -> 'Unread':
        return self

    def _ignore(self, *args: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = update = _ignore


class _Refused(Exception):
    """Names what would have to run for weights to be read."""


REBUILD = '_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'
READABLE = {
    'collections.OrderedDict': OrderedDict,
    'torch.Size': torch.Size,
    **{
        f'torch._utils.{name}': getattr(torch._utils, name)
        for name in REBUILD
    }
}


def _read_tensors(path: str) -> Any:
    """Read tensors, numbers, strings and their containers, and run nothing.

    PyTorch's restricted unpickler refuses a whole file for one object that it
    does not know, e.g. a scheduler beside the weights. Here such objects
    become :class:`Unread`.

    Raises:
        _Refused: If weights are among them.
    """
    unread = set()

    class Unpickler(pickle.Unpickler):

        def find_class(self, module: str, name: str) -> Any:
            full_name = f'{module}.{name}'
            if full_name not in READABLE:
                unread.add(full_name)
                return Unread
            found = READABLE[full_name]
            # A pickle can set attributes of what it names: give it a copy.
            return found if isinstance(found, type) else partial(found)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    reader = ModuleType('reader')  # what torch.load asks of a pickle module
    reader.Unpickler, reader.load = Unpickler, load
    content = torch.load(
        path, map_location='cpu', weights_only=False, pickle_module=reader)
    weights = _weights_of(content)
    parts = weights.values() if isinstance(weights, dict) else [weights]
    if any(isinstance(part, Unread) for part in parts):
        raise _Refused(', '.join(sorted(unread)))
    print_log(
        f'{path}: beside the weights, {", ".join(sorted(unread))} was left '
        'unread',
        logger='current')
    return content


def load_strictly(model: nn.Module, weights: Dict[str, Tensor],
                  checkpoint: str) -> None:
    """Load weights that must cover every key of the model.

    Args:
        model (nn.Module): The teacher.
        weights (dict[str, Tensor]): All keys of the model may have one prefix
            (``module.`` of DDP or an EMA, ``architecture.`` of MMRazor,
            ``_orig_mod.`` of ``torch.compile``); keys that the model does not
            have are ignored.
        checkpoint (str): Where they are from, for errors.

    Raises:
        ValueError: If a key is missing or has another shape, or a weight is
            no number.
    """
    weights = _without_prefix(weights, model, checkpoint)
    try:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    except RuntimeError as error:  # shapes
        lines = str(error).strip().split('\n\t')
        raise ValueError(
            f'model.teacher.checkpoint={checkpoint!r} does not fit '
            'model.teacher.config, which must be the one that it was trained '
            f'with: {lines[1] if lines[1:] else lines[0]}') from error
    # Old batch norms did not count; MMEngine lets this pass, too.
    missing = [key for key in missing if 'num_batches_tracked' not in key]
    if missing:
        raise ValueError(
            f'model.teacher.checkpoint={checkpoint!r} does not cover '
            f'model.teacher.config: {len(missing)} of its '
            f'{len(model.state_dict())} keys are missing, first '
            f'{", ".join(missing[:3])}; its own keys are like '
            f'{", ".join(list(weights)[:3]) or "nothing"}: name the config '
            'that it was trained with')
    parameters = dict(model.named_parameters())
    broken = [
        name for name, weight in model.state_dict().items()
        # Other buffers may be infinite on purpose, as masks are.
        if (name in parameters or 'running_' in name)
        and not weight.isfinite().all()
    ]
    if broken:
        raise ValueError(
            f'model.teacher.checkpoint={checkpoint!r} has weights that are no '
            f'numbers (inf or nan): {len(broken)}, first '
            f'{", ".join(broken[:3])}; choose an earlier checkpoint')


def weights_in(content: Dict[str, Any], checkpoint: str) -> Dict[str, Tensor]:
    """The weights of a checkpoint, or of a plain state dict.

    Raises:
        ValueError: If there are none, or several.
    """
    weights = _weights_of(content)
    if not (isinstance(weights, dict)
            and all(isinstance(key, str) for key in weights)):
        raise ValueError(
            f'model.teacher.checkpoint={checkpoint!r} holds no weights by '
            'name under `state_dict`, but '
            f'{", ".join(map(str, content)) or "nothing"}')
    return weights


def _weights_of(content: Any) -> Any:
    """The part under ``state_dict``, or under the only key with tensors."""
    if not isinstance(content, dict) or 'state_dict' in content:
        return content['state_dict'] if isinstance(content, dict) else content
    nested = [
        part for part in content.values() if isinstance(part, dict) and any(
            isinstance(value, Tensor) for value in part.values())
    ]
    return nested[0] if len(nested) == 1 else content


def _without_prefix(weights: Dict[str, Tensor], model: nn.Module,
                    checkpoint: str) -> Dict[str, Tensor]:
    """Weights under the model's own keys, if all of these have one prefix."""
    # torch.compile puts this before the keys of whatever it compiles.
    plain = {key.replace('_orig_mod.', ''): w for key, w in weights.items()}
    if len(plain) == len(weights) and plain.keys() != weights.keys():
        weights = plain
    keys = list(model.state_dict())
    prefixes = [
        key[:-len(keys[0])] for key in weights
        if key.endswith(f'.{keys[0]}') and all(
            key[:-len(keys[0])] + other in weights for other in keys)
    ]
    if keys[0] in weights or not prefixes:
        return weights
    if len(prefixes) > 1:
        raise ValueError(
            f'model.teacher.checkpoint={checkpoint!r} holds several models, '
            f'under {" and ".join(map(repr, prefixes))}; keep one of them in '
            'a file of its own, its keys without the prefix')
    return {
        key[len(prefixes[0]):]: weight
        for key, weight in weights.items() if key.startswith(prefixes[0])
    }
