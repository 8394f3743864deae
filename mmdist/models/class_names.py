"""Whose class is whose: names and maps of student and teacher."""
from typing import Any, List, Optional, Sequence

from mmdist.utils import DataClasses, first_difference, spelt_alike

Names = Optional[Sequence[str]]
FIELD = 'model.teacher.class_map'


def check_class_names(teacher: Names, student: Names) -> None:
    """Make sure that both predict the same classes in one order.

    Args:
        teacher (Sequence[str], optional): The teacher's; None if unknown.
        student (Sequence[str], optional): Those of the training set.

    Raises:
        ValueError: If both are known and differ; names the first that does.
    """
    if not teacher or not student:
        return
    difference = first_difference(teacher, student)
    if difference is None:
        return
    label, *names = difference
    raise ValueError(
        'the classes of model.teacher and of train_dataloader.dataset differ: '
        f'label {label} is {names[0]} for the teacher and {names[1]} in the '
        "data; choose a teacher of the data's classes in their order, or set "
        f"{FIELD}='names'")


def check_all_predicted(number: Optional[int], data: Names) -> None:
    """Make sure that the student predicts all classes of its training set.

    Args:
        number (int, optional): How many classes it predicts, if it says so.
        data (Sequence[str], optional): The names of the training set.

    Raises:
        ValueError: If the training set has more.
    """
    if number and data and len(data) > number:
        raise ValueError(
            f'train_dataloader.dataset has {len(data)} classes but '
            f"model.student predicts {number}; set num_classes of the "
            "student's heads, or leave classes out of metainfo.classes")


def check_names_fit_labels(teacher: DataClasses, data: DataClasses) -> None:
    """Make sure that names can say which class of the teacher is whose.

    They cannot where ``metainfo`` lists the classes of the training set in
    another order than its annotation file numbers them, unless the teacher
    was trained on data with the same fault.

    Args:
        teacher (DataClasses): The teacher's classes.
        data (DataClasses): The classes of the training set.

    Raises:
        ValueError: If names and labels contradict each other.
    """
    if not (data.listed and data.numbered):
        return
    difference = first_difference(data.listed, data.numbered)
    alike = teacher.numbered and not (
        first_difference(teacher.numbered, data.numbered)
        or first_difference(teacher.listed, data.listed))
    if difference and not alike:
        label, listed, numbered = difference
        raise ValueError(
            f'train_dataloader.dataset: label {label} is {listed} in '
            f'metainfo.classes but {numbered} in the data, by which the '
            'student is trained, so names cannot say what it shares with '
            'model.teacher; list metainfo.classes in the order of the data, '
            f"or the teacher's labels in {FIELD} (0, 1, … in their order if "
            'it was trained on data with the same fault)')


def class_map_of(spec: Any, teacher: Names, student: Names) -> List[int]:
    """The teacher's class for each class of the student.

    Args:
        spec (str | Sequence): 'names', which looks the student's names up
            among the teacher's, or a list of the teacher's classes, as names
            or labels.
        teacher (Sequence[str], optional): The teacher's names.
        student (Sequence[str], optional): Those of the training set.

    Returns:
        list[int]: The teacher's labels in the order of the student's.

    Raises:
        ValueError: If the map is impossible; names what does not match.
    """
    if spec == 'names':
        if not student:
            raise ValueError(
                f"{FIELD}='names' needs the classes of the training set; give "
                'train_dataloader.dataset a metainfo with `classes`, or list '
                "the teacher's classes instead")
        spec = student
    elif not isinstance(spec, (list, tuple)) or not spec:
        raise ValueError(f"{FIELD} must be 'names' or a list of the teacher's "
                         f'classes, as names or labels, but is {spec!r}')
    labels = [
        _label(item, teacher) if isinstance(item, str) else item
        for item in spec
    ]
    missing = [repr(name) for name, i in zip(spec, labels) if i is None]
    if missing:
        raise ValueError(
            f'{FIELD}: model.teacher has no class {", ".join(missing)}; it '
            f'has {", ".join(map(repr, teacher or ()))}')
    return _checked(labels)


def check_enough_names(teacher: Names, number: int) -> None:
    """Make sure that a teacher can have all classes of a student.

    Args:
        teacher (Sequence[str], optional): The teacher's names.
        number (int): Classes that the student predicts.

    Raises:
        ValueError: If the teacher is known to have fewer.
    """
    if teacher and len(teacher) < number:
        raise ValueError(
            f"{FIELD}='names' needs a teacher of all {number} classes that "
            f'model.student predicts, but model.teacher has {len(teacher)}: '
            f'{", ".join(teacher)}')


def check_all_named(teacher: Names, number: Optional[int]) -> None:
    """Make sure that the names are of all that the teacher predicts.

    Args:
        teacher (Sequence[str], optional): The teacher's names.
        number (int, optional): Classes that it predicts.

    Raises:
        ValueError: If both are known and differ.
    """
    if teacher and number and len(teacher) != number:
        raise ValueError(
            f'{FIELD} goes by names, but model.teacher predicts {number} '
            f'classes and names {len(teacher)}: {", ".join(teacher)}; name '
            'the config with which it was trained, or list labels instead')


def check_named_map(spec: Sequence[Any], teacher: Names,
                    student: Names) -> None:
    """Make sure that a map by names does not swap classes of one name.

    Args:
        spec (Sequence): The teacher's classes, as names or labels.
        teacher (Sequence[str], optional): The teacher's names.
        student (Sequence[str], optional): Those of the training set.

    Raises:
        ValueError: If a class of the training set is mapped to another name
            though the teacher has its own.
    """
    known = spelt_alike(teacher or ())
    for label, (item, name) in enumerate(zip(spec, student or ())):
        if isinstance(item, str):
            wanted, own = spelt_alike([item, name])
            if wanted != own and own in known:
                raise ValueError(
                    f'{FIELD} says {item!r} for label {label}, which is '
                    f'{name!r} in the data; list the classes in the order of '
                    "the data's labels")


def _label(name: str, teacher: Names) -> Optional[int]:
    if not teacher:
        raise ValueError(
            f'{FIELD} has the name {name!r}, but neither the checkpoint nor '
            "the config of model.teacher says the teacher's names; list "
            'labels instead')
    spelt = spelt_alike(teacher)
    wanted = spelt_alike([name])[0]
    return spelt.index(wanted) if wanted in spelt else None


def _checked(labels: Sequence[Any]) -> List[int]:
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise ValueError(f'{FIELD} has {label!r}, which is neither a name '
                             'nor a label (0, 1, …)')
    if len(set(labels)) < len(labels):
        twice = next(i for i in labels if list(labels).count(i) > 1)
        raise ValueError(f'{FIELD} has the class {twice} of the teacher more '
                         'than once')
    return list(labels)
