"""Write digit images: handwritten digits for classification."""
import argparse

from mmdist.datasets import write_digit_images
from mmdist.utils import run_tool


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out-dir',
        default='data/digit_images',
        help='the dir of the data set (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--size', type=int, default=16, help='height and width in pixels')
    return parser.parse_args()


def main():
    args = parse_args()
    written = write_digit_images(**vars(args))
    verb = 'written to' if written else 'already in'
    print(f'1348 + 449 digit images {verb} {args.out_dir}')


if __name__ == '__main__':
    run_tool(main)
