"""The demo: what it skips, resumes and starts anew, and how it ends."""
import fcntl
import functools
import importlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cv2
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.utils import register_all_modules

from mmdist.errors import ConfigError


@pytest.fixture(scope='module')
def demo(repo):
    """tools/demo.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(f'{repo}/tools')
        return importlib.import_module('demo')


@pytest.fixture(scope='module')
def shared(demo):
    """What the demo shares with the experiments."""
    return importlib.import_module('experiments.runs')


@pytest.fixture
def make_runs(demo, tmp_path):
    """A function that makes the runs of a call of the demo."""

    def make(*options, task=demo.TASKS[0]):
        folders = ['--work-dir', f'{tmp_path}', '--data-root']
        args = demo.parse_args([*folders, f'{tmp_path}/data', *options])
        return demo.make_runs(task, args)

    return make


@pytest.fixture
def runs(make_runs):
    return make_runs()


@pytest.fixture(params=('detection', 'segmentation'))
def task(demo, request):
    return next(t for t in demo.TASKS if t.title == request.param)


def finish(run):
    """Leave behind what a training that ended well leaves."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(run.checkpoint, 'w') as archive:
        archive.writestr('weights', b'0' * 500)
    if not list(run.folder.glob('*/vis_data')):
        write_scalars(run.folder, '20260101_000000', [{
            run.metric.key: 0.1,
            'step': run.length
        }])
    run.save(60.)
    return run


def write_scalars(folder, name, entries):
    path = folder / name / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(json.dumps(entry) for entry in entries))
    return path


# runs and commands

# Curves need every epoch; the configs name the default folders.
DEFAULT = ['train_cfg.val_interval=1', 'train_dataloader.dataset.indices=1200']


def test_default_commands_need_two_options(demo, task):
    for run in demo.make_runs(task, demo.parse_args([])):
        assert [f'{k}={v}' for k, v in run.options.items()] == DEFAULT


def test_commands_are_those_of_the_tools(demo):
    runs = demo.make_runs(demo.TASKS[0], demo.parse_args([]))
    name = 'dist_faster-rcnn_r18-w8-w32_fpn_4e_digits-96.py'
    config = f'configs/experiments/{name}'
    options = ['--cfg-options', *DEFAULT]
    folder = 'work_dirs/demo/dist'
    assert runs[3].command('train') == [
        'tools/train.py', config, '--work-dir', folder, *options
    ]
    assert runs[3].command('test') == [
        'tools/test.py', config, f'{folder}/epoch_4.pth', '--work-dir',
        f'{folder}/test', *options
    ]


def test_options_hold_what_the_user_asked_for(demo, make_runs, tmp_path):
    dist = make_runs('--quick', '--seed', '3')[3]
    data = f'{tmp_path}/data/'
    assert dist.options['randomness.seed'] == 3
    assert dist.cfg.train_cfg.max_epochs == demo.QUICK_EPOCHS
    assert dist.cfg.model.teacher.checkpoint == \
        f'{tmp_path}/teacher/epoch_2.pth'
    for part in (dist.cfg.train_dataloader, dist.cfg.test_dataloader):
        assert part.dataset.data_root == data
    assert dist.cfg.test_evaluator.ann_file == \
        f'{data}annotations/instances_val.json'


def test_second_task_has_folders_of_its_own(demo, make_runs, runs, tmp_path):
    other = make_runs(task=demo.TASKS[1])
    assert other[0].folder == tmp_path / 'seg' / 'teacher'
    assert other[2].options['model.teacher.checkpoint'] == \
        f'{tmp_path}/seg/teacher/epoch_5.pth'
    for part in ('train_dataloader', 'val_dataloader'):
        assert other[2].cfg[part].dataset.data_root == f'{tmp_path}/data/'
    names = {run.label for run in runs + other}
    assert len(names) == 8


def test_students_differ_in_the_teacher_only(make_runs, task):
    _, alone, kd, dist = (run.cfg.to_dict() for run in make_runs(task=task))
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


def test_taught_students_need_the_teacher(runs):
    teacher = runs[0]
    assert [run.teacher for run in runs] == [None, None, teacher, teacher]


def test_done_training_is_skipped_unless_asked_otherwise(make_runs, runs):
    assert not runs[2].trained
    run = finish(runs[2])
    assert run.done and run.seconds == 60
    for options in (['--seed', '1'], ['--quick']):
        assert not make_runs(*options)[2].trained
    assert make_runs()[2].trained


@pytest.mark.parametrize(
    'package', ['mmdist', 'torch', 'mmengine', 'mmcv', 'mmdet', 'mmseg'])
def test_nothing_is_done_by_another_version(make_runs, runs, monkeypatch,
                                            package):
    """The forks' results are not the default stack's."""
    finish(runs[0])
    assert make_runs()[0].trained
    module = importlib.import_module(package)
    monkeypatch.setattr(module, '__version__', '99.0')
    assert not make_runs()[0].trained


def test_nothing_is_done_on_other_scenes(make_runs, runs, tmp_path):
    (tmp_path / 'data').mkdir()
    for content, done in (('{"seed": 0}', False), ('{"seed": 1}', False),
                          ('{"seed": 1}', True)):
        (tmp_path / 'data' / 'manifest.json').write_text(content)
        run = make_runs()[0]
        assert run.trained == done
        finish(run)


def test_student_is_not_done_when_its_teacher_changed(make_runs, runs):
    finish(runs[3])
    changed = make_runs()
    changed[0].cfg.optim_wrapper.optimizer.lr *= 2
    assert not changed[3].trained
    assert make_runs()[3].trained


@pytest.mark.parametrize('harm', ['truncate', 'delete', 'record'])
def test_incomplete_output_is_not_done(runs, harm):
    run = finish(runs[0])
    if harm == 'truncate':
        whole = run.checkpoint.read_bytes()
        run.checkpoint.write_bytes(whole[:len(whole) // 2])
    elif harm == 'delete':
        run.checkpoint.unlink()
    else:
        run.record_file.write_text(run.record_file.read_text()[:20])
    assert not run.trained
    if harm == 'delete':  # earlier checkpoints may be there
        assert run.prepare()[-1] == '--resume'
    else:
        assert '--resume' not in run.prepare()
        assert not run.checkpoint.exists()


def test_begun_training_is_resumed(runs):
    run = runs[0]
    assert '--resume' not in run.prepare()
    run.save(60.)
    (run.folder / 'epoch_1.pth').touch()
    assert run.prepare()[-1] == '--resume'
    assert (run.folder / 'epoch_1.pth').is_file() and run.seconds == 60


def test_foreign_files_are_left_alone(runs):
    runs[0].folder.mkdir()
    (runs[0].folder / 'thesis.txt').write_text('mine')
    with pytest.raises(ConfigError, match='choose another') as info:
        runs[0].prepare()
    assert info.value.field == '--work-dir'
    assert (runs[0].folder / 'thesis.txt').read_text() == 'mine'


def test_interrupted_clearing_goes_on(shared, make_runs, runs, monkeypatch):
    """The file that marks the folder as the demo's stays."""
    finish(runs[0])

    def interrupted(folder):
        raise KeyboardInterrupt

    run = make_runs('--seed', '1')[0]
    with monkeypatch.context() as patch:
        patch.setattr(shared.shutil, 'rmtree', interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.prepare()
    assert '--resume' not in run.prepare()
    assert [path.name for path in run.folder.iterdir()] == ['train.json']


def test_interrupted_first_record_is_not_foreign(runs):
    runs[0].folder.mkdir()
    (runs[0].folder / 'train.partial').write_text('{')
    assert '--resume' not in runs[0].prepare()


@pytest.mark.parametrize('cores, threads', [(1, 1), (2, 1), (6, 3), (64, 4)])
def test_threads_are_shared_and_few(shared, script, monkeypatch, cores,
                                    threads):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: cores)
    run = script(
        'count', 'import os; open("{out}", "w").write('
        'os.environ["OMP_NUM_THREADS"])')
    assert shared.carry_out([run]) == []
    assert run.written.read_text() == str(threads)


# logs


def test_scalars_of_a_resumed_training_are_joined(shared, runs, tmp_path):
    """What the interrupted attempt logged after its checkpoint is replaced."""
    key = runs[0].metric.key
    tested = [{key: .1, 'step': 1}, {key: .2, 'step': 2}]
    write_scalars(tmp_path, '20260101_000000', [
        dict(loss=9, step=10),
        dict(loss=8, step=20), tested[0],
        dict(loss=7, step=30)
    ])
    path = write_scalars(
        tmp_path, '20260101_000500',
        [dict(loss=5, step=30),
         dict(loss=4, step=40), tested[1]])
    with open(path, 'a') as file:
        file.write('\n{"loss": 4, "st')  # still being written
    scalars = shared.read_scalars(tmp_path)
    assert [(e['step'], e['loss']) for e in scalars
            if 'loss' in e] == [(10, 9), (20, 8), (30, 5), (40, 4)]
    assert [e for e in scalars if key in e] == tested


def test_missing_logs_are_no_scalars(shared, runs, tmp_path):
    assert shared.read_scalars(tmp_path) == []
    assert runs[0].tested() is None


def test_metric_is_that_of_the_last_test(runs):
    run = runs[0]
    for name, value in (('20260101_000000', 0.1), ('20260101_000100', 0.2)):
        folder = run.folder / 'test' / name
        folder.mkdir(parents=True)
        (folder / f'{name}.json').write_text(
            json.dumps({run.metric.key: value}))
    assert run.tested() == 0.2


def test_every_epoch_is_told_once(runs, capsys):
    run = runs[0]
    run.folder.mkdir()
    run.save(240.)
    # The metric of epoch 1 is lost: it was interrupted while validating.
    for epoch in (2, 3):
        write_scalars(run.folder, f'2026010{epoch}', [{
            run.metric.key: epoch / 10,
            'step': epoch
        }])
        run.tell_validation()
        run.tell_validation()
    assert capsys.readouterr().out.splitlines() == [
        'train teacher: epoch 2/4, mAP 0.200, about 2 min left',
        'train teacher: epoch 3/4, mAP 0.300, about 1 min left'
    ]


@pytest.mark.parametrize('number, metric, shown', [(0, 'mAP', '0.123'),
                                                   (1, 'mIoU', '12.3')])
def test_table_shows_metric_and_minutes(demo, make_runs, number, metric,
                                        shown):
    """As MMDetection and MMSegmentation print them: mIoU is in percent."""
    task = demo.TASKS[number]
    runs = make_runs(task=task)
    for run in runs:
        run.folder.mkdir(parents=True)
        run.save(90.)
        run.validated = lambda: (0.1234, 12.34)[number]
    table = demo.make_table(runs).splitlines()
    assert all(word in table[0] for word in (task.title, metric, 'minutes'))
    assert len(table) == 6 and 'student, DIST' in table[5]
    assert all(shown in row and '1.5' in row for row in table[2:])


def test_truth_and_predictions_are_drawn(shared, demo, task, tmp_path):
    """The boxes or masks of the scenes, and what a checkpoint predicts."""
    data = tmp_path / 'data'
    demo.write_digit_scenes(data, num_train=1, num_val=2, size=96)
    config = demo.CONFIGS / task.configs['alone']
    with DefaultScope.overwrite_default_scope('mmengine'):
        register_all_modules(init_default_scope=False)
        cfg = Config.fromfile(config)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            weights = MODELS.build(cfg.model).state_dict()
        meta = dict(dataset_meta=dict(cfg.metainfo))
        torch.save(dict(state_dict=weights, meta=meta), tmp_path / 'a.pth')
        truth, predicted = Figure().subplots(2, 2)
        task.draw_truth(data, truth)
        task.draw_predictions(data, predicted, config, tmp_path / 'a.pth')
    assert all(len(axis.images) >= 1 for axis in (*truth, *predicted))
    if task.title == 'detection':
        coco = shared.read_json(data / 'annotations' / 'instances_val.json')
        tags = sum((axis.texts for axis in truth), [])
        assert [tag.get_text() for tag in tags] == [
            str(note['category_id'] - 1) for note in coco['annotations']
        ]
    else:
        for axis, file in zip(truth, ('000000.png', '000001.png')):
            mask = cv2.imread(str(data / 'masks' / 'val' / file), 0)
            drawn = axis.images[1].get_array()
            assert (drawn.filled(-1) == mask.astype(int) - 1).all()
        assert all(len(axis.images) == 2 for axis in predicted)


# running


class Script:
    """A few lines of Python in a process of their own, as a run."""
    call = None  # the function of tools/

    def __init__(self, folder, label, code, teacher=None):
        self.label, self.code, self.teacher = label, code, teacher
        self.folder, self.written = folder, folder / f'{label}.txt'

    @property
    def done(self):
        return self.written.exists()

    trained = done

    def carry_out(self, jobs):
        yield from self.call(self.label,
                             ['-c', self.code.format(out=self.written)],
                             self.folder / f'{self.label}.log', jobs)


WRITE = 'import time; time.sleep(1); open("{out}", "w").close()'


@pytest.fixture
def script(shared, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, 'POLL_SECONDS', 0.05)
    monkeypatch.setattr(Script, 'call', staticmethod(shared.call))
    return functools.partial(Script, tmp_path)


def test_runs_are_side_by_side_and_in_order(shared, script, capsys):
    first, other = script('first', WRITE), script('other', WRITE)
    last = script('last', WRITE, first)
    ended = []
    assert shared.carry_out([first, last, other], ended=ended.append) == []
    assert all(run.done for run in (first, other, last))
    assert ended[-1] is last and len(ended) == 3
    said = capsys.readouterr().out.splitlines()
    events = [line.split(',')[0] for line in said]
    assert len(events) == 6
    assert sorted(events[:2]) == ['first: begins', 'other: begins']
    assert events.index('first: done') < events.index('last: begins')
    shared.carry_out([first, last, other])
    assert not capsys.readouterr().out


@pytest.mark.parametrize('code', ['raise SystemExit(3)', 'pass'])
def test_a_failure_stops_those_it_teaches(shared, script, code, capsys):
    """It names the folder of the log; the others go on."""
    bad, other = script('bad', code), script('other', WRITE)
    last = script('last', WRITE, bad)
    failures = shared.carry_out([bad, last, other])
    assert len(failures) == 2
    assert failures[0] == f'"bad" failed, see the logs in {bad.folder}'
    said = capsys.readouterr().out
    assert ('exit code 3' in said and 'bad.log' in said) == ('3' in code)
    assert failures[1] == '"last" waits for what failed'
    assert other.done and not bad.done


def test_a_bug_ends_all_others(shared, script, tmp_path):
    """As Ctrl-C does: no process is left."""
    name = tmp_path / 'pid'
    slow = script(
        'slow', f'import os, time; open("{name}", "w").write(str(os.getpid()))'
        '; time.sleep(600)')
    bug = script('bug', WRITE)

    def carry_out(jobs):
        wait_for(lambda: name.exists() and name.read_text())
        yield
        raise KeyError

    bug.carry_out = carry_out
    with pytest.raises(KeyError):
        shared.carry_out([slow, bug])
    assert not Path('/proc', name.read_text()).exists()


def test_second_demo_waits_for_the_first(shared, capsys, tmp_path):
    """And for the orphans of a killed one, which inherit its lock."""
    with shared.locked(tmp_path):
        child = subprocess.Popen(
            [sys.executable, '-c', 'import time; time.sleep(2)'],
            close_fds=False)
    began = time.time()
    with shared.locked(tmp_path):
        assert time.time() - began > 0.5
        assert child.wait() == 0
        assert not is_free(tmp_path / '.lock')
    assert 'waiting' in capsys.readouterr().out


# all of it, as small as possible


@pytest.fixture
def tiny(demo, monkeypatch):
    """One task, in a folder of its own, on few scenes."""
    monkeypatch.setattr(demo, 'TASKS', [demo.TASKS[0]._replace(folder='det')])
    monkeypatch.setattr(demo, 'QUICK', dict(num_train=16, num_val=8))


TINY = (
    'import signal, sys; sys.path.insert(0, "tools"); import demo; '
    # Shells let background jobs ignore Ctrl-C, and that is inherited.
    'signal.signal(signal.SIGINT, signal.default_int_handler); '
    'demo.TASKS = [demo.TASKS[0]._replace(folder="det")]; '
    'demo.QUICK = dict(num_train=16, num_val=8); demo.main()')


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
def test_interrupted_demo_goes_on(demo, tiny, repo, tmp_path, capsys):
    """Another call of it does the rest, and a third has nothing to do."""
    work = tmp_path / 'work'
    words = ['--quick', '--work-dir', work, '--data-root', tmp_path / 'data']
    first = subprocess.Popen([sys.executable, '-c', TINY, *words],
                             cwd=repo,
                             stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT,
                             text=True)
    try:
        wait_for((work / 'det' / 'teacher' / 'last_checkpoint').is_file)
        first.send_signal(signal.SIGINT)
        assert 'Interrupted' in first.communicate(timeout=60)[0]
    finally:
        first.kill()
    assert first.returncode == 1
    assert is_free(work / '.lock')  # no child is left

    args = demo.parse_args([str(word) for word in words])
    demo.demo(args)
    output = capsys.readouterr().out
    assert 'train det/teacher: goes on' in output or \
        'train det/teacher' not in output
    for title in ('teacher', 'student alone', 'vanilla KD', 'DIST'):
        assert title in output
    for text in (output, (work / 'report.md').read_text()):
        assert 'numbers mean nothing' in text
        assert f'{demo.short(Path(sys.executable))} tools/make_config' in text
    for name in ('curves.png', 'predictions.jpg'):
        assert f'](det/{name})' in text
        assert (work / 'det' / name).stat().st_size > 10000

    known = [path.stat() for path in work.glob('det/*/epoch_2.pth')]
    demo.demo(args)
    output = capsys.readouterr().out
    assert 'begins' not in output and 'goes on' not in output
    assert [path.stat() for path in work.glob('det/*/epoch_2.pth')] == known


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it_like_ctrl_c(shared, number):
    """No child stays behind."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        # nohup has it ignored
        signal.signal(number, signal.SIG_DFL)
        shared.end_like_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for changed, handler in before.items():
            signal.signal(changed, handler)
