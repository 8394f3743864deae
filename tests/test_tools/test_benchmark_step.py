"""The benchmark of a step, on small images."""
import json
from pathlib import Path

import pytest

from tests.test_tools.benchmarks import run

TOOL = 'benchmark_step.py'

NAMES = ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py',
         'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
         'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
         'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py')


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path):
    """A table, JSON and a plot of a dense head, RoIs, pixels, and a model
    whose preprocessor asks for the iteration."""
    files = tmp_path / 'times.json', tmp_path / 'times.png'
    done = run(TOOL, '--pairs', *(f'{name},{name}' for name in NAMES),
               '--size', 128, '--repeats', 1, '--threads', 1, '--json',
               files[0], '--plot', files[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert files[1].stat().st_size > 1000
    results = json.loads(files[0].read_text())
    assert [result['name'] for result in results] == list(NAMES)
    for result in results:
        assert Path(result['name']).stem[:20] in done.stdout
        times = result['milliseconds']
        least = times['student'] + times['teacher']
        assert result['shape'] == [2, 3, 128, 128]
        assert result['ratio'] == pytest.approx(times['mmdist'] / least)
        # Far less than a step of the teacher: nothing runs twice.
        assert times['teacher'] < times['mmdist']
        assert result['judging_ratio'] == pytest.approx(times['judging'] /
                                                        least)
    for result in results[:3]:
        memory = result['peak_mib']
        assert memory['student'] < memory['mmdist']


def test_something_else_than_two_configs_is_refused():
    """In one line that says what a pair looks like."""
    done = run(TOOL, '--pairs', 'mmdet::a.py')
    assert done.returncode == 2
    assert "'mmdet::a.py' must be two configs such as" in done.stderr
