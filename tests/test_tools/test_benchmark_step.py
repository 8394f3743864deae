"""The benchmark of a step, on small pictures."""
import json
from pathlib import Path

import pytest

from tests.test_tools.benchmarks import run

TOOL = 'benchmark_step.py'


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path):
    """A table, JSON and a plot, of a dense head, RoIs and pixels."""
    files = tmp_path / 'times.json', tmp_path / 'times.png'
    done = run(TOOL, '--size', 128, '--repeats', 1, '--threads', 1, '--json',
               files[0], '--plot', files[1])
    assert done.returncode == 0, done.stderr[-2000:]
    assert files[1].stat().st_size > 1000
    results = json.loads(files[0].read_text())
    names = [Path(result['name']).stem for result in results]
    assert [name.partition('_')[0]
            for name in names] == ['retinanet', 'faster-rcnn', 'pspnet']
    for result, name in zip(results, names):
        assert name[:20] in done.stdout
        times = result['milliseconds']
        least = times['student'] + times['teacher']
        assert result['shape'] == [2, 3, 128, 128]
        assert result['ratio'] == pytest.approx(times['mmdist'] / least)
        # Far less than a step of the teacher: nothing runs twice.
        assert times['teacher'] < times['mmdist']
        assert result['judging_ratio'] == pytest.approx(times['judging'] /
                                                        least)
        memory = result['peak_mib']
        assert memory['student'] < memory['mmdist']


@pytest.mark.slow
def test_models_may_ask_for_the_iteration():
    """As YOLOX's preprocessor does."""
    name = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py'
    done = run(TOOL, '--pairs', f'{name},{name}', '--size', 64, '--repeats', 1,
               '--threads', 1)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'yolox_tiny' in done.stdout


def test_something_else_than_two_configs_is_refused():
    """In one line that says what a pair looks like."""
    done = run(TOOL, '--pairs', 'mmdet::a.py')
    assert done.returncode == 2
    assert "'mmdet::a.py' must be two configs such as" in done.stderr
