"""Test a student; the flags are MMDetection's and MMSegmentation's.

A config of a distiller is tested as its student alone: the checkpoint is a
plain student checkpoint, and no teacher is built.
"""
from mmdist.utils import (load_tool_config, run, run_tool, student_of,
                          tool_parser)


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
    if 'visualization' not in cfg.default_hooks:
        raise ValueError('--show and --show-dir need default_hooks.'
                         'visualization in the config')
    hook = cfg.default_hooks.visualization
    # as the hook of each library calls it
    hook.update({'enable' if is_classifier(cfg) else 'draw': True})
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if not is_detector(cfg):
        hook.update(interval=1)  # otherwise every 50th picture, or later
    if args.show_dir and is_segmentor(cfg):
        cfg.visualizer.save_dir = args.show_dir
    elif args.show_dir:
        folder = 'out_dir' if is_classifier(cfg) else 'test_out_dir'
        hook.update({folder: args.show_dir})


def is_segmentor(cfg):
    return cfg.get('default_scope') == 'mmseg'


def is_classifier(cfg):
    return cfg.get('default_scope') == 'mmpretrain'


def is_detector(cfg):
    return not (is_segmentor(cfg) or is_classifier(cfg))


def save_predictions(cfg, path):
    """Let the metric write what it gets: masks, or a pickle of the others."""
    if is_segmentor(cfg):
        cfg.test_evaluator.update(output_dir=path, keep_results=True)
        return
    if not path.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out={path} must be a .pkl or .pickle file')
    metrics = cfg.test_evaluator
    dump = 'DumpDetResults' if is_detector(cfg) else 'DumpResults'
    cfg.test_evaluator = [
        *(metrics if isinstance(metrics, list) else [metrics]),
        dict(type=dump, out_file_path=path)
    ]


def augment_tests(cfg):
    """Test on the pictures of `tta_pipeline`, merged by `tta_model`."""
    for field in ('tta_model', 'tta_pipeline'):
        if field not in cfg:
            raise ValueError(f'--tta needs {field} in the config')
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline


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
