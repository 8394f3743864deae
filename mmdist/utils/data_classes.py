"""Class names of the data that a config trains on, in label order."""
import io
import os
import os.path as osp
import tempfile
from contextlib import redirect_stdout
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Iterable, List, NamedTuple, Optional, Sequence, Tuple

from mmengine.config import Config
from mmengine.fileio import dump, list_from_file, load
from mmengine.logging import MessageHub
from mmengine.registry import DATASETS

from mmdist.errors import ConfigError
from .config import data_sets_in, running_config, scope_of

Names = Optional[Tuple[str, ...]]


class DataClasses(NamedTuple):
    """Class names of a data set.

    COCO-style data sets number labels by the annotation file, whatever the
    order of ``metainfo.classes``.
    """
    listed: Names = None  # by metainfo.classes
    numbered: Names = None  # in label order, where the data can be read

    @property
    def in_label_order(self) -> Names:
        """``numbered`` where it is known, else ``listed``."""
        return self.numbered or self.listed


def names_in(metainfo: Any) -> Names:
    """The classes of a data set's ``metainfo``; None where there are none.

    A sequence is the metainfo of parts that differ (mmdet's ConcatDataset). As
    in MMEngine, ``classes`` may be a file with one name per line or, where
    there is no such file, the name of the only class.
    """
    if isinstance(metainfo, (list, tuple)):
        return _common(map(names_in, metainfo))
    classes = (metainfo or {}).get('classes')
    if isinstance(classes, str):
        if osp.isfile(classes):
            classes = list_from_file(classes)
        elif osp.dirname(classes) or classes.endswith('.txt'):
            return None  # a file on another machine
        else:
            classes = (classes, )
    return tuple(classes) if classes else None


def _common(parts: Iterable[Names]) -> Names:
    """The names of all parts that have any."""
    known = [part for part in parts if part]
    for other in known[1:]:
        difference = first_difference(known[0], other)
        if difference:
            label, name, other_name = difference
            raise ConfigError(
                'train_dataloader.dataset',
                f'it joins data sets of different classes: label {label} is '
                f'{name} in one and {other_name} in another',
                'give all of them the same metainfo.classes, and their '
                'annotation files the same order of categories')
    return known[0] if known else None


def first_difference(first: Sequence[str],
                     second: Sequence[str]) -> Optional[Tuple[int, str, str]]:
    """The first label whose names differ, and both names, quoted.

    None if the names are the same but for case and underscores.
    """
    for label, names in enumerate(zip_longest(first, second)):
        if None in names or len(set(spelt_alike(names))) > 1:
            return label, *('nothing' if name is None else repr(name)
                            for name in names)
    return None


def spelt_alike(classes: Sequence[str]) -> List[str]:
    """'traffic light' for 'Traffic_light', as MMDetection 1 wrote."""
    return [name.casefold().replace('_', ' ') for name in classes]


def data_classes_of(cfg: Config) -> DataClasses:
    """The classes of the data set that a config trains on.

    Raises:
        ConfigError: If the data set joins others of different classes.
    """
    loader = cfg.get('train_dataloader') or {}
    parts = [
        _classes_of_part(cfg, part)
        for part in data_sets_in(loader.get('dataset') or {}) if 'type' in part
    ]
    return DataClasses(
        _common(part.listed for part in parts),
        _common(part.numbered for part in parts))


def class_names_of(cfg: Config) -> Names:
    """The class names of :func:`data_classes_of`, in label order."""
    return data_classes_of(cfg).in_label_order


def classes_in_training() -> DataClasses:
    """The classes of the data set that the current runner trains on."""
    # MMEngine's runner writes names and config before its first iteration.
    listed = names_in(
        MessageHub.get_current_instance().get_info('dataset_meta'))
    of_config = data_classes_of(running_config())
    # A resumed run has the config of the run before here.
    return of_config if of_config.listed == listed else DataClasses(listed)


def _classes_of_part(cfg: Config, dataset: dict) -> DataClasses:
    """The classes of one data set, numbered as its own class numbers them.

    CocoDataset keeps the order of the categories in the file,
    Objects365V1Dataset sorts them by id, mmpretrain's CustomDataset sorts
    folders. Others (VOC, CrowdHuman, segmentation) go by ``metainfo``.
    """
    # `get` alone looks into MMEngine's registry only, whatever the scope.
    with DATASETS.switch_scope_and_registry(scope_of(cfg)) as registry:
        kind = dataset['type']
        if isinstance(kind, str):  # else a new-style config
            kind = registry.get(kind)
        metainfo = dict(dataset.get('metainfo') or {})
        if metainfo.get('classes') is None:
            metainfo = getattr(kind, 'METAINFO', {})
        in_config = names_in(metainfo)
        try:
            built = registry.build({
                **dataset, 'type': kind,
                'pipeline': [],
                'lazy_init': True
            })
            numbered = listed = names_in(built.metainfo)
            if built.ann_file.endswith('.json'):
                numbered = _by_category(built)
            elif not built.ann_file and hasattr(built, 'img_prefix'):
                folders = sorted(
                    entry.name for entry in os.scandir(built.img_prefix)
                    if entry.is_dir())
                # Other names than the folders' are names for them.
                if listed is None or set(listed) == set(folders):
                    numbered = tuple(folders)
            # Categories that the file lacks shift no label if they are last.
            if listed and listed[:len(numbered)] == numbered:
                numbered = listed
        except Exception:  # data of another machine, or of an unknown kind
            return DataClasses(in_config)
    return DataClasses(in_config, numbered)


def _by_category(dataset: Any) -> Names:
    """Let a data set read the categories of its file without any image."""
    categories = _categories(dataset.ann_file, osp.getmtime(dataset.ann_file))
    content = dict(images=[], annotations=[], videos=[], categories=categories)
    with tempfile.TemporaryDirectory() as folder:
        dataset.ann_file = osp.join(folder, 'categories.json')
        dump(content, dataset.ann_file)
        with redirect_stdout(io.StringIO()):  # pycocotools prints
            dataset.load_data_list()
    names = {category['id']: category['name'] for category in categories}
    labels = sorted(dataset.cat2label.items(), key=lambda item: item[1])
    return tuple(names[i] for i, _ in labels)


@lru_cache(maxsize=8)
def _categories(path: str, _modified: float) -> List[dict]:
    """The categories of an annotation file in the style of COCO."""
    return load(path)['categories']
