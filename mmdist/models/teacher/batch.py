"""The teacher's answers to what the taps ask about one batch."""
import inspect
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import (Any, Callable, Collection, Dict, Iterator, List, Optional,
                    Sequence)

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdist.errors import ConfigError
from ..taps.watch import owner_of, replaced


class _Answered(Exception):
    """Ends a model's method as soon as the answer is known."""


class TeacherBatch:
    """One batch of images, and the teacher's predictions for it.

    The teacher neither proposes nor samples nor computes a loss: its heads
    run their ``forward`` and no more. Whatever was computed is kept for the
    next question about the same images.

    Args:
        model (nn.Module): The teacher, in eval mode.
        inputs (Tensor | dict): The inputs of the student's ``loss``.
        samples (Sequence | dict): The data samples that go with them.
        renormalise (Callable, optional): Takes images, and their sizes
            without padding, and returns them in the teacher's normalisation.
        precision (Callable): A context in which the teacher computes.

    Attributes:
        images (Tensor | dict): The images of the batch, as the student sees
            them.
    """

    def __init__(self,
                 model: nn.Module,
                 inputs: Any,
                 samples: Any,
                 renormalise: Callable = lambda images, shapes: images,
                 precision: Callable = nullcontext):
        self.model = model
        self.images, self._samples = inputs, samples
        self._renormalise = renormalise
        self._precision = precision
        # By identity; the images are kept, so that no other takes the id.
        self._shown: Dict[int, Sequence[Tensor]] = {}
        self._extracted: Dict[Any, Sequence[Any]] = {}
        self._outputs: Dict[bool, Dict[str, Any]] = {}

    def see(self, images: Any, owner: str) -> None:
        """Compute the features of the images that the student sees.

        A student may change its batch before it computes features (noise,
        another memory format); the teacher sees the changed one. `owner` is
        the path of the model whose ``extract_feat`` is asked."""
        if getattr(self.images, 'shape', ()) == images.shape:
            self.images = images
        self.features(images, owner)

    def show(self, images: Any) -> Any:
        """The student's images in the teacher's normalisation."""
        if isinstance(images, dict):
            return {name: self.show(batch) for name, batch in images.items()}
        if id(images) not in self._shown:
            shapes = None
            if isinstance(self._samples,
                          (list, tuple)) and len(self._samples) == len(images):
                shapes = [
                    getattr(sample, 'metainfo', {}).get('img_shape')
                    for sample in self._samples
                ]
            self._shown[id(images)] = (images,
                                       self._renormalise(images, shapes))
        return self._shown[id(images)][1]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Compute without gradient, in the teacher's precision."""
        with torch.no_grad(), self._precision():
            yield

    def features(self, images: Tensor, owner: str = '') -> Any:
        """The features of the student's images, ``(N, C, H, W)``, by the
        teacher or a model within it."""
        extract = self.model.get_submodule(owner).extract_feat
        with self.computing():
            return self._extract_once(owner, extract, self.show(images))

    def _extract_once(self, owner: str, extract: Callable,
                      shown: Tensor) -> Any:
        key = owner, id(shown)
        if key not in self._extracted:
            self._extracted[key] = shown, extract(shown)
        return self._extracted[key][1]

    @contextmanager
    def _keeping_features(self, paths: Collection[str]) -> Iterator[None]:
        """Let the models around some heads reuse features."""
        with ExitStack() as stack:
            for owner in {owner_of(self.model, path) for path in paths}:
                if owner is not None:
                    module = self.model.get_submodule(owner)
                    extract = partial(self._extract_once, owner,
                                      module.extract_feat)
                    stack.enter_context(
                        replaced(module, 'extract_feat', extract))
            yield

    def head_outputs(
        self,
        paths: Collection[str],
        as_in_training: bool = False,
        around: Callable = lambda path: nullcontext()
    ) -> Dict[str, Any]:
        """The results of heads of the teacher for the whole batch.

        The teacher begins to compute its loss as the student does, so that
        whatever stands between features and head runs as it should; but its
        heads run their ``forward`` only, and the last ends the call.

        Args:
            paths (Collection[str]): The heads.
            as_in_training (bool): Put the heads in training mode, for the
                results of a training; their layers stay in eval mode.
            around (Callable): Takes the path of a head and returns a context
                for its ``forward``, the same each time.

        Returns:
            dict[str, Any]: The result of each head's ``forward``.
        """
        known = self._outputs.setdefault(as_in_training, {})
        waiting = {path for path in paths if path not in known}
        if waiting:
            with ExitStack() as stack:
                stack.enter_context(self._keeping_features(paths))
                for path, head in self.model.named_modules():
                    if path in waiting or hasattr(head, 'loss_by_feat'):
                        stack.enter_context(
                            replaced(
                                head, 'loss',
                                self._answer(path, head, waiting,
                                             as_in_training, around)))
                self._until_answered(self.model.loss, self.show(self.images),
                                     _copies(self._samples))
        if waiting:
            raise ConfigError(
                'model.teacher.config', f'it is a {type(self.model).__name__} '
                f'whose {", ".join(waiting)} is not asked for its loss',
                'choose another teacher')
        return {path: known[path] for path in paths}

    def _answer(self, path: str, head: nn.Module, waiting: set,
                as_in_training: bool, around: Callable) -> Callable:
        """A stand-in for the ``loss`` of a head."""
        signature = inspect.signature(head.loss)

        def answer(*args, **kwargs):
            if path in waiting:
                given = signature.bind_partial(*args, **kwargs).arguments
                head.training = as_in_training
                try:
                    with around(path):
                        self._outputs[as_in_training][path] = head(
                            **_forward_arguments(head, given))
                finally:
                    head.training = False
                waiting.discard(path)
                if not waiting:
                    raise _Answered
            return {}

        return answer

    def arguments_of(self, path: str, method: str, run: Callable, *args:
                     Any) -> Optional[Dict[str, Any]]:
        """The arguments of the first call of a method, which is not carried
        out, while something runs; None if there is no such call."""
        module = self.model.get_submodule(path)
        signature = inspect.signature(getattr(module, method))
        found: List[Dict[str, Any]] = []

        def note(*args, **kwargs):
            found.append(dict(signature.bind(*args, **kwargs).arguments))
            raise _Answered

        with replaced(module, method, note):
            self._until_answered(run, *args)
        return found[0] if found else None

    def result_of(self, path: str, method: str, is_last: Callable) -> Any:
        """The result of a method in the first call whose arguments, by name,
        are the last, while the model around it predicts the batch."""
        module = self.model.get_submodule(path)
        original = getattr(module, method)
        signature = inspect.signature(original)
        results = []

        def note(*args, **kwargs):
            results.append(original(*args, **kwargs))
            if is_last(signature.bind(*args, **kwargs).arguments):
                raise _Answered
            return results[-1]

        owner = self.model.get_submodule(owner_of(self.model, path) or '')
        with replaced(module, method, note), self._keeping_features([path]):
            self._until_answered(owner.predict, self.show(self.images),
                                 self.samples)
        return results[-1]

    def image_sizes(self) -> Tensor:
        """``(w, h, w, h)`` of each image without its padding, ``(N, 4)``."""
        shapes = [sample.metainfo['img_shape'] for sample in self._samples]
        return self.images.new_tensor([[w, h, w, h] for h, w, *_ in shapes])

    @property
    def samples(self) -> Any:
        """Copies of the data samples, which models add predictions to."""
        return _copies(self._samples)

    def _until_answered(self, run: Callable, *args: Any) -> None:
        try:
            with self.computing():
                run(*args)
        except _Answered:
            pass


def _forward_arguments(head: nn.Module, given: Dict[str, Any]) -> dict:
    """The arguments of a head's ``forward``, from those of its ``loss``.

    The first is the first, the others are found by name among the arguments
    or else the attributes of the head (SAN's ``deep_supervision_idxs``)."""
    parameters = list(inspect.signature(head.forward).parameters.values())
    arguments = {parameters[0].name: next(iter(given.values()))}
    for parameter in parameters[1:]:
        if parameter.name in given:
            arguments[parameter.name] = given[parameter.name]
        elif parameter.default is parameter.empty and hasattr(
                head, parameter.name):
            arguments[parameter.name] = getattr(head, parameter.name)
    return arguments


def _copies(samples: Any) -> Any:
    """Data samples that share their tensors, but not what is added."""
    if isinstance(samples, dict):
        return {name: _copies(part) for name, part in samples.items()}
    if isinstance(samples, (list, tuple)):
        return [_copies(sample) for sample in samples]
    if not isinstance(samples, BaseDataElement):
        return samples
    copy = samples.new()
    for name, value in samples.items():
        if isinstance(value, BaseDataElement):
            setattr(copy, name, value.new())
    return copy
