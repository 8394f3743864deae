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


def enable_visualization(cfg, args, library):
    """Draw the predictions that `--show` or `--show-dir` asks for."""
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise ConfigError(
            'default_hooks.visualization',
            'the config has none, which --show and --show-dir need',
            'add the VisualizationHook of your library')
    hook = cfg.default_hooks.visualization
    # as the hook of each library calls it
    hook['enable' if library == 'mmpretrain' else 'draw'] = True
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if library != 'mmdet':
        hook.interval = 1  # otherwise every 50th image, or later
    if args.show_dir and library == 'mmseg':
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        folder = 'out_dir' if library == 'mmpretrain' else 'test_out_dir'
        hook[folder] = args.show_dir


def writes_masks(cfg, metric):
    """Whether a metric of MMSegmentation takes an `output_dir`."""
    kind = metric['type']
    if isinstance(kind, str):
        with METRICS.switch_scope_and_registry(scope_of(cfg)) as registry:
            kind = registry.get(kind)
    # MMEngine has the words for one that is not registered
    return not kind or 'output_dir' in inspect.signature(kind).parameters


def save_predictions(cfg, path, library):
    """Let the metrics write what they get: masks, or a pickle."""
    owner, field = cfg, 'test_evaluator'
    if not cfg.get(field):
        raise ConfigError(field, 'the config has none, and --out needs it',
                          'add the evaluator of your data set')
    if isinstance(cfg[field], dict) and 'metrics' in cfg[field]:
        owner, field = cfg[field], 'metrics'
    metrics = owner[field]
    metrics = [metrics] if isinstance(metrics, dict) else [*metrics]
    if library == 'mmseg':
        writers = [metric for metric in metrics if writes_masks(cfg, metric)]
        if not writers:
            raise ConfigError(
                'test_evaluator', '--out needs a metric that takes an '
                'output_dir, as IoUMetric does')
        for metric in writers:
            metric.update(output_dir=path, keep_results=True)
    elif path.endswith(('.pkl', '.pickle')):
        dump = 'mmdet.DumpDetResults' if library == 'mmdet' else 'DumpResults'
        metrics.append(dict(type=dump, out_file_path=path))
    else:
        raise ConfigError('--out', f'{path} must be a .pkl or .pickle file')
    owner[field] = metrics


def default_tta(cfg, library):
    """The fields of `--tta` for a library whose own test tool has defaults:
    the images as they are, and flipped."""
    *pipeline, pack = copy.deepcopy(
        data_sets_in(cfg.test_dataloader.dataset)[0]['pipeline'])
    if library == 'mmpretrain':
        model, flip = dict(type='mmpretrain.AverageClsScoreTTA'), 'RandomFlip'
    else:
        # registered in MMEngine's own registry
        model, flip = dict(
            type='DetTTAModel',
            tta_cfg=dict(
                nms=dict(type='nms', iou_threshold=0.5),
                max_per_img=100)), 'mmdet.RandomFlip'
        pack = dict(
            type='mmdet.PackDetInputs',
            meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                       'scale_factor', 'flip', 'flip_direction'))
    flips = [dict(type=flip, prob=1.), dict(type=flip, prob=0.)]
    return dict(
        tta_model=model,
        tta_pipeline=[
            *pipeline,
            dict(type='TestTimeAug', transforms=[flips, [pack]])
        ])


def augment_tests(cfg, library):
    """Test on the images of `tta_pipeline`, merged by `tta_model`."""
    defaults = {} if library == 'mmseg' else default_tta(cfg, library)
    for field in ('tta_model', 'tta_pipeline'):
        if field in cfg:
            continue
        if field not in defaults:
            raise ConfigError(
                field, 'the config has none, and --tta needs it',
                'copy it from a data set config of MMSegmentation')
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
    library = library_of(cfg) or 'mmdet'
    if args.tta:
        augment_tests(cfg, library)
    if args.show or args.show_dir:
        enable_visualization(cfg, args, library)
    if args.out is not None:
        save_predictions(cfg, args.out, library)
    run(cfg, 'test')


if __name__ == '__main__':
    run_tool(main)
