"""Finding configs and the few facts about them that distillation needs."""
import importlib.util
import os.path as osp
from typing import List, Optional, Union

from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, DefaultScope

from mmdist.errors import ConfigError

WRAPPERS = dict(
    mmdet='mmdist.DistillDetector',
    mmseg='mmdist.DistillSegmentor',
    mmpretrain='mmdist.DistillClassifier')


def find_config(name: str, field: str) -> str:
    """Turn a config's path or ``'package::path'`` into a path.

    The latter is looked up in the ``.mim/configs`` of the package that is
    imported by this name. MMEngine's own look-up goes by the name of the
    distribution and would install the original package over a fork of it.
    """
    path = name
    package, separator, inner = name.partition('::')
    if separator:
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):  # 'no.such', ''
            spec = None
        if spec is None or spec.origin is None:
            raise ConfigError(
                field,
                f'the package {package!r} is not installed (got {name!r})')
        path = osp.join(osp.dirname(spec.origin), '.mim', 'configs', inner)
    if osp.isdir(path):
        raise ConfigError(field, f'{name!r} is a folder, not a config')
    if not osp.isfile(path):
        raise ConfigError(field, f'there is no such config: {name!r}')
    return path


def load_config(source: Union[str, dict],
                field: str,
                resolve: bool = True) -> Config:
    """Load the config of a student or teacher.

    A config that distils stands for its student, whose checkpoints that
    training writes: a student may teach others. A config that
    ``test.py --tta`` left stands for the model whose predictions it merges.

    Args:
        source (str | dict): A path, a ``'package::path'`` or a model dict.
        field (str): The field of the user's config, for errors.
        resolve (bool): False keeps what wraps the student or model.

    Raises:
        ConfigError: If it is no config of a model.
    """
    cfg = _read(source, field)
    if resolve and isinstance(cfg.model.get('module'), dict):
        cfg.model = cfg.model.module
    seen = [source]
    while resolve and _distils(cfg.model):
        name = cfg.model.student
        if name in seen:
            raise ConfigError(field, f'{source!r} distils itself')
        seen.append(name)
        student_cfg = _read(name, f'{field}.student')
        # The model is built as the wrapper builds it.
        if student_cfg.get('default_scope'):
            cfg.default_scope = student_cfg.default_scope
        preprocessor = cfg.model.get('data_preprocessor')
        cfg.model = student_cfg.model
        if preprocessor:
            cfg.model.setdefault('data_preprocessor', preprocessor)
    return cfg


def _distils(model: dict) -> bool:
    return 'student' in model and 'distill_loss' in model


def _read(source: Union[str, dict], field: str) -> Config:
    """Read a config as it stands, the data preprocessor in its model."""
    if isinstance(source, dict):
        if 'type' not in source:
            raise ConfigError(field, 'it has no `type`, the name of its model')
        return Config(dict(model=source))
    if not isinstance(source, str):
        raise ConfigError(
            field, 'it must be a config path, a package::path or a model '
            f'dict, but is a {type(source).__name__}')
    path = find_config(source, field)
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise ConfigError(
            field,
            f'{source!r} cannot be read as a config: {error}') from error
    if 'model' not in cfg:
        raise ConfigError(field, f'{source!r} has no `model`')
    if not isinstance(cfg.model, dict):
        raise ConfigError(
            field, f'the `model` of {source!r} must be a dict, but is a '
            f'{type(cfg.model).__name__}')
    if cfg.get('data_preprocessor'):
        # As MMEngine's runner does with the config that it is given.
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    return cfg


def library_of(cfg: Config) -> Optional[str]:
    """The library of a config's model: 'mmdet', 'mmseg' or 'mmpretrain'.

    Where ``default_scope`` is None, as in new-style configs, it is that of the
    model's class or of the class that this inherits; else None.
    """
    if cfg.get('default_scope') in WRAPPERS:
        return cfg.default_scope
    kind = (cfg.get('model') or {}).get('type')
    if isinstance(kind, str) and '.' in kind:
        # 'mmdet.RetinaNet', or a module's path, as MMEngine dumps classes
        kind = MODELS.get(kind)
    packages = [
        base.__module__.partition('.')[0]
        for base in getattr(kind, '__mro__', ())
    ]
    return next((name for name in packages if name in WRAPPERS), None)


def scope_of(cfg: Config) -> Optional[str]:
    """The scope in which the names of a config are looked up: its own, else
    that of its model's library, else the caller's."""
    scope = cfg.get('default_scope') or library_of(cfg)
    if scope:
        return scope
    current = DefaultScope.get_current_instance()
    return current.scope_name if current else None


def running_config() -> Config:
    """The config of the current runner; empty if it cannot be read."""
    text = MessageHub.get_current_instance().get_info('cfg')
    try:
        return Config.fromstring(text or '', '.py')
    except Exception:  # it shows objects, e.g. a data loader that was built
        return Config()


def wrapper_for(cfg: Config, field: str) -> str:
    """The wrapper for the library of a student's config, which the user calls
    ``field``."""
    library = library_of(cfg)
    if library is None:
        raise ConfigError(
            field, f'it has default_scope={cfg.get("default_scope")!r} and a '
            f'model of the type {cfg.model.get("type")!r}, but mmdist distils '
            f'models of {", ".join(WRAPPERS)}',
            'name one of them in default_scope, or import the class of the '
            'model')
    return WRAPPERS[library]


def data_sets_in(dataset: dict) -> List[dict]:
    """The data sets within RepeatDataset, ConcatDataset and their like: the
    very parts of the config that have a pipeline and read files."""
    if 'dataset' in dataset:
        return data_sets_in(dataset['dataset'])
    parts = dataset.get('datasets')
    if not parts:
        return [dataset]
    return [leaf for part in parts for leaf in data_sets_in(part)]


def student_of(model: dict) -> dict:
    """The model that a config tests: the student of a distiller, or itself."""
    return load_config(model, 'model').model if _distils(model) else model
