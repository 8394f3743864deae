"""The teacher: built once, loaded strictly, frozen, out of the way."""
import copy
import random
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import (Any, ContextManager, Dict, Iterator, List, Optional,
                    Sequence, Tuple, Union)

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmdist.utils import (DataClasses, data_classes_of, load_config, names_in,
                          scope_of)
from ..taps.watch import tensors_in
from .batch import TeacherBatch
from .checkpoint import load_strictly, read_checkpoint, weights_in


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave all random states as they were.

    Building a teacher draws random numbers; without this the student of a
    seed would differ from the plain student of the same seed.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):  # models are built on the CPU
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def build_model(source: Union[str, dict],
                field: str,
                data_preprocessor: Optional[dict] = None,
                resolve: bool = True) -> Tuple[nn.Module, ConfigDict]:
    """Build the model of a config in that config's own scope.

    Args:
        source (str | dict): See :func:`mmdist.utils.load_config`.
        field (str): The field of the user's config, for errors.
        data_preprocessor (dict, optional): For a model that names none.
        resolve (bool): See there.

    Returns:
        tuple[nn.Module, ConfigDict]: The model, its weights not initialised,
        and the config.

    Raises:
        FileNotFoundError: If there is no such config.
        ValueError: If it is no config of a model.
    """
    cfg = load_config(source, field, resolve)
    if data_preprocessor is not None:
        cfg.model = {'data_preprocessor': data_preprocessor, **cfg.model}
    try:
        with DefaultScope.overwrite_default_scope(scope_of(cfg)):
            # Some models write into their config (DETR into its loss).
            return MODELS.build(copy.deepcopy(cfg.model)), cfg
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'{field} cannot be built: {error.args[0]}') from error


class Teacher:
    """A frozen model that gives features, and heads to ask for their logits.

    It is a plain object, so that it is in no module tree: not in
    ``state_dict``, ``parameters()``, DDP, the optimizer or a checkpoint. Deep
    copies (EMA) share it. It is in eval mode for ever, runs without gradient
    and follows the device of its input.

    Args:
        config (str | dict): A config path, ``'package::path'`` or model dict.
        checkpoint (str): A path or URL. It must cover every key of the model.
        student_preprocessor (nn.Module, optional): The data preprocessor that
            normalised the images that :meth:`batch` gets.
        class_map (str | list, optional): See
            :func:`mmdist.models.class_names.class_map_of`.
        dtype (str, optional): 'bfloat16' or 'float16' lets the teacher
            compute by autocast, 'float32' in full precision even where the
            student does not; None as the student. mmcv's operators (RoIs,
            deformable convolutions) know no bfloat16.
        trust_checkpoint (bool): Let a checkpoint of your own run code, see
            :func:`read_checkpoint`.

    Raises:
        FileNotFoundError: If the config or the checkpoint does not exist.
        ValueError: If either cannot be read, or they do not fit.
    """

    def __init__(self,
                 config: Union[str, dict],
                 checkpoint: str,
                 student_preprocessor: Optional[nn.Module] = None,
                 class_map: Any = None,
                 dtype: Optional[str] = None,
                 trust_checkpoint: bool = False) -> None:
        if dtype not in (None, 'float32', 'float16', 'bfloat16'):
            raise ValueError("model.teacher.dtype must be 'float32', "
                             f"'float16' or 'bfloat16', but is {dtype!r}")
        self.dtype = dtype and getattr(torch, dtype)
        if not (isinstance(checkpoint, str) and checkpoint):
            raise ValueError(
                'model.teacher.checkpoint must name a file or URL; a random '
                f'teacher teaches nothing (got {checkpoint!r})')
        self.checkpoint = checkpoint
        with preserve_rng():
            self.model, cfg = build_model(config, 'model.teacher.config')
        if next(self.model.parameters()).is_meta:
            raise ValueError(
                'model.teacher cannot be built without memory for its '
                'weights; leave skip_init_weights=True out of the strategy')
        if dtype == 'bfloat16':
            _check_bfloat16(self.model)
        content = read_checkpoint(checkpoint, trust_checkpoint)
        load_strictly(self.model, weights_in(content, checkpoint), checkpoint)
        self.model.eval()  # returns nothing, with a teacher of its own
        self.model.requires_grad_(False)
        self.class_map = class_map
        self.classes = _classes_of(content, cfg)
        self._renormalise = Renormalise(student_preprocessor,
                                        self.model.data_preprocessor)

    @property
    def class_names(self) -> Optional[Sequence[str]]:
        """Names of the teacher's classes in label order, if known."""
        return self.classes.in_label_order

    def __deepcopy__(self, memo: dict) -> 'Teacher':
        return self

    def batch(self,
              inputs: Any,
              data_samples: Any,
              swapped: bool = False) -> TeacherBatch:
        """A batch of the student's, for the taps to ask the teacher about.

        Args:
            inputs (Tensor | dict): ``(N, 3, H, W)`` or what else the student
                takes, normalised for the student.
            data_samples (Sequence | dict): The data samples that go with it.
            swapped (bool): Exchange red and blue of what the teacher sees.

        Returns:
            TeacherBatch: Nothing is computed yet.
        """
        device = next(tensors_in(inputs)).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        return TeacherBatch(self.model, inputs, data_samples,
                            self._swapped if swapped else self._renormalise,
                            partial(self._precision, device.type))

    def _swapped(self, images: Tensor, shapes: Any) -> Tensor:
        return self._renormalise(images, shapes).flip(-3)

    def _precision(self, device: str) -> ContextManager:
        if self.dtype is None:
            return nullcontext()
        return torch.autocast(
            device, self.dtype, enabled=self.dtype != torch.float32)


def _check_bfloat16(model: nn.Module) -> None:
    operators = sorted({
        type(module).__name__
        for module in model.modules()
        if type(module).__module__.startswith('mmcv.ops')
    })
    if operators:
        raise ValueError(
            "model.teacher.dtype='bfloat16' does not do for a teacher with "
            f'{", ".join(operators)}, which mmcv has not for it; leave dtype '
            "out, or choose 'float16' on a GPU")


def _classes_of(content: Dict[str, Any], cfg: Config) -> DataClasses:
    """The classes of the data set that a teacher was trained on.

    A checkpoint of MMEngine (or MMCV 1) carries the names of ``metainfo``. The
    data of the config, where they are at hand, say how labels are numbered.
    """
    meta = content.get('meta') or {}
    dataset_meta = meta.get('dataset_meta') or meta
    if isinstance(dataset_meta, dict):
        # CLASSES in MMCV 1 and in the first checkpoints of MMEngine
        names = dataset_meta.get('classes', dataset_meta.get('CLASSES'))
        dataset_meta = dict(classes=names)
    try:
        listed, of_config = names_in(dataset_meta), data_classes_of(cfg)
    except ValueError:  # data sets of different classes were joined
        return DataClasses()
    return of_config if listed in (None,
                                   of_config.listed) else DataClasses(listed)


class Renormalise:
    """Takes images from the student's normalisation to the teacher's.

    Args:
        student (nn.Module, optional): The student's data preprocessor.
        teacher (nn.Module): The teacher's.
    """

    def __init__(self, student: Optional[nn.Module],
                 teacher: nn.Module) -> None:
        # Semi-supervised models wrap theirs.
        teacher = getattr(teacher, 'data_preprocessor', teacher)
        student = getattr(student, 'data_preprocessor', student) or teacher
        self.student = _statistics(student)
        self.teacher = _statistics(teacher)
        self.pad_value = _pad_value(teacher)
        self.needed = (
            self.student != self.teacher
            or _pad_value(student) != self.pad_value)

    def __call__(
        self,
        inputs: Tensor,
        img_shapes: Optional[List[Optional[Tuple[int,
                                                 int]]]] = None) -> Tensor:
        """Renormalise a batch; the padding gets the teacher's pad value.

        Args:
            inputs (Tensor): ``(*, 3, H, W)``.
            img_shapes (list[tuple[int, int] | None], optional): Height and
                width of each picture without its padding, in pixels, where
                known.

        Returns:
            Tensor: ``(*, 3, H, W)``; ``inputs`` itself if nothing differs.
        """
        if not self.needed:
            return inputs
        mean_s, std_s, flipped_s = self.student
        mean_t, std_t, flipped_t = self.teacher
        images = inputs * _column(std_s, inputs) + _column(mean_s, inputs)
        if flipped_s != flipped_t:
            images = images.flip(-3)
        images = (images - _column(mean_t, inputs)) / _column(std_t, inputs)
        for image, shape in zip(images, img_shapes or ()):
            if shape is not None:
                image[:, shape[0]:] = self.pad_value
                image[:, :, shape[1]:] = self.pad_value
        return images


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, 1, 1)


def _statistics(preprocessor: nn.Module) -> Tuple[tuple, tuple, bool]:
    """Mean, standard deviation, and whether the channels are swapped."""
    if not getattr(preprocessor, '_enable_normalize', False):
        mean, std = (0., ), (1., )
    else:
        mean = tuple(preprocessor.mean.flatten().tolist())
        std = tuple(preprocessor.std.flatten().tolist())
    return mean, std, _first(
        preprocessor,
        '_channel_conversion',
        'channel_conversion',  # MMSegmentation
        'to_rgb')  # MMPretrain


def _pad_value(preprocessor: nn.Module) -> float:
    return _first(preprocessor, 'pad_value', 'pad_val')  # or MMSegmentation's


def _first(owner: Any, *names: str) -> Any:
    """The first of these attributes that there is, or 0."""
    return next((getattr(owner, n) for n in names if hasattr(owner, n)), 0)
