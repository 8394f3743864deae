"""Classes of student and teacher: checks of their names, and their map."""
from typing import Any, Dict, List, Optional, Sequence

from mmengine.config import Config

from mmdist.errors import ConfigError
from mmdist.utils import (DataClasses, data_classes_of, first_difference,
                          names_in, spelt_alike)

Names = Optional[Sequence[str]]
FIELD = 'model.teacher.class_map'
DATA = 'train_dataloader.dataset'


def classes_of_teacher(content: Dict[str, Any], cfg: Config) -> DataClasses:
    """The classes of the data set that a teacher was trained on.

    A checkpoint of MMEngine (or MMCV 1) carries the names of ``metainfo``. The
    data of the config, where they are at hand, say how labels are numbered.
    """
    meta = content.get('meta') or {}
    meta = meta.get('dataset_meta') or meta
    if isinstance(meta, dict):
        # CLASSES in MMCV 1 and in the first checkpoints of MMEngine
        meta = dict(classes=meta.get('classes', meta.get('CLASSES')))
    try:
        listed, of_config = names_in(meta), data_classes_of(cfg)
    except ConfigError:  # data sets of different classes were joined
        return DataClasses()
    known = listed in (None, of_config.listed)
    return of_config if known else DataClasses(listed)


def class_map_of(spec: Any,
                 teacher_names: Names,
                 data_names: Names,
                 field: str = FIELD) -> List[int]:
    """The teacher's class for each class of the student.

    Args:
        spec (str | Sequence): 'names', which looks the student's names up
            among the teacher's, or a list of the teacher's classes, as names
            or labels.
        teacher_names (Sequence[str], optional): Names of its classes.
        data_names (Sequence[str], optional): Names of the training set.
        field (str): What the user calls the map, for errors.

    Returns:
        list[int]: The teacher's labels in the order of the student's.

    Raises:
        ConfigError: If the map is impossible; names what does not match.
    """
    wanted = data_names if spec == 'names' else spec
    if spec == 'names' and not data_names:
        raise ConfigError(
            field, "'names' needs the classes of the training set",
            f'give {DATA} a metainfo with `classes`, or list the '
            "teacher's classes instead")
    if not isinstance(wanted, (list, tuple)) or not wanted:
        raise ConfigError(
            field, "it must be 'names' or a list of the teacher's classes, "
            f'as names or labels, but is {spec!r}')
    known, labels = spelt_alike(teacher_names or ()), []
    for item in wanted:
        if isinstance(item, str):
            name, = spelt_alike([item])
            labels.append(known.index(name) if name in known else item)
        elif isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ConfigError(
                field, f'it has {item!r}, which is neither a name nor a '
                'label (0, 1, …)')
        else:
            labels.append(item)
    missing = ', '.join(repr(x) for x in labels if isinstance(x, str))
    if missing and not known:
        raise ConfigError(
            field, f'it has the name {missing}, but neither the checkpoint '
            "nor the config of the teacher says the teacher's names",
            'list labels instead')
    if missing:
        raise ConfigError(
            field, f'the teacher has no class {missing}, but has '
            f'{", ".join(map(repr, teacher_names))}')
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(
                field,
                f'it has the class {label} of the teacher more than once')
    return labels


def class_map_to_build(spec: Any, teacher_names: Names,
                       number: Optional[int]) -> Optional[List[int]]:
    """The map before the names of the training set are known.

    The spec 'names' is looked up in the first iteration; until then the first
    classes stand for the ``number`` of classes that the student predicts (None
    if its head does not say).
    """
    if spec is None:
        return None
    if spec != 'names':
        return class_map_of(spec, teacher_names, None)
    number = number or len(teacher_names or ())
    if teacher_names and len(teacher_names) < number:
        raise ConfigError(
            FIELD, f"'names' needs a teacher of all {number} classes that "
            'model.student predicts, but the teacher has '
            f'{len(teacher_names)}: {", ".join(teacher_names)}')
    return list(range(number))


def check_all_named(spec: Any, teacher_names: Names,
                    number: Optional[int]) -> None:
    """Make sure that a map by names knows the names of all ``number`` classes
    that the teacher predicts."""
    by_name = any(isinstance(item, str) for item in spec or ())
    if by_name and teacher_names and number and len(teacher_names) != number:
        raise ConfigError(
            FIELD, f'it goes by names, but the teacher predicts {number} '
            f'classes and names {len(teacher_names)}: '
            f'{", ".join(teacher_names)}',
            'name the config with which it was trained, or list labels '
            'instead')


def class_map_in_training(spec: Any, teacher_classes: DataClasses,
                          data: DataClasses,
                          number: Optional[int]) -> Optional[List[int]]:
    """Compare the teacher's classes with those of the training set, and with
    the ``number`` that the student predicts, if its head says so.

    Returns:
        list[int] | None: The map that 'names' stands for; None for any other
        ``spec``, whose map is known already.

    Raises:
        ConfigError: If student, teacher and data do not fit.
    """
    names = data.in_label_order
    if number and names and len(names) > number:
        raise ConfigError(
            DATA, f'it has {len(names)} classes but model.student predicts '
            f'{number}', "set num_classes of the student's heads, or list "
            'the classes that you have in metainfo.classes')
    by_name = spec is None or any(isinstance(item, str) for item in spec)
    if by_name and data.listed and data.numbered:
        # Names say nothing where metainfo lists them in another order than
        # the annotation file, unless the teacher's data have the same fault.
        difference = first_difference(data.listed, data.numbered)
        alike = teacher_classes.numbered and not (
            first_difference(teacher_classes.numbered, data.numbered)
            or first_difference(teacher_classes.listed, data.listed))
        if difference and not alike:
            label, listed, numbered = difference
            spelt = spelt_alike(data.listed)
            if label < len(spelt) and spelt[label] not in spelt_alike(
                    data.numbered):
                raise ConfigError(
                    DATA, f'metainfo.classes has {listed}, which is no '
                    f'category of the data, so that label {label} is '
                    f'{numbered}', 'write it as the annotation file does, or '
                    'list it last')
            raise ConfigError(
                DATA, f'label {label} is {listed} in metainfo.classes but '
                f'{numbered} in the data, by which the student is trained, so '
                'names cannot say what it shares with the teacher',
                'list metainfo.classes in the order of the data, or the '
                f"teacher's labels in {FIELD} (0, 1, … in their order if it "
                'was trained on data with the same fault)')
    if spec is None:
        check_class_names(teacher_classes.in_label_order, names)
    elif spec == 'names':
        return class_map_of(spec, teacher_classes.in_label_order, names)
    else:
        check_named_map(spec, teacher_classes.in_label_order, names)
    return None


def check_masks(samples: Any, number: Optional[int],
                ignored: Optional[int]) -> None:
    """Make sure that the student predicts every label of the masks.

    Its own loss would say less, and on a GPU nothing that can be read.

    Args:
        samples (Any): The data samples of a batch.
        number (int, optional): The number of classes of the student's head.
        ignored (int, optional): The label of pixels without one.
    """
    if None in (number, ignored) or not isinstance(samples, (list, tuple)):
        return
    for sample in samples:
        if 'gt_sem_seg' not in sample:
            continue
        labels = sample.gt_sem_seg.data
        labels = labels[labels != ignored]
        if labels.numel() and labels.max() >= number:
            raise ConfigError(
                DATA, f'a mask has the label {int(labels.max())} but '
                f'model.student predicts {number} classes, 0 to {number - 1}',
                "set num_classes of the student's heads, or give pixels "
                f'without a class the value {ignored}')


def check_class_names(teacher_names: Names,
                      data_names: Names,
                      field: str = FIELD) -> None:
    """Make sure that both predict the same classes in one order, if the names
    of both are known."""
    difference = teacher_names and data_names and first_difference(
        teacher_names, data_names)
    if difference:
        label, *names = difference
        raise ConfigError(
            field, f'label {label} is {names[0]} for the teacher and '
            f'{names[1]} in the data', "choose a teacher of the data's "
            "classes in their order, or set it to 'names'")


def check_numbers(num_student: int,
                  num_teacher: int,
                  class_map: Optional[Sequence[int]],
                  field: str = FIELD) -> None:
    """Make sure that the numbers of classes that both predict fit the map."""
    if class_map is None:
        if num_student != num_teacher:
            raise ConfigError(
                field, f'the teacher predicts {num_teacher} classes but '
                f'model.student predicts {num_student}',
                "choose a teacher of the student's classes, set num_classes "
                "of the student's head, or list the teacher's class for each "
                "of the student's here")
    elif num_student != len(class_map):
        raise ConfigError(
            field, f'it has {len(class_map)} classes but model.student '
            f'predicts {num_student}',
            "name one of the teacher's for each of the student's")
    elif max(class_map) >= num_teacher:
        raise ConfigError(
            field, f'it names the class {max(class_map)}, but the teacher '
            f'predicts {num_teacher}, from 0 to {num_teacher - 1}')


def check_named_map(spec: Sequence[Any], teacher_names: Names,
                    data_names: Names) -> None:
    """Make sure that a map by names gives a class of the training set no other
    name of the teacher's than its own, if the teacher has it."""
    known = spelt_alike(teacher_names or ())
    for label, (item, name) in enumerate(zip(spec, data_names or ())):
        if isinstance(item, str):
            wanted, own = spelt_alike([item, name])
            if wanted != own and own in known:
                raise ConfigError(
                    FIELD, f'it says {item!r} for label {label}, which is '
                    f'{name!r} in the data',
                    "list the classes in the order of the data's labels")
