"""The teacher's answers to what the taps ask about one batch."""
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Callable, Collection, ContextManager, Dict, Iterator

import torch
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdist.errors import ConfigError
from .watch import named_arguments, owner_of, replaced, signature_of


class Answered(Exception):
    """Ends a method of the teacher as soon as the answer is known."""


class TeacherBatch:
    """One batch of images, and the teacher's predictions for it.

    The teacher neither proposes nor samples nor computes a loss: its heads
    run their ``forward`` and no more. All results are kept for the next
    question about the same images.

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
        self._known: Dict[Any, Any] = {}
        self._outputs: Dict[bool, Dict[str, Any]] = {True: {}, False: {}}

    @property
    def samples(self) -> Any:
        """Copies of the data samples, which models add predictions to."""
        return _copies(self._samples)

    def image_sizes(self) -> Tensor:
        """``(w, h, w, h)`` of each image without its padding, ``(N, 4)``."""
        shapes = [sample.metainfo['img_shape'] for sample in self._samples]
        return self.images.new_tensor([[w, h, w, h] for h, w, *_ in shapes])

    def _once(self, key: Any, images: Any, compute: Callable) -> Any:
        """The result for these images, computed once."""
        key = key, id(images)
        if key not in self._known:
            self._known[key] = images, compute(images)
        return self._known[key][1]

    def extract(self, images: Any, owner: str) -> None:
        """Compute the features of images that the student is about to see, by
        the model at the path ``owner``.

        A student may change its batch before it computes features (noise,
        another memory format); the teacher sees the changed one."""
        if getattr(self.images, 'shape', ()) == images.shape:
            self.images = images
        self.features(images, owner)

    def renormalised(self, images: Any) -> Any:
        """The student's images in the teacher's normalisation."""
        if isinstance(images, dict):
            return {
                name: self.renormalised(part)
                for name, part in images.items()
            }
        samples, shapes = self._samples, None
        if isinstance(samples, (list, tuple)) and len(samples) == len(images):
            shapes = [
                getattr(sample, 'metainfo', {}).get('img_shape')
                for sample in samples
            ]
        return self._once('images', images,
                          lambda images: self._renormalise(images, shapes))

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
            return self._once(owner, self.renormalised(images), extract)

    def run(self, paths: Collection[str], method: Callable, *args:
            Any) -> None:
        """Run a method of the teacher until an answer of a head ends it by
        raising :class:`Answered`.

        The models around the heads at ``paths`` reuse their features.
        """
        with ExitStack() as stack:
            for owner in {owner_of(self.model, p) for p in paths} - {None}:
                module = self.model.get_submodule(owner)
                extract = partial(
                    self._once, owner, compute=module.extract_feat)
                stack.enter_context(replaced(module, 'extract_feat', extract))
            stack.enter_context(self.computing())
            try:
                method(*args)
            except Answered:
                pass

    def head_outputs(
        self,
        paths: Collection[str],
        as_in_training: bool = False,
        around: ContextManager = nullcontext()
    ) -> Dict[str, Any]:
        """The results of heads of the teacher for the whole batch.

        The teacher begins to compute its loss as the student does, so that
        whatever stands between features and head runs as it should; but its
        heads run their ``forward`` only, and the last ends the call.

        Args:
            paths (Collection[str]): The heads.
            as_in_training (bool): Put the heads in training mode, but not
                their layers.
            around (ContextManager): For the ``forward`` of a single head.
        """
        known = self._outputs[as_in_training]
        waiting = {path for path in paths if path not in known}

        def answer(path, head, loss, *args, **kwargs):
            if path in waiting:
                given = named_arguments(loss, args, kwargs)
                head.training = as_in_training
                try:
                    with around:
                        known[path] = head(**_forward_arguments(head, given))
                finally:
                    head.training = False
                waiting.discard(path)
                if not waiting:
                    raise Answered
            return {}

        if waiting:
            with ExitStack() as stack:
                for path, head in self.model.named_modules():
                    if path in waiting or hasattr(type(head), 'loss_by_feat'):
                        stand_in = partial(answer, path, head, head.loss)
                        stack.enter_context(replaced(head, 'loss', stand_in))
                self.run(paths, self.model.loss,
                         self.renormalised(self.images), self.samples)
        if waiting:
            raise ConfigError(
                'model.teacher.config',
                f'the loss of {type(self.model).__name__} does not call the '
                f'loss of {", ".join(waiting)}, where class logits are read',
                'choose another teacher')
        return {path: known[path] for path in paths}


def _forward_arguments(head: nn.Module, given: Dict[str, Any]) -> dict:
    """The arguments of a head's ``forward``, from those of its ``loss``.

    The first parameter gets the loss's first argument, the features. The
    others are matched by name with the arguments or else the attributes of
    the head (SAN's ``deep_supervision_idxs``)."""
    first, *others = signature_of(head.forward).parameters.values()
    arguments = {first.name: next(iter(given.values()))}
    for parameter in others:
        name = parameter.name
        if name in given:
            arguments[name] = given[name]
        elif parameter.default is parameter.empty and hasattr(head, name):
            arguments[name] = getattr(head, name)
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
