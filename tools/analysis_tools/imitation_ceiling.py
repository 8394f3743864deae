"""Measure what a detector would reach if it imitated a teacher perfectly.

The student predicts its own boxes with the teacher's class logits for them.
What is missing to the teacher then is in proposals and box regression, which
distillation of class logits does not teach.
"""
import argparse
import copy
import json
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from student_teachers import (add_models, load_student, named_teachers,
                              parse_models)
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.models.class_mapping import (check_class_names, check_numbers,
                                         class_map_of)
from mmdist.models.taps.columns import Columns, activation_of, as_columns_of
from mmdist.models.taps.watch import replaced
from mmdist.models.teacher import Teacher
from mmdist.utils import class_names_of, load_config, run_tool, scope_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    add_models(parser)
    parser.add_argument(
        '--split',
        choices=['val', 'test'],
        default='val',
        help='of the data of the student (default: %(default)s)')
    parser.add_argument(
        '--work-dir', type=Path, default=Path('work_dirs/imitation_ceiling'))
    return parse_models(parser)


def runner_of(args: argparse.Namespace, cfg: Config) -> Runner:
    """The runner that tests the student, with its weights."""
    cfg = copy.deepcopy(cfg)  # as a dict, classes would become names
    for field in ('dataloader', 'evaluator'):
        if cfg.get(f'{args.split}_{field}') is None:
            raise ConfigError('STUDENT', f'it has no {args.split}_{field}')
        cfg[f'test_{field}'] = cfg[f'{args.split}_{field}']
    cfg.test_cfg = dict(type='TestLoop')
    for split in ('train', 'val'):
        for field in ('dataloader', 'evaluator', 'cfg'):
            cfg.pop(f'{split}_{field}', None)
    cfg.pop('optim_wrapper', None)
    cfg.pop('param_scheduler', None)
    cfg.update(work_dir=str(args.work_dir), load_from=None, resume=False)
    runner = Runner.from_cfg(cfg)
    load_student(runner.model, args.checkpoint)
    return runner


class Borrowed:
    """The class logits of a teacher, in the place of the student's.

    Args:
        model (nn.Module): The student.
        teacher (Teacher): Sees the student's images.
        class_map (Sequence[int], optional): The teacher's class for each of
            the student's.
    """

    def __init__(self,
                 model: nn.Module,
                 teacher: Teacher,
                 class_map: Optional[Sequence[int]] = None) -> None:
        self.model, self.teacher = model, teacher
        self.class_map = class_map
        self.batch = None
        _refuse_other(model, teacher.model)
        check_numbers(
            _box_head(model).num_classes,
            _box_head(teacher.model).num_classes, class_map, '--class-map')

    @contextmanager
    def logits(self) -> Iterator[None]:
        """The student predicts with the teacher's class logits."""
        places = [(self.model, 'predict', self._seen)]
        if hasattr(self.model, 'roi_head'):
            head = self.model.roi_head
            places.append((head, '_bbox_forward', self._of_rois))
        else:
            head = self.model.bbox_head
            places.append((head, 'forward', self._of_levels))
        with ExitStack() as stack:
            for owner, method, wrapper in places:
                stack.enter_context(
                    replaced(owner, method, wrapper(getattr(owner, method))))
            yield

    def _seen(self, predict: Callable) -> Callable:

        def wrapper(inputs: Any, samples: Any, *args, **kwargs) -> Any:
            self.batch = self.teacher.batch(inputs, samples)
            return predict(inputs, samples, *args, **kwargs)

        return wrapper

    def _of_rois(self, forward: Callable) -> Callable:
        ask = self.teacher.model.roi_head._bbox_forward

        def wrapper(*args: Any) -> Dict[str, Any]:
            *stage, _, rois = args  # of cascades
            own = forward(*args)
            features = self.batch.features(self.batch.images)
            score = ask(*stage, features, rois)['cls_score']
            return dict(own, cls_score=self._like(own['cls_score'], score))

        return wrapper

    def _of_levels(self, forward: Callable) -> Callable:

        def wrapper(feats: Any) -> tuple:
            scores, *others = forward(feats)
            features = self.batch.features(self.batch.images)
            theirs = self.teacher.model.bbox_head(features)[0]
            if len(theirs) != len(scores):
                raise ConfigError(
                    'TEACHERS', f'STUDENT predicts on {len(scores)} levels, '
                    f'but the teacher on {len(theirs)}')
            return (tuple(map(self._like, scores, theirs)), *others)

        return wrapper

    def _like(self, own: Tensor, theirs: Tensor) -> Tensor:
        """The teacher's class logits in the columns of the student's."""
        if self.class_map is not None:
            theirs = self._chosen(theirs)
        if own.shape != theirs.shape:
            raise ConfigError(
                'TEACHERS', 'STUDENT and teacher must predict class logits of '
                f'one shape, but theirs are {tuple(own.shape)} and '
                f'{tuple(theirs.shape)}')
        return theirs

    def _chosen(self, logits: Tensor) -> Tensor:
        """The logits of the classes in the map, for each anchor."""
        head = _box_head(self.teacher.model)
        number = getattr(head, 'cls_out_channels', logits.shape[1])
        columns = Columns(head.num_classes, activation_of(head), number
                          > head.num_classes)
        num_anchors = logits.shape[1] // number
        table = logits.unflatten(1, (num_anchors, number)).flatten(0, 1)
        table, _ = as_columns_of(
            columns._replace(num_classes=len(self.class_map)), columns, table,
            self.class_map)
        return table.unflatten(0, (len(logits), num_anchors)).flatten(1, 2)


def _box_head(model: nn.Module) -> nn.Module:
    """The head of the boxes' classes; the first stage of a cascade."""
    head = getattr(model, 'roi_head', model).bbox_head
    return head[0] if isinstance(head, nn.ModuleList) else head


def _refuse_other(student: nn.Module, teacher: nn.Module) -> None:
    kinds = [[hasattr(model, name) for name in ('roi_head', 'bbox_head')]
             for model in (student, teacher)]
    if kinds[0] != kinds[1] or not any(kinds[0]):
        raise ConfigError(
            'TEACHERS', 'STUDENT and teacher must both be detectors with a '
            'roi_head or both with a bbox_head, but they are '
            f'{type(student).__name__} and {type(teacher).__name__}')


def map_of(teacher: Teacher, spec: Any,
           names: Optional[Sequence[str]]) -> Optional[Sequence[int]]:
    """The teacher's class for each of the student's; None if they agree."""
    if spec is None:
        check_class_names(teacher.class_names, names, '--class-map')
        return None
    return class_map_of(spec, teacher.class_names, names, '--class-map')


def show(results: Dict[str, Dict[str, float]]) -> None:
    """Print a table: a row a metric."""
    table = Table()
    table.add_column('metric')
    columns: List[Dict[str, float]] = list(results.values())
    for name in results:
        table.add_column(name, justify='right')
    for key in columns[0]:
        table.add_row(key, *(f'{values[key]:.4g}' for values in columns))
    Console(width=200).print(table)


def main() -> None:
    args = parse_args()
    cfg = load_config(args.student, 'STUDENT')
    init_default_scope(scope_of(cfg))
    runner = runner_of(args, cfg)
    model, names = runner.model, class_names_of(cfg)
    borrowed = {}
    for name, config, checkpoint in named_teachers(args):
        teacher = Teacher(
            config, checkpoint, model.data_preprocessor, field='TEACHERS')
        borrowed[f'with logits of {name}'] = Borrowed(
            model, teacher, map_of(teacher, args.class_map, names))
    results = {'student': dict(runner.test())}
    for name, of_teacher in borrowed.items():
        with of_teacher.logits():
            results[name] = dict(runner.test())
    show(results)
    out = args.work_dir / 'imitation_ceiling.json'
    out.write_text(json.dumps(results, indent=1))
    print(f'All figures are in {out}')


if __name__ == '__main__':
    run_tool(main)
