"""The benchmark of a step, on narrow models and small images."""
import json
import runpy
import sys
from pathlib import Path

import pytest
from mmengine.config import Config

from tests import helpers, segmentors
from tests.test_tools.benchmarks import TOOLS

TOOL = 'benchmark_step.py'
# A dense head, RoIs, pixels, and a preprocessor that asks for the iteration.
MODELS = dict(
    retina=('mmdet', lambda: helpers.detector('retina')),
    faster=('mmdet', lambda: helpers.detector('faster')),
    pspnet=('mmseg', lambda: segmentors.segmentor('pspnet')),
    yolox=('mmdet', lambda: helpers.detector('yolox')))


def run(monkeypatch, *arguments):
    """Run the tool in this process."""
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    monkeypatch.syspath_prepend(TOOLS)
    runpy.run_path(str(TOOLS / TOOL), run_name='__main__')


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    """A table and JSON."""
    pairs = []
    for name, (scope, model) in MODELS.items():
        path = tmp_path / f'{name}.py'
        Config(dict(default_scope=scope, model=model())).dump(str(path))
        pairs.append(f'{path},{path}')
    path = tmp_path / 'times.json'
    run(monkeypatch, '--pairs', *pairs, '--size', 64, '--repeats', 1,
        '--threads', 1, '--device', 'cpu', '--json', path)
    results = json.loads(path.read_text())
    table = capsys.readouterr().out
    assert [Path(result['name']).stem for result in results] == list(MODELS)
    for result, name in zip(results, MODELS):
        assert f'| {name} | ' in table
        times, ratios = result['milliseconds'], result['ratios']
        assert result['shape'] == [2, 3, 64, 64]
        # The teacher runs once beside the student.
        assert times['teacher'] < times['mmdist']
        # of one turn
        assert times['sum'] == times['student'] + times['teacher']
        for way, (low, middle, high) in ratios.items():
            above, below = way.split(' by ')
            below = times[below.replace('the ', '')]
            assert low == middle == high == pytest.approx(times[above] / below)
        assert len(ratios) == 4
        memory = result['peak_mib']
        assert memory['student'] < memory['mmdist']
        assert memory['student'] < memory['features']


def test_something_else_than_two_configs_is_refused(monkeypatch, capsys):
    """In one line that says what a pair looks like."""
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, '--pairs', 'mmdet::a.py')
    assert raised.value.code == 2
    assert "'mmdet::a.py' must be two configs such as" in (
        capsys.readouterr().err)
