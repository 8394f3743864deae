"""Test a student; the flags are MMDetection's and MMSegmentation's.

A config of a distiller is tested as its student alone: the checkpoint is a
plain student checkpoint, and no teacher is built.
"""
import copy
import inspect

from mmengine.logging import print_log
from mmengine.registry import METRICS

from mmdist.errors import ConfigError
from mmdist.utils import (data_sets_in, library_of, load_tool_config, run,
                          run_tool, scope_of, student_of, tool_parser)


def parse_args():
    parser = tool_parser('Test (and eval) a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        type=str,
        help='dump predictions to a pickle file for offline evaluation; of a '
        'segmentor: the directory to save output prediction')
    parser.add_argument(
        '--show', action='store_true', help='show prediction results')
    parser.add_argument(
        '--show-dir',
        help='directory where painted images will be saved. '
        'If specified, it will be automatically saved '
        'to the work_dir/timestamp/show_dir')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='the interval of show (s)')
    parser.add_argument(
        '--tta', action='store_true', help='test time augmentation')
    return parser.parse_args()


def enable_visualization(cfg, args):
    """Draw the predictions that `--show` or `--show-dir` asks for."""
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise ConfigError('default_hooks.visualization',
                          '--show and --show-dir need it')
    hook = cfg.default_hooks.visualization
    # as the hook of each library calls it
    hook.update({'enable' if is_classifier(cfg) else 'draw': True})
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if not is_detector(cfg):
        hook.update(interval=1)  # otherwise every 50th image, or later
    if args.show_dir and is_segmentor(cfg):
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        folder = 'out_dir' if is_classifier(cfg) else 'test_out_dir'
        hook.update({folder: args.show_dir})


def is_segmentor(cfg):
    return library_of(cfg) == 'mmseg'


def is_classifier(cfg):
    return library_of(cfg) == 'mmpretrain'


def is_detector(cfg):
    return not (is_segmentor(cfg) or is_classifier(cfg))


def metrics_of(cfg):
    """The metrics of `test_evaluator`, in a list of the config."""
    evaluator = cfg.get('test_evaluator')
    if not evaluator:
        raise ConfigError('test_evaluator', '--out needs it')
    if isinstance(evaluator, dict) and 'metrics' in evaluator:
        owner, field = evaluator, 'metrics'
    else:
        owner, field = cfg, 'test_evaluator'
    if isinstance(owner[field], dict):
        owner[field] = [owner[field]]
    owner[field] = [*owner[field]]
    return owner[field]


def writes_masks(cfg, metric):
    """Whether a metric of MMSegmentation takes an `output_dir`."""
    kind = metric['type']
    if isinstance(kind, str):
        with METRICS.switch_scope_and_registry(scope_of(cfg)) as registry:
            kind = registry.get(kind)
    # MMEngine has the words for one that is not registered
    return not kind or 'output_dir' in inspect.signature(kind).parameters


def save_predictions(cfg, path):
    """Let the metrics write what they get: masks, or a pickle."""
    metrics = metrics_of(cfg)
    if is_segmentor(cfg):
        writers = [metric for metric in metrics if writes_masks(cfg, metric)]
        if not writers:
            raise ConfigError(
                'test_evaluator', '--out needs a metric that takes an '
                'output_dir, as IoUMetric does')
        for metric in writers:
            metric.update(output_dir=path, keep_results=True)
        return
    if not path.endswith(('.pkl', '.pickle')):
        raise ConfigError('--out', f'{path} must be a .pkl or .pickle file')
    dump = 'mmdet.DumpDetResults' if is_detector(cfg) else 'DumpResults'
    metrics.append(dict(type=dump, out_file_path=path))


# as the test tools of MMDetection and MMPretrain have it
TTA_MODELS = dict(
    mmdet=dict(
        type='DetTTAModel',  # registered in MMEngine's own registry
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5),
                     max_per_img=100)),
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'))
FLIPPED_META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor',
                'flip', 'flip_direction')


def default_tta(cfg):
    """The fields of `--tta` for a library whose own test tool has defaults:
    the images as they are, and flipped."""
    *pipeline, pack = copy.deepcopy(
        data_sets_in(cfg.test_dataloader.dataset)[0]['pipeline'])
    if is_classifier(cfg):
        library, flip = 'mmpretrain', 'RandomFlip'
    else:
        library, flip = 'mmdet', 'mmdet.RandomFlip'
        pack = dict(type='mmdet.PackDetInputs', meta_keys=FLIPPED_META)
    flips = [dict(type=flip, prob=1.), dict(type=flip, prob=0.)]
    return dict(
        tta_model=TTA_MODELS[library],
        tta_pipeline=[
            *pipeline,
            dict(type='TestTimeAug', transforms=[flips, [pack]])
        ])


def augment_tests(cfg):
    """Test on the images of `tta_pipeline`, merged by `tta_model`."""
    defaults = {} if is_segmentor(cfg) else default_tta(cfg)
    for field in ('tta_model', 'tta_pipeline'):
        if field in cfg:
            continue
        if field not in defaults:
            raise ConfigError(
                field, '--tta needs it; configs of the data sets of '
                'MMSegmentation have it')
        print_log(f'--tta: the config has no {field}; the default is taken, '
                  'with each image as it is and flipped')
        cfg[field] = defaults[field]
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    for data_set in data_sets_in(cfg.test_dataloader.dataset):
        data_set.pipeline = cfg.tta_pipeline


def main():
    args = parse_args()
    cfg = load_tool_config(args)
    cfg.load_from = args.checkpoint
    cfg.model = student_of(cfg.model)
    if args.tta:
        augment_tests(cfg)
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    if args.out is not None:
        save_predictions(cfg, args.out)
    run(cfg, 'test')


if __name__ == '__main__':
    run_tool(main)
