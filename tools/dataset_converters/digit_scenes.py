"""Write digit scenes: COCO boxes and semantic masks of handwritten digits."""
import argparse

from mmdist.datasets import write_digit_scenes
from mmdist.utils import run_tool


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out-dir',
        default='data/digit_scenes',
        help='the dir of the data set (default: %(default)s)')
    parser.add_argument('--num-train', type=int, default=1000)
    parser.add_argument('--num-val', type=int, default=240)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--size', type=int, default=160, help='height and width in pixels')
    return parser.parse_args()


def main():
    args = parse_args()
    written = write_digit_scenes(**vars(args))
    verb = 'written to' if written else 'already in'
    print(f'{args.num_train} + {args.num_val} digit scenes {verb} '
          f'{args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
