"""Class names of the data that a config trains on, in label order."""
import io
import os
import os.path as osp
import tempfile
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.fileio import dump, list_from_file, load
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS

from .config import data_sets_in, running_config, scope_of

Names = Optional[Tuple[str, ...]]


class DataClasses(NamedTuple):
    """Class names of a data set.

    Attributes:
        listed (tuple[str], optional): The names as ``metainfo.classes`` lists
            them.
        numbered (tuple[str], optional): The names in label order, read from
            the data; None where they cannot be read. COCO-style data sets
            number labels by the annotation file, whatever the order of
            ``metainfo.classes``.
    """
    listed: Names = None
    numbered: Names = None

    @property
    def in_label_order(self) -> Names:
        """The best that is known: ``numbered``, else ``listed``."""
        return self.numbered or self.listed


def as_names(classes: Any) -> Names:
    """Class names as a tuple; None where there are none.

    Args:
        classes (str | Sequence[str] | None): ``metainfo.classes``. As in
            MMEngine, a string is a file with one name per line or, where
            there is no such file, the name of the only class.
    """
    if isinstance(classes, str):
        if osp.isfile(classes):
            classes = list_from_file(classes)
        elif osp.dirname(classes) or classes.endswith('.txt'):
            return None  # a file on another machine
        else:
            classes = (classes, )
    return tuple(classes) if classes else None


def names_in(metainfo: Any) -> Names:
    """The classes of a data set's ``metainfo``.

    Args:
        metainfo (dict | Sequence[dict] | None): A sequence is what mmdet's
            ConcatDataset has where the metainfo of its parts differ.

    Raises:
        ValueError: If the parts have different classes.
    """
    if isinstance(metainfo, (list, tuple)):
        return _agreed(names_in(part) for part in metainfo)
    return as_names((metainfo or {}).get('classes'))


def _agreed(parts: Iterator[Names]) -> Names:
    """The names of all parts that have any."""
    known = [part for part in parts if part]
    for other in known[1:]:
        difference = first_difference(known[0], other)
        if difference:
            label, name, other_name = difference
            raise ValueError(
                f'train_dataloader.dataset joins data sets of different '
                f'classes: label {label} is {name} in one and {other_name} in '
                'another; give all of them the same metainfo.classes, and '
                'their annotation files the same order of categories')
    return known[0] if known else None


def first_difference(first: Sequence[str],
                     second: Sequence[str]) -> Optional[Tuple[int, str, str]]:
    """The first label whose names differ, and both names, quoted.

    Returns:
        tuple[int, str, str] | None: None if the names are the same but for
        case and underscores.
    """
    pairs = zip_longest(first, second)
    for label, names in enumerate(pairs):
        if None in names or len(set(spelt_alike(names))) > 1:
            return label, *('nothing' if name is None else repr(name)
                            for name in names)
    return None


def spelt_alike(classes: Sequence[str]) -> List[str]:
    """'traffic light' for 'Traffic_light', as MMDetection 1 wrote."""
    return [name.casefold().replace('_', ' ') for name in classes]


def data_classes_of(cfg: Config) -> DataClasses:
    """The classes of the data set that a config trains on.

    Args:
        cfg (Config): A full config.

    Raises:
        ValueError: If the data set joins others of different classes.
    """
    loader = cfg.get('train_dataloader') or {}
    parts = [
        part for part in data_sets_in(loader.get('dataset') or {})
        if 'type' in part
    ]
    return DataClasses(
        _agreed(_listed(cfg, part) for part in parts),
        _agreed(_numbered(cfg, part) for part in parts))


def class_names_of(cfg: Config) -> Names:
    """The class names of :func:`data_classes_of`, in label order."""
    return data_classes_of(cfg).in_label_order


def classes_in_training() -> DataClasses:
    """The classes of the data set that the current runner trains on.

    Raises:
        ValueError: If the data set joins others of different classes.
    """
    hub = MessageHub.get_current_instance()
    # MMEngine's runner writes both down before its first iteration.
    listed = names_in(hub.get_info('dataset_meta'))
    of_config = data_classes_of(running_config())
    # A resumed run has the config of the run before here.
    return of_config if of_config.listed == listed else DataClasses(listed)


def _dataset_type(cfg: Config, dataset: dict) -> Optional[type]:
    if not isinstance(dataset['type'], str):  # a new-style config
        return dataset['type']
    # `get` alone looks into MMEngine's registry only, whatever the scope.
    with DATASETS.switch_scope_and_registry(scope_of(cfg)) as registry:
        return registry.get(dataset['type'])


def _listed(cfg: Config, dataset: dict) -> Names:
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        classes = getattr(_dataset_type(cfg, dataset), 'METAINFO',
                          {}).get('classes')
    return as_names(classes)


def _numbered(cfg: Config, dataset: dict) -> Names:
    """The names in label order, as the data set's own class numbers them.

    CocoDataset keeps the order of the categories in the file,
    Objects365V1Dataset sorts them by id, mmpretrain's CustomDataset sorts
    folders. Others (VOC, CrowdHuman, segmentation) go by ``metainfo``.
    """
    try:
        kind = _dataset_type(cfg, dataset)
        with DATASETS.switch_scope_and_registry(scope_of(cfg)) as registry:
            built = registry.build({
                **dataset, 'type': kind,
                'pipeline': [],
                'lazy_init': True
            })
        listed = names_in(built.metainfo)
        ann_file = built.ann_file
        if ann_file.endswith('.json'):
            names = _by_category(built,
                                 _categories(ann_file, osp.getmtime(ann_file)))
        elif not ann_file and hasattr(built, 'img_prefix'):
            names = _by_folder(built.img_prefix, listed)
        else:
            names = listed
    except Exception:  # data of another machine, or of an unknown kind
        return None
    # Categories that the file lacks shift no label if they are the last.
    return listed if listed and listed[:len(names)] == names else names


@lru_cache(maxsize=8)
def _categories(path: str, _modified: float) -> List[dict]:
    """The categories of an annotation file in the style of COCO."""
    return load(path)['categories']


def _by_category(dataset: Any, categories: List[dict]) -> Names:
    """Let a data set read a file of these categories without any image."""
    content = dict(images=[], annotations=[], videos=[], categories=categories)
    with tempfile.TemporaryDirectory() as folder:
        dataset.ann_file = osp.join(folder, 'categories.json')
        dump(content, dataset.ann_file)
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset.load_data_list()
    names = {category['id']: category['name'] for category in categories}
    labels = sorted(dataset.cat2label.items(), key=lambda item: item[1])
    return tuple(names[i] for i, _ in labels)


def _by_folder(root: str, listed: Names) -> Names:
    """Sorted folders; listed names are other names for them if they differ."""
    folders = sorted(
        entry.name for entry in os.scandir(root) if entry.is_dir())
    same = listed is None or set(listed) == set(folders)
    return tuple(folders) if same else listed
