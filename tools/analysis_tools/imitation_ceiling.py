"""Measure what a detector would reach if it imitated a teacher perfectly.

The student predicts with the teacher's class logits for its own boxes, with
the teacher's boxes for its own class logits, and with both. What is missing to
the teacher then is, in a two-stage detector, in the proposals, which are the
student's throughout.
"""
import argparse
import copy
import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from student_teachers import load_student, named_teachers, parse_models
from torch import Tensor, nn

from mmdist.errors import ConfigError
from mmdist.models.class_mapping import (check_class_names, check_numbers,
                                         class_map_of)
from mmdist.models.taps.columns import Columns, activation_of, as_columns_of
from mmdist.models.taps.watch import replaced
from mmdist.models.teacher import Teacher
from mmdist.utils import (class_names_of, load_config, markdown_table,
                          run_tool, scope_of)

SAME = 'choose a teacher with the same levels and anchors'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
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
            raise ConfigError('STUDENT', f'it has no {args.split}_{field}',
                              'choose another --split, or add it')
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
    """Predictions of a teacher in the place of the student's.

    Args:
        model (nn.Module): The student.
        teacher (Teacher): Sees the student's images.
        class_map (Sequence[int], optional): The teacher's class for each of
            the student's.

    Raises:
        ConfigError: If the two predict in unlike ways.
    """

    def __init__(self,
                 model: nn.Module,
                 teacher: Teacher,
                 class_map: Optional[Sequence[int]] = None) -> None:
        self.model, self.teacher = model, teacher
        self.class_map, self.batch = class_map, None
        models = model, teacher.model
        self.heads, self.teacher_heads = map(box_heads, models)
        self.two_stage, *others = (hasattr(m, 'roi_head') for m in models)
        if not self.heads or others != [self.two_stage] or len(
                self.heads) != len(self.teacher_heads):
            raise ConfigError(
                'TEACHERS', 'STUDENT and teacher must both be detectors with '
                'a roi_head of as many stages or both with a bbox_head, but '
                f'they are {" and ".join(type(m).__name__ for m in models)}')
        check_numbers(self.heads[0].num_classes,
                      self.teacher_heads[0].num_classes, class_map,
                      '--class-map')

    def unlike_boxes(self) -> Optional[str]:
        """The first part of the heads that makes the same numbers other
        boxes; None if there is none."""
        for heads in zip(self.heads, self.teacher_heads):
            if type(heads[0]) is not type(heads[1]):
                return 'type'
            for name in ('prior_generator', 'bbox_coder', 'reg_class_agnostic',
                         'reg_max'):
                own, theirs = (getattr(head, name, None) for head in heads)
                if str(getattr(own, '__dict__', own)) != str(
                        getattr(theirs, '__dict__', theirs)):
                    return name
        return None

    @contextmanager
    def predictions(self, classes: bool, boxes: bool) -> Iterator[None]:
        """The student predicts with the teacher's class logits, with all else
        that its head predicts of boxes, or both."""
        model, teacher = self.model, self.teacher.model
        owner = model.roi_head if self.two_stage else model.bbox_head
        method = '_bbox_forward' if self.two_stage else 'forward'
        predict, forward = model.predict, getattr(owner, method)

        def see(inputs: Any, samples: Any, *args, **kwargs) -> Any:
            self.batch = self.teacher.batch(inputs, samples)
            return predict(inputs, samples, *args, **kwargs)

        def answer_rois(*args: Any) -> Dict[str, Any]:
            *stage, _, rois = args  # of cascades
            own = dict(forward(*args))
            features = self.batch.features(self.batch.images)
            theirs = teacher.roi_head._bbox_forward(*stage, features, rois)
            if classes:
                own['cls_score'] = self._like(
                    own['cls_score'], self._logits(theirs['cls_score']))
            if boxes:
                own['bbox_pred'] = self._like(
                    own['bbox_pred'], self._deltas(theirs['bbox_pred']))
            return own

        def answer_levels(feats: Any) -> tuple:
            scores, *others = forward(feats)
            theirs, *their_others = teacher.bbox_head(
                self.batch.features(self.batch.images))
            if len(theirs) != len(scores):
                raise ConfigError(
                    'TEACHERS', f'STUDENT predicts on {len(scores)} levels, '
                    f'but the teacher on {len(theirs)}', SAME)
            if classes:
                scores = tuple(
                    map(self._like, scores, map(self._logits, theirs)))
            if boxes:
                others = [
                    tuple(map(self._like, own, their))
                    for own, their in zip(others, their_others)
                ]
            return (scores, *others)

        with replaced(model, 'predict', see), replaced(
                owner, method,
                answer_rois if self.two_stage else answer_levels):
            yield

    def _like(self, own: Tensor, theirs: Tensor) -> Tensor:
        """The teacher's tensor, which must have the student's shape."""
        if own.shape != theirs.shape:
            raise ConfigError(
                'TEACHERS', 'STUDENT and teacher must predict tensors of one '
                f'shape, but theirs are {tuple(own.shape)} and '
                f'{tuple(theirs.shape)}', SAME)
        return theirs

    def _logits(self, logits: Tensor) -> Tensor:
        """The teacher's class logits of the classes in the map, for each
        anchor."""
        if self.class_map is None:
            return logits
        head = self.teacher_heads[0]
        number = getattr(head, 'cls_out_channels', logits.shape[1])
        columns = Columns(head.num_classes, activation_of(head), number
                          > head.num_classes)
        num_anchors = logits.shape[1] // number
        table = logits.unflatten(1, (num_anchors, number)).flatten(0, 1)
        table, _ = as_columns_of(
            columns._replace(num_classes=len(self.class_map)), columns, table,
            self.class_map)
        return table.unflatten(0, (len(logits), num_anchors)).flatten(1, 2)

    def _deltas(self, deltas: Tensor) -> Tensor:
        """The teacher's box of each class in the map, of RoIs."""
        head = self.teacher_heads[0]
        if self.class_map is None or head.reg_class_agnostic:
            return deltas
        table = deltas.unflatten(1, (head.num_classes, -1))
        return table[:, list(self.class_map)].flatten(1)


def box_heads(model: nn.Module) -> List[nn.Module]:
    """The heads that classify boxes, one per stage of a cascade."""
    head = getattr(getattr(model, 'roi_head', model), 'bbox_head', None)
    if isinstance(head, nn.ModuleList):
        return list(head)
    return [head] if head is not None else []


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
        class_map = args.class_map
        if class_map is None:
            check_class_names(teacher.class_names, names, '--class-map')
        else:
            class_map = class_map_of(class_map, teacher.class_names, names,
                                     '--class-map')
        borrowed[name] = Borrowed(model, teacher, class_map)
    results = {'student': dict(runner.test())}
    for name, teacher in borrowed.items():
        parts = dict(
            logits=(True, False), boxes=(False, True), both=(True, True))
        unlike = teacher.unlike_boxes()
        if unlike:
            print(f'{name} is measured by its class logits alone: its boxes '
                  f"mean something else ({unlike} is not the student's)")
            parts = dict(logits=parts['logits'])
        for part, which in parts.items():
            with teacher.predictions(*which):
                results[f'with {part} of {name}'] = dict(runner.test())
    print(
        markdown_table([{
            'metric': key,
            **{
                name: f'{found[key]:.4g}'
                for name, found in results.items()
            }
        } for key in results['student']]))
    out = args.work_dir / 'imitation_ceiling.json'
    out.write_text(json.dumps(results, indent=1))
    print(f'All figures are in {out}')


if __name__ == '__main__':
    run_tool(main)
