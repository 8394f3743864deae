"""Measure what a step with distillation costs beside what it must cost.

A step of the student alone, and the teacher's features and class predictions
without gradients, are what nobody can save; their sum is compared with a step
of mmdist, with one of the first steps, in which the teacher is judged, and
with the way of toolkits that record what they need while the teacher computes
its whole loss (here without their distillation loss). A step with a feature
loss beside the class logits is compared with the step without it. All are run
in turns on one synthetic batch, so that what else the machine does meets all;
what counts are the ratios within a turn. Weights are random.
"""
import argparse
import copy
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Tuple

import numpy as np
import torch
from mmengine.logging import MMLogger
from timing import MIB, add_arguments, peak_memory, table, turns
from torch import Tensor, nn

from mmdist.utils import load_config, run_tool, scope_of

TOOLS = Path(__file__).resolve().parents[1] / 'tools' / 'analysis_tools'
sys.path.insert(0, str(TOOLS))
import zoo_models as zoo  # noqa: E402

PAIRS = (('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
          'mmdet::retinanet/retinanet_r101_fpn_1x_coco.py'),
         ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
          'mmdet::faster_rcnn/faster-rcnn_r101_fpn_1x_coco.py'),
         ('mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
          'mmseg::pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py'))
NUM_ROIS = 512
# The feature losses that make_config.py --features writes for PAIRS.
FEATURES = dict(
    mmdet=dict(type='mmdist.DISTLoss', beta=0.0, gamma=1.0),
    mmseg=dict(type='mmdist.MimicLoss', loss_weight=1.0, where='head'))


def training_step(model: nn.Module, batch: Tuple) -> Callable:
    """Losses, gradients and an update."""
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        losses = model.loss(*copy.deepcopy(batch))
        loss, _ = model.parse_losses(losses)
        loss.backward()
        optimizer.step()
        # No gradient outlives a step, or its end would count as freed memory.
        optimizer.zero_grad()

    return step


def _class_prediction(model: nn.Module, inputs: Tensor) -> Callable:
    """A function of the features that predicts classes only."""
    if hasattr(model, 'decode_head'):
        auxiliary = getattr(model, 'auxiliary_head', None) or []
        if not isinstance(auxiliary, nn.ModuleList):
            auxiliary = [auxiliary]
        heads = [model.decode_head, *auxiliary]
        return lambda features: [head(features) for head in heads]
    if hasattr(model, 'roi_head'):
        rois = _random_rois(inputs)
        return lambda features: model.roi_head._bbox_forward(features, rois)
    head = copy.deepcopy(model.bbox_head)
    for name, module in head.named_children():
        if name.startswith('reg') or name.endswith('reg'):
            nothing = nn.ModuleList if isinstance(
                module, nn.ModuleList) else nn.Identity
            setattr(head, name, nothing())
    return head


def _random_rois(inputs: Tensor) -> Tensor:
    """``(R, 5)``, as many as are sampled."""
    number = NUM_ROIS * len(inputs)
    corners = torch.rand(number, 2) * 0.6
    boxes = torch.cat([corners, corners + torch.rand(number, 2) * 0.4], 1)
    index = torch.arange(len(inputs)).repeat_interleave(NUM_ROIS)[:, None]
    sides = torch.tensor(inputs.shape[:1:-1]).repeat(2)
    return torch.cat([index, boxes * sides], 1).to(inputs)


def measure(names: Tuple[str, str],
            args: argparse.Namespace) -> Dict[str, Any]:
    """Medians in milliseconds, quartiles of ratios, and peak memory, with
    random weights and two synthetic images."""
    package = scope_of(load_config(names[0], '--pairs'))
    cfg, teacher_cfg = (zoo.load(name) for name in names)
    student, teacher = (zoo.build(each.model, package, seed=i).to(args.device)
                        for i, each in enumerate((cfg, teacher_cfg)))
    student.train()
    teacher.eval()
    with tempfile.TemporaryDirectory() as folder:
        teaching = dict(config=teacher_cfg.model, dtype=args.teacher_dtype)
        distilled, featured = (
            zoo.build_wrapper(
                cfg.model,
                teaching,
                teacher.state_dict(),
                package,
                Path(folder),
                distill_loss=dict(type='mmdist.DISTLoss'),
                feature_loss=features).to(args.device).train()
            for features in (None, FEATURES[package]))
    data = student.data_preprocessor(
        zoo.batch_for(student, cfg, package, args.size), True)
    batch = inputs, _ = data['inputs'], data['data_samples']
    plain, step, features_step = (
        training_step(model, batch)
        for model in (student, distilled, featured))
    predict = _class_prediction(teacher, inputs)

    @torch.no_grad()
    def classes() -> None:
        predict(teacher.extract_feat(inputs))

    def usual(model: nn.Module, step: Callable) -> None:
        # All but one of 500 steps are like this.
        monitor = model.distillation.monitor
        monitor.iteration, monitor.judged = monitor.iters, True
        step()

    def judging() -> None:
        monitor = distilled.distillation.monitor
        monitor.iteration, monitor.judged, monitor._swaps = 0, False, 0
        step()

    def recorded() -> None:
        with torch.no_grad():
            teacher.loss(*copy.deepcopy(batch))
        plain()

    ways = dict(
        student=plain,
        teacher=classes,
        mmdist=partial(usual, distilled, step),
        features=partial(usual, featured, features_step),
        judging=judging,
        recorded=recorded)
    times = {
        name: np.array(values)
        for name, values in turns(ways, args.repeats, args.device).items()
    }
    times['sum'] = times['student'] + times['teacher']
    ratios = {
        f'{name} by the sum': times[name] / times['sum']
        for name in ('mmdist', 'judging', 'recorded')
    }
    ratios['features by mmdist'] = times['features'] / times['mmdist']
    return dict(
        name=names[0],
        shape=list(inputs.shape),
        milliseconds={
            k: float(np.median(v))
            for k, v in times.items()
        },
        ratios={
            name: np.percentile(values, [25, 50, 75]).tolist()
            for name, values in ratios.items()
        },
        peak_mib={
            name: peak_memory(ways[name], args.device) / MIB
            for name in ('student', 'mmdist', 'judging', 'features')
        })


def row_of(result: Dict[str, Any]) -> Dict[str, str]:
    """A row of the table; of ratios the median and the quartiles."""
    times, memory = result['milliseconds'], result['peak_mib']
    return {
        'model': Path(result['name']).stem,
        **{
            f'{name}, ms': f'{times[name]:.0f}'
            for name in ('student', 'teacher', 'sum', 'mmdist')
        },
        **{
            name: f'{middle:.3f} ({low:.3f} to {high:.3f})'
            for name, (low, middle, high) in result['ratios'].items()
        },
        **{
            f'{name}, MiB': f'{value:.0f}'
            for name, value in memory.items()
        }
    }


def parse_pair(text: str) -> Tuple[str, str]:
    """``'STUDENT,TEACHER'`` -> both configs."""
    student, _, teacher = text.partition(',')
    if not teacher:
        raise argparse.ArgumentTypeError(
            f'{text!r} must be two configs such as mmdet::retinanet/….py or '
            'a path, with a comma between')
    return student, teacher


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--pairs',
        nargs='+',
        type=parse_pair,
        default=PAIRS,
        metavar='STUDENT,TEACHER',
        help='configs, e.g. mmdet::atss/….py,mmdet::atss/….py')
    parser.add_argument(
        '--teacher-dtype', choices=['float32', 'float16', 'bfloat16'])
    parser.add_argument('--size', type=int, default=320, help='of images')
    add_arguments(parser, repeats=10)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_current_instance().setLevel('ERROR')
    zoo.tell_progress()
    print(f'Two images of {args.size} pixels, {args.device}, {args.threads} '
          f'threads, torch {torch.__version__}')
    results = []
    for pair in args.pairs:  # each takes minutes
        results.append(measure(pair, args))
        print(table([row_of(results[-1])]), flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == '__main__':
    run_tool(main)
