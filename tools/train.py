"""Train a model, with or without a teacher; the flags are those of MM."""
import mmdist  # noqa: F401
from mmdist.engine import is_whole, newest_checkpoint
from mmdist.errors import ConfigError
from mmdist.utils import load_tool_config, run, run_tool, tool_parser


def parse_args():
    parser = tool_parser('Train a model')
    parser.add_argument(
        '--amp',
        action='store_true',
        help='enable automatic-mixed-precision training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='enable automatically scaling LR.')
    parser.add_argument(
        '--resume',
        nargs='?',
        type=str,
        const='auto',
        help='If specify checkpoint path, resume from it, while if not '
        'specify, try to auto resume from the latest checkpoint '
        'in the work directory.')
    return parser.parse_args()


def enable_amp(cfg):
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'


def enable_auto_scale_lr(cfg):
    if not {'enable', 'base_batch_size'} <= set(
            cfg.get('auto_scale_lr') or {}):
        raise ConfigError(
            '--auto-scale-lr', 'the config has no auto_scale_lr=dict('
            'enable=..., base_batch_size=...)')
    cfg.auto_scale_lr.enable = True


def resume(cfg, checkpoint):
    if checkpoint == 'auto':
        hook = cfg.get('default_hooks', {}).get('checkpoint') or {}
        checkpoint = newest_checkpoint(cfg.work_dir, hook.get('filename_tmpl'))
    if checkpoint is None:
        print(f'{cfg.work_dir} has no checkpoint to resume; starting anew')
        cfg.resume = False
        return
    if '://' not in checkpoint and not is_whole(checkpoint):
        raise ConfigError(
            '--resume', f'{checkpoint} is no complete checkpoint',
            'leave the path out: then the newest complete one of the work '
            'directory is taken')
    cfg.resume = True
    cfg.load_from = checkpoint


def main():
    args = parse_args()
    cfg = load_tool_config(args)
    if args.amp:
        enable_amp(cfg)
    if args.auto_scale_lr:
        enable_auto_scale_lr(cfg)
    if args.resume is not None:
        resume(cfg, args.resume)
    elif cfg.get('resume') and not cfg.get('load_from'):
        resume(cfg, 'auto')
    run(cfg, 'train')


if __name__ == '__main__':
    run_tool(main)
