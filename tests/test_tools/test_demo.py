"""The demo: what it skips, resumes and starts anew, and how it ends."""
import fcntl
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console


@pytest.fixture(scope='module')
def demo(repo):
    """tools/demo.py as a module."""
    spec = importlib.util.spec_from_file_location('demo',
                                                  f'{repo}/tools/demo.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(demo, tmp_path):
    return demo.make_runs(tmp_path, tmp_path / 'data', demo.FULL, 0)


@pytest.fixture
def display(demo):
    return demo.Display(Console(file=io.StringIO()))


def finish(step):
    """Leave behind what a training that ended well leaves."""
    checkpoint = step.run.checkpoint
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(checkpoint, 'w') as archive:
        archive.writestr('weights', b'0' * 500)
    (step.folder / 'last_checkpoint').write_text(str(checkpoint))
    step.save(60., step.read_result())


def write_scalars(folder, name, entries):
    path = folder / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(entry) for entry in entries))
    return path


# steps and commands


def test_default_commands_name_ordinary_configs_only(demo):
    """With the default folders nothing has to be overridden."""
    args = demo.parse_args([])
    runs = demo.make_runs(args.work_dir, args.data_root, demo.FULL, args.seed)
    commands = [step.arguments for step in demo.make_steps(runs)]
    assert len(commands) == 8
    assert not any('--cfg-options' in words for words in commands)
    assert commands[3] == [
        'tools/train.py',
        'configs/demo/dist_faster-rcnn_r18-w16-w32_fpn_5e_digits.py',
        '--work-dir', 'work_dirs/demo/dist'
    ]


def test_students_differ_in_the_teacher_only(runs):
    _, alone, kd, dist = (run.cfg.to_dict() for run in runs)
    for cfg in (kd, dist):
        assert cfg['model']['student'] == alone['model']
        for key in set(alone) - {'model'}:
            assert cfg[key] == alone[key], key
        assert cfg['model']['alpha'] == 1
    kd_loss, dist_loss = (c['model'].pop('distill_loss') for c in (kd, dist))
    assert kd['model'] == dist['model']
    assert kd_loss == dict(type='mmdist.KDLoss', tau=1.0, loss_weight=1.0)
    assert dist_loss == dict(
        type='mmdist.DISTLoss', beta=1.0, gamma=1.0, tau=1.0)


def test_quick_full_and_seeds_have_folders_of_their_own(demo):
    calls = ([], ['--quick'], ['--seed', '1'], ['--quick', '--seed', '1'])
    folders = [demo.parse_args(call).work_dir for call in calls]
    assert len(set(folders)) == 4
    assert demo.parse_args(['--quick']).data_root != \
        demo.parse_args([]).data_root


def test_taught_students_wait_for_the_teacher(demo, runs):
    steps = demo.make_steps(runs)
    assert [s.name for s in demo.ready_steps(steps, 9)
            ] == ['train teacher', 'train alone']
    finish(steps[0])
    finish(steps[1])
    waiting = [step for step in steps if not step.done]
    assert [s.name for s in demo.ready_steps(waiting, 2)
            ] == ['train kd', 'train dist']


def test_done_training_is_skipped_unless_something_changed(
        demo, runs, tmp_path):
    step = demo.make_steps(runs)[2]
    assert not step.done
    finish(step)
    assert step.done and step.seconds == 60
    for seed, scale in ((1, demo.FULL), (0, demo.QUICK)):
        other = demo.make_runs(tmp_path, tmp_path / 'data', scale, seed)
        assert not demo.make_steps(other)[2].done
    same = demo.make_runs(tmp_path, tmp_path / 'data', demo.FULL, 0)
    assert demo.make_steps(same)[2].done


def test_student_is_not_done_when_its_teacher_changed(demo, runs):
    steps = demo.make_steps(runs)
    finish(steps[3])
    changed = [runs[0], *runs[1:]]
    changed[0].cfg.optim_wrapper.optimizer.lr *= 2
    assert not demo.make_steps(changed)[3].done


@pytest.mark.parametrize('harm', ['truncate', 'delete', 'record'])
def test_incomplete_output_is_not_done(demo, runs, harm):
    step = demo.make_steps(runs)[0]
    finish(step)
    if harm == 'truncate':
        whole = step.run.checkpoint.read_bytes()
        step.run.checkpoint.write_bytes(whole[:len(whole) // 2])
    elif harm == 'delete':
        step.run.checkpoint.unlink()
    else:
        step.record_file.write_text(step.record_file.read_text()[:20])
    assert not step.done
    # Nothing usable is left, so the training must start anew.
    assert '--resume' not in demo.prepare(step)
    assert not (step.folder / 'last_checkpoint').exists()


def test_begun_training_is_resumed(demo, runs):
    step = demo.make_steps(runs)[0]
    assert '--resume' not in demo.prepare(step)
    finish(step)
    step.save(60.)
    assert demo.prepare(step)[-1] == '--resume'
    assert step.run.checkpoint.is_file() and step.seconds == 60


def test_foreign_files_are_left_alone(demo, runs):
    step = demo.make_steps(runs)[0]
    step.folder.mkdir()
    (step.folder / 'thesis.txt').write_text('mine')
    with pytest.raises(SystemExit, match='choose another --work-dir'):
        demo.prepare(step)
    assert (step.folder / 'thesis.txt').read_text() == 'mine'


# logs


def test_scalars_of_a_resumed_training_are_joined(demo, tmp_path):
    key = demo.METRIC
    write_scalars(tmp_path, '20260101_000000',
                  [dict(loss=9, step=10),
                   dict(loss=8, step=20), {
                       key: .1,
                       'step': 1
                   },
                   dict(loss=7, step=30)])  # yapf: disable
    path = write_scalars(tmp_path, '20260101_000500',
                         [dict(loss=5, step=25), {
                             key: .2,
                             'step': 2
                         }])  # yapf: disable
    with open(path, 'a') as file:
        file.write('\n{"loss": 4, "st')  # still being written
    scalars = demo.read_scalars(tmp_path)
    assert [e['step'] for e in scalars if 'loss' in e] == [10, 20, 25]
    assert [e[key] for e in scalars if key in e] == [.1, .2]


def test_missing_logs_are_no_scalars(demo, tmp_path):
    assert demo.read_scalars(tmp_path) == []
    assert demo.read_metric(tmp_path) is None


def test_metric_is_that_of_the_last_test(demo, tmp_path):
    for name, value in (('20260101_000000', 0.1), ('20260101_000100', 0.2)):
        (tmp_path / name).mkdir()
        demo.write_json(tmp_path / name / f'{name}.json', {demo.METRIC: value})
    assert demo.read_metric(tmp_path) == 0.2


# running


class Script:
    """Makes steps of real processes that run a few lines of Python."""

    def __init__(self, demo, folder):
        self.demo = demo
        self.folder = folder

    def __call__(self, name, code, needs=()):
        folder = self.folder / name
        checkpoint = folder / 'out.pth'
        run = SimpleNamespace(
            name=name, folder=folder, checkpoint=checkpoint, epochs=1)
        demo = self.demo

        class ScriptStep(demo.Step):
            arguments = ['-c', code.format(out=checkpoint)]
            fingerprint = name

        return ScriptStep(run, 'train', needs)


WRITE = ('import zipfile, time; time.sleep(1); '
         'zipfile.ZipFile({out!r}, "w").writestr("a", "b")').replace(
             '{out!r}', '"{out}"')


@pytest.fixture
def script(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, 'total_iters', lambda step: None)
    monkeypatch.setattr(demo, 'POLL_SECONDS', 0.05)
    return Script(demo, tmp_path)


@pytest.fixture
def lock(tmp_path):
    with open(tmp_path / '.lock', 'w') as file:
        yield file.fileno()


def test_steps_run_side_by_side_and_in_order(demo, script, display, lock):
    first, other = script('first', WRITE), script('other', WRITE)
    last = script('last', WRITE, (first, ))
    began = []
    begin = display.begin
    display.begin = lambda step: (began.append(time.time()), begin(step))
    demo.carry_out([first, last, other], display, lock)
    assert all(step.done for step in (first, other, last))
    assert began[1] - began[0] < 0.9 < began[2] - began[0]
    assert first.seconds >= 1
    demo.carry_out([first, last, other], display, lock)
    assert len(began) == 3  # nothing ran again


@pytest.mark.parametrize('code', ['raise SystemExit(3)', 'pass'])
def test_failure_names_the_log_and_stops_the_others(demo, script, display,
                                                    lock, code):
    bad = script('bad', code)
    slow = script('slow', 'import time; time.sleep(600)')
    attempts = []
    start = demo.Attempt.__init__

    def remember(self, *args):
        start(self, *args)
        attempts.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo.Attempt, '__init__', remember)
        with pytest.raises(SystemExit, match=r'"train bad".*train\.log'):
            demo.carry_out([bad, slow], display, lock)
    assert len(attempts) == 2
    assert all(a.process.poll() is not None for a in attempts)
    assert not bad.done and not slow.done


def test_second_demo_waits_for_the_first(demo, display, tmp_path):
    """And for the orphans of a killed one, which inherit its lock."""
    with demo.locked(tmp_path, display) as lock:
        child = subprocess.Popen(
            [sys.executable, '-c', 'import time; time.sleep(2)'],
            pass_fds=[lock])
    began = time.time()
    with demo.locked(tmp_path, display) as again:
        assert time.time() - began > 0.5
        assert child.wait() == 0
        with pytest.raises(BlockingIOError), \
                open(tmp_path / '.lock', 'w') as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert again
    assert 'waiting' in display.console.file.getvalue()


# all of it, as small as possible

TINY = (
    'import signal, sys; sys.path.insert(0, "tools"); import demo; '
    # Shells let background jobs ignore Ctrl-C, and that is inherited.
    'signal.signal(signal.SIGINT, signal.default_int_handler); '
    'demo.QUICK = demo.Scale(16, 8, 2); demo.main()')


@pytest.fixture
def start_demo(repo, tmp_path):
    """A function that starts the demo; whatever still runs is ended."""
    started = []

    def start():
        started.append(
            subprocess.Popen([
                sys.executable, '-c', TINY, '--quick', '--work-dir',
                tmp_path / 'work', '--data-root', tmp_path / 'data'
            ],
                             cwd=repo,
                             env=dict(os.environ, PYTHONPATH=repo),
                             stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT,
                             text=True))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait(timeout=60)


def wait_for(condition, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'waited in vain'
        time.sleep(0.2)


def is_free(path):
    """Whether no process holds the lock."""
    with open(path, 'a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


@pytest.mark.slow
def test_interrupted_demo_goes_on(start_demo, tmp_path):
    """Interrupt it twice, by Ctrl-C and by kill; the third call ends it."""
    work = tmp_path / 'work'
    first = start_demo()
    wait_for(lambda: (work / 'teacher' / 'last_checkpoint').is_file())
    first.send_signal(signal.SIGINT)
    assert 'Interrupted' in first.communicate(timeout=60)[0]
    assert first.returncode == 1
    assert is_free(work / '.lock')  # no child is left

    second = start_demo()
    wait_for(lambda: (work / 'dist' / 'train.json').is_file())
    second.send_signal(signal.SIGTERM)
    assert 'Interrupted' in second.communicate(timeout=60)[0]
    assert is_free(work / '.lock')
    teacher = (work / 'teacher' / 'epoch_2.pth').stat()

    output = start_demo().communicate(timeout=600)[0]
    assert 'digit scenes found' in output
    assert 'train teacher: begins' not in output
    assert (work / 'teacher' / 'epoch_2.pth').stat() == teacher
    assert 'numbers mean nothing' in output
    for title in ('teacher', 'student alone', 'vanilla KD', 'DIST'):
        assert title in output
    report = (work / 'report.md').read_text()
    assert 'numbers mean nothing' in report
    for name in ('curves.png', 'predictions.jpg'):
        assert name in report and (work / name).stat().st_size > 10000

    again = start_demo().communicate(timeout=120)[0]
    assert 'train' not in again.replace('training', '')
    assert Path(work / 'teacher' / 'epoch_2.pth').stat() == teacher
