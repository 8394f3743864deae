"""Test a student; the flags are MMDetection's.

A config of a distiller is tested as its student alone: the checkpoint is a
plain student checkpoint, and no teacher is built.
"""
from mmdist.utils import (build_runner, load_tool_config, student_of,
                          tool_parser)


def parse_args():
    parser = tool_parser('Test (and eval) a model')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument(
        '--out',
        type=str,
        help='dump predictions to a pickle file for offline evaluation')
    parser.add_argument(
        '--show', action='store_true', help='show prediction results')
    parser.add_argument(
        '--show-dir',
        help='directory where painted images will be saved. '
        'If specified, it will be automatically saved '
        'to the work_dir/timestamp/show_dir')
    parser.add_argument(
        '--wait-time', type=float, default=2, help='the interval of show (s)')
    args = parser.parse_args()
    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        parser.error('--out: the dump file must be a pkl file.')
    return args


def enable_visualization(cfg, args):
    """Draw the predictions that `--show` or `--show-dir` asks for."""
    if 'visualization' not in cfg.default_hooks:
        raise ValueError('--show and --show-dir need default_hooks.'
                         'visualization in the config')
    hook = cfg.default_hooks.visualization
    hook.update(draw=True)
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir:
        hook.update(test_out_dir=args.show_dir)


def dump_predictions(runner, path):
    from mmdet.evaluation import DumpDetResults
    runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=path))


def main():
    args = parse_args()
    cfg = load_tool_config(args)
    cfg.load_from = args.checkpoint
    cfg.model = student_of(cfg.model)
    if args.show or args.show_dir:
        enable_visualization(cfg, args)
    runner = build_runner(cfg)
    if args.out is not None:
        dump_predictions(runner, args.out)
    runner.test()


if __name__ == '__main__':
    main()
