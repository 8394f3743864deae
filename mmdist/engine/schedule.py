"""A schedule of distillation: where it begins, grows and ends."""
from typing import Optional

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from mmdist.errors import ConfigError
from mmdist.registry import HOOKS

FIELD = 'DistillScheduleHook of custom_hooks'


@HOOKS.register_module()
class DistillScheduleHook(Hook):
    """Ramps the terms of distillation up, and ends them.

    The factor follows from the iteration alone, so a resumed run goes on as it
    would have. While the factor is 0 the teacher does not compute, and a step
    costs what a step of the student alone costs. The log shows ``kd_scale``.

    Args:
        begin (float): Epoch (iteration with ``by_epoch=False``) at which
            distillation begins. Defaults to 0.
        ramp (float): Epochs in which its weight grows linearly from 0 to 1.
            Defaults to 0.
        end (float, optional): Epoch from which there is none.
        by_epoch (bool): Count epochs, or iterations (as MMSegmentation's
            configs do). Defaults to True.

    Raises:
        ConfigError: If the numbers contradict each other.
    """
    priority = 'NORMAL'

    def __init__(self,
                 begin: float = 0,
                 ramp: float = 0,
                 end: Optional[float] = None,
                 by_epoch: bool = True) -> None:
        if begin < 0 or ramp < 0 or (end is not None and end < begin + ramp):
            raise ConfigError(
                FIELD, 'begin and ramp must not be negative, and end not '
                f'before begin + ramp, but they are {begin}, {ramp} and {end}')
        self.begin, self.ramp, self.end = begin, ramp, end
        self.by_epoch = by_epoch
        self._due: Optional[bool] = None

    def scale_at(self, time: float) -> float:
        """The factor of all terms of distillation, from 0 to 1.

        Args:
            time (float): Epochs, or iterations, that are done.
        """
        if time < self.begin or (self.end is not None and time >= self.end):
            return 0.
        if time >= self.begin + self.ramp:
            return 1.
        return (time - self.begin) / self.ramp

    def before_train(self, runner: Runner) -> None:
        """Refuse a model that does not distil, or would learn nothing."""
        model = _unwrapped(runner)
        if not hasattr(model, 'distillation'):
            raise ConfigError(
                FIELD, f'model is a {type(model).__name__}, which does not '
                'distil', 'take the hook out')
        if model.distillation.alpha == 0 and (self.begin
                                              or self.end is not None):
            raise ConfigError(
                'model.alpha', 'it is 0, so nothing would teach classes while '
                f'the {FIELD} has no distillation',
                'leave its begin and end out, or set alpha')
        if self.by_epoch and not isinstance(runner.train_loop,
                                            EpochBasedTrainLoop):
            raise ConfigError(
                FIELD, 'it counts epochs, which train_cfg (a '
                f'{type(runner.train_loop).__name__}) does not have',
                'set its by_epoch=False and give iterations')

    def before_train_iter(self, runner: Runner, *args, **kwargs) -> None:
        """Set the factor of all terms of distillation."""
        time = runner.iter
        if self.by_epoch:
            time /= len(runner.train_dataloader)
        scale = self.scale_at(time)
        _unwrapped(runner).distillation.scale = scale
        runner.message_hub.update_scalar('train/kd_scale', scale)
        due = scale > 0
        if self._due not in (None, due):
            what = 'begins' if due else 'ends'
            print_log(
                f'Distillation {what} at iteration {runner.iter}',
                logger='current')
        self._due = due


def _unwrapped(runner: Runner):
    model = runner.model
    return model.module if is_model_wrapper(model) else model
