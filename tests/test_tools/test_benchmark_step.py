"""The benchmark of a step, on small pictures."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(
    __file__).resolve().parents[2] / 'tools/analysis_tools/benchmark_step.py'


def run(*arguments):
    """Run the tool."""
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)],
        capture_output=True,
        text=True)


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path):
    """A table, JSON and a plot, of a dense head, RoIs and pixels."""
    files = tmp_path / 'times.json', tmp_path / 'times.png'
    done = run('--size', 128, '--repeats', 1, '--threads', 1, '--json',
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
        memory = result['peak_mib']
        assert memory['student'] < memory['mmdist']


def test_something_else_than_two_configs_is_refused():
    """In one line that says what a pair looks like."""
    done = run('--pairs', 'mmdet::a.py')
    assert done.returncode == 2
    assert "'mmdet::a.py' must be two configs such as" in done.stderr
