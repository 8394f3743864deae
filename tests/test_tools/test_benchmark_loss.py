"""The benchmark of the loss, on small logits."""
import json

import pytest

from tests.test_tools.benchmarks import run

TOOL = 'benchmark_loss.py'


@pytest.mark.slow
def test_it_writes_what_it_measured(tmp_path):
    """A table and JSON; both ways of both activations."""
    path = tmp_path / 'times.json'
    done = run(TOOL, '--shapes', '4,19,128,128:softmax', '64,80:sigmoid',
               '--repeats', 3, '--threads', 1, '--device', 'cpu', '--json',
               path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '| 4×19×128×128 | softmax | ' in done.stdout
    report = json.loads(path.read_text())
    assert report['errors']['pytorch float32'] < 1e-5
    first, second = report['results']
    assert [first['activation'],
            second['activation']] == ['softmax', 'sigmoid']
    times = first['milliseconds']
    assert all(ms > 0 for ms in times.values())
    assert first['ratio']['pytorch'] == pytest.approx(times['formula'] /
                                                      times['pytorch'])
    # The formula keeps and makes several tables.
    extra = first['extra_mib']
    assert extra['pytorch'] < 0.5 * first['logits_mib'] < extra['formula']
    for operations, numbers in first['counts'].values():
        assert 40 < operations <= 90 and 40 < numbers < 90


def test_an_unknown_activation_is_refused():
    """In one line that says what a shape looks like."""
    done = run(TOOL, '--shapes', '4,3:relu')
    assert done.returncode == 2
    message = "'4,3:relu' must end with :softmax, :sigmoid or :none"
    assert message in done.stderr
