"""Tasks of the demo: data, configs, and drawings of predictions."""
from pathlib import Path
from typing import Callable, Dict, Iterable, Iterator, NamedTuple, Tuple

import cv2
import numpy as np
from experiments.runs import Metric, read_json


class Task(NamedTuple):
    """A task that a teacher and its students learn."""
    title: str
    folder: str  # of its models, in the demo's work dir; may be ''
    configs: Dict[str, str]  # of teacher, alone, kd, dist
    minutes: Dict[str, float]  # of their training, about
    metric: Metric
    loss: str  # key of the training loss that is plotted
    # Draw the truth, or what a config and a checkpoint predict, in axes.
    draw_truth: Callable[[Path, Iterable], None]
    draw_predictions: Callable[[Path, Iterable, Path, Path], None]


def images(data_root: Path, axes: Iterable) -> Iterator[Tuple]:
    """Show the first validation scenes; yield the axes and file of each."""
    files = sorted((data_root / 'images' / 'val').iterdir())
    for axis, file in zip(axes, files):
        axis.imshow(cv2.imread(str(file))[..., ::-1])
        axis.autoscale(False)
        yield axis, file


def draw_true_boxes(data_root: Path, axes: Iterable) -> None:
    """Show the boxes of the COCO file."""
    truth = read_json(data_root / 'annotations' / 'instances_val.json')
    ids = {entry['file_name']: entry['id'] for entry in truth['images']}
    for axis, file in images(data_root, axes):
        for note in truth['annotations']:
            if note['image_id'] == ids[file.name]:
                x, y, width, height = note['bbox']
                box = x, y, x + width, y + height
                draw_box(axis, note['category_id'] - 1, box)


def draw_found_boxes(data_root: Path, axes: Iterable, config: Path,
                     checkpoint: Path) -> None:
    """Show the boxes with a score above 0.3."""
    from mmdet.apis import DetInferencer
    detect = DetInferencer(
        str(config), str(checkpoint), device='cpu', show_progress=False)
    for axis, file in images(data_root, axes):
        found = detect(str(file))['predictions'][0]
        boxes = zip(found['labels'], found['bboxes'], found['scores'])
        for label, box, score in boxes:
            if score > 0.3:
                draw_box(axis, label, box)


def draw_box(axis, label: int, box: Tuple[float, ...]) -> None:
    """Draw a box, given by its corners, in the colour of its class."""
    left, top, right, bottom = box
    axis.plot([left, right, right, left, left],
              [top, top, bottom, bottom, top], f'C{label}')
    tag = dict(facecolor=f'C{label}', linewidth=0, pad=1)
    axis.text(left, top - 3, label, color='white', bbox=tag)


def draw_true_masks(data_root: Path, axes: Iterable) -> None:
    """Show the semantic masks."""
    for axis, file in images(data_root, axes):
        mask = data_root / 'masks' / 'val' / file.name
        draw_mask(axis, cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE))


def draw_found_masks(data_root: Path, axes: Iterable, config: Path,
                     checkpoint: Path) -> None:
    """Show the predicted classes."""
    from mmseg.apis import inference_model, init_model
    model = init_model(str(config), str(checkpoint), device='cpu')
    for axis, file in images(data_root, axes):
        found = inference_model(model, str(file))
        draw_mask(axis, found.pred_sem_seg.data[0].numpy())


def draw_mask(axis, mask: np.ndarray) -> None:
    """Paint the pixels of an (H, W) mask that are not background."""
    digits = np.ma.masked_equal(mask.astype(int), 0) - 1
    axis.imshow(digits, 'tab10', vmin=0, vmax=9, interpolation='nearest')


TASKS = [
    Task(
        title='detection',
        folder='',
        configs=dict(
            teacher='faster-rcnn_r18-w32_fpn_4e_digits-96.py',
            alone='faster-rcnn_r18-w8_fpn_4e_digits-96.py',
            kd='kd_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py',
            dist='dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py'),
        minutes=dict(teacher=4.8, alone=3.4, kd=4.5, dist=4.4),
        metric=Metric('coco/bbox_mAP', 'mAP', '.3f'),
        loss='loss_cls',
        draw_truth=draw_true_boxes,
        draw_predictions=draw_found_boxes),
    Task(
        title='segmentation',
        folder='seg',
        configs=dict(
            teacher='fpn_r18-w24_5e_digits.py',
            alone='fpn_r18-w12_5e_digits.py',
            kd='kd_fpn_r18-w12-w24_5e_digits.py',
            dist='dist_fpn_r18-w12-w24_5e_digits.py'),
        minutes=dict(teacher=3.7, alone=2.0, kd=3.0, dist=2.9),
        metric=Metric('mIoU', 'mIoU (%)', '.1f'),
        loss='decode.loss_ce',
        draw_truth=draw_true_masks,
        draw_predictions=draw_found_masks)
]
