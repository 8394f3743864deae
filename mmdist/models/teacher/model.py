"""The teacher: built once, loaded strictly, frozen, out of the way."""
import copy
import random
from contextlib import contextmanager, nullcontext
from typing import (Any, ContextManager, Iterator, NamedTuple, Optional,
                    Sequence, Tuple, Union)

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.utils import load_config, scope_of
from ..class_mapping import classes_of_teacher
from ..taps.batch import TeacherBatch
from ..taps.watch import tensors_in
from .checkpoint import load_strictly, read_checkpoint


@contextmanager
def preserve_rng() -> Iterator[None]:
    """Leave all random states as they were, so that the student of a seed is
    the plain student of that seed."""
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
                resolve: bool = True) -> Tuple[nn.Module, Config]:
    """The model of a config, built in that config's own scope, and the config.

    Weights are not initialised. See :func:`mmdist.utils.load_config` for
    ``source`` and ``resolve``; ``data_preprocessor`` is for a model that names
    none, and ``field`` for errors.

    Raises:
        ConfigError: If there is no such config, or it cannot be built.
    """
    cfg = load_config(source, field, resolve)
    if data_preprocessor is not None:
        cfg.model = {'data_preprocessor': data_preprocessor, **cfg.model}
    try:
        with DefaultScope.overwrite_default_scope(scope_of(cfg)):
            # Some models write into their config (DETR into its loss).
            return MODELS.build(copy.deepcopy(cfg.model)), cfg
    except (KeyError, TypeError) as error:
        raise ConfigError(field,
                          f'it cannot be built: {error.args[0]}') from error


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
            :func:`mmdist.models.class_mapping.class_map_of`.
        dtype (str, optional): 'bfloat16' or 'float16' lets the teacher
            compute by autocast, 'float32' in full precision even where the
            student does not; None as the student. mmcv's operators (RoIs,
            deformable convolutions) know no bfloat16.
        trust_checkpoint (bool): Let a checkpoint of your own run code, see
            :func:`read_checkpoint`.
        field (str): What the user calls the teacher, for errors.

    Attributes:
        classes (DataClasses): The classes that it was trained on.

    Raises:
        ConfigError: If config or checkpoint cannot be read, or do not fit.
    """

    def __init__(self,
                 config: Union[str, dict],
                 checkpoint: str,
                 student_preprocessor: Optional[nn.Module] = None,
                 class_map: Any = None,
                 dtype: Optional[str] = None,
                 trust_checkpoint: bool = False,
                 field: str = 'model.teacher') -> None:
        if dtype not in (None, 'float32', 'float16', 'bfloat16'):
            raise ConfigError(
                f'{field}.dtype', "it must be 'float32', 'float16' or "
                f"'bfloat16', but is {dtype!r}")
        if not (isinstance(checkpoint, str) and checkpoint):
            raise ConfigError(
                f'{field}.checkpoint', 'it must name a file or URL, since a '
                f'random teacher teaches nothing (got {checkpoint!r})')
        with preserve_rng():
            self.model, cfg = build_model(config, f'{field}.config')
        if next(self.model.parameters()).is_meta:
            raise ConfigError(
                field, 'it was built on the meta device, without weights',
                'remove skip_init_weights=True from the strategy')
        operators = {
            type(module).__name__
            for module in self.model.modules()
            if type(module).__module__.startswith('mmcv.ops')
        }
        if dtype == 'bfloat16' and operators:
            raise ConfigError(
                f'{field}.dtype', f'{", ".join(sorted(operators))} has no '
                "'bfloat16' kernel in mmcv",
                "leave dtype unset or use 'float16' on a GPU")
        content = read_checkpoint(checkpoint, trust_checkpoint,
                                  f'{field}.checkpoint')
        load_strictly(self.model, content, checkpoint, f'{field}.checkpoint')
        self.model.eval()  # returns nothing, with a teacher of its own
        self.model.requires_grad_(False)
        self.checkpoint, self.class_map = checkpoint, class_map
        self.dtype = dtype and getattr(torch, dtype)
        self.classes = classes_of_teacher(content, cfg)
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

        Nothing is computed yet. With ``swapped``, red and blue are exchanged
        in the images that the teacher sees.
        """
        device = next(tensors_in(inputs)).device
        if next(self.model.parameters()).device != device:
            self.model.to(device)

        def renormalise(images: Tensor, shapes: Any) -> Tensor:
            images = self._renormalise(images, shapes)
            return images.flip(-3) if swapped else images

        def precision() -> ContextManager:
            if self.dtype is None:
                return nullcontext()
            return torch.autocast(
                device.type, self.dtype, enabled=self.dtype != torch.float32)

        return TeacherBatch(self.model, inputs, data_samples, renormalise,
                            precision)


class Normalisation(NamedTuple):
    """Statistics with which a data preprocessor normalises images."""
    mean: Tuple[float, ...]
    std: Tuple[float, ...]
    flipped: bool  # red and blue are exchanged
    pad_value: float


def normalisation_of(preprocessor: nn.Module) -> Normalisation:
    """The normalisation of a library's preprocessor."""
    # Semi-supervised models wrap theirs.
    preprocessor = getattr(preprocessor, 'data_preprocessor', preprocessor)
    facts = vars(preprocessor)
    mean, std = (0., ), (1., )
    if facts.get('_enable_normalize'):
        mean = tuple(preprocessor.mean.flatten().tolist())
        std = tuple(preprocessor.std.flatten().tolist())
    # Names of MMEngine and MMDetection, MMSegmentation, and MMPretrain.
    return Normalisation(
        mean, std,
        any(
            facts.get(name) for name in ('_channel_conversion',
                                         'channel_conversion', 'to_rgb')),
        facts.get('pad_value', facts.get('pad_val', 0)))


class Renormalise:
    """Takes images from the normalisation of the student's data preprocessor
    to that of the teacher's; None is the teacher's own."""

    def __init__(self, preprocessor: Optional[nn.Module],
                 teacher_preprocessor: nn.Module) -> None:
        self.given = normalisation_of(preprocessor or teacher_preprocessor)
        self.wanted = normalisation_of(teacher_preprocessor)

    def __call__(self,
                 inputs: Tensor,
                 img_shapes: Optional[Sequence[Any]] = None) -> Tensor:
        """Renormalise images ``(*, 3, H, W)``; the same if nothing differs.

        The padding around ``img_shapes``, height and width of each image where
        they are known, gets the teacher's pad value.
        """
        given, wanted = self.given, self.wanted
        if given == wanted:
            return inputs

        def column(values: Sequence[float]) -> Tensor:
            return inputs.new_tensor(values).view(-1, 1, 1)

        images = inputs * column(given.std) + column(given.mean)
        if given.flipped != wanted.flipped:
            images = images.flip(-3)
        images = (images - column(wanted.mean)) / column(wanted.std)
        for image, shape in zip(images, img_shapes or ()):
            if shape is not None:
                image[:, shape[0]:] = wanted.pad_value
                image[:, :, shape[1]:] = wanted.pad_value
        return images
