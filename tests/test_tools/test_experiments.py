"""Grids of experiments: what is run, what is kept, what is reported."""
import importlib
import json
import runpy
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mmdist.errors import ConfigError

GRID = '''
title = 'A toy'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
seeds = [0, 1]
kd = dict(config='configs/experiments/kd_fpn_r18-w12-w24_5e_digits.py',
          teacher='teacher', baseline='alone')
loss = 'model.distill_loss.'
sweeps = dict(kd=dict(kd, seeds=[5], options=[
    {loss + 'loss_weight': weight, loss + 'tau': tau}
    for weight in (1.0, 2.0) for tau in (1.0, 4.0)]))
runs = {
    'teacher': dict(config='configs/experiments/fpn_r18-w24_5e_digits.py',
                    seeds=[3]),
    'alone': dict(config='configs/experiments/fpn_r18-w12_5e_digits.py'),
    'KD': kd,
    'again': dict(kd, options={loss + 'tau': 1.0}),
    'best KD': dict(kd, best_of='kd'),
}
'''


@pytest.fixture(scope='module')
def tools(repo):
    """tools/ as `python tools/run_experiments.py` sees it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(f'{repo}/tools')
        yield {
            name: importlib.import_module(name)
            for name in ('experiments.grid', 'experiments.runs',
                         'run_experiments', 'report_experiments')
        }


@pytest.fixture
def grid(tools, tmp_path):
    """A function that reads a grid, that of above or another text."""

    def read(text=GRID, table=None):
        (tmp_path / 'toy.py').write_text(text)
        module = tools['experiments.grid']
        return module.Grid(tmp_path / 'toy.py', tmp_path / 'runs', table)

    return read


@pytest.fixture
def results(tools, tmp_path):
    """The table of results, which the tool keeps."""
    return tools['experiments.grid'].Table(tmp_path / 'toy.csv')


def finish(results, run, value):
    """Put a result in the file, as if the run had been trained."""
    run.validations = lambda: {1: value / 2, run.length: value}
    run.folder.mkdir(parents=True, exist_ok=True)
    run.save(60.)
    results.keep(run)


def by_name(grid):
    return {(run.name, run.seed): run for run in grid.all()}


def test_missing_pandas_names_the_extra(repo, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pandas', None)
    monkeypatch.syspath_prepend(f'{repo}/tools')
    monkeypatch.syspath_prepend(f'{repo}/tools/analysis_tools')
    tools = 'run_experiments', 'report_experiments', 'analyze_discrepancy'
    for name in ('experiments.grid', *tools):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for tool in tools:
        with pytest.raises(SystemExit, match=r"install 'mmdist\[analysis\]'"):
            importlib.import_module(tool)


def test_runs_are_configs_times_seeds(grid):
    runs = by_name(grid())
    assert [(name, seed) for name, seed in runs
            if ':' not in name] == [('alone', 0), ('KD', 0), ('again', 0),
                                    ('alone', 1), ('KD', 1), ('again', 1),
                                    ('teacher', 3)]
    assert [key for key in runs if ':' in key[0]] == [
        (f'kd: loss_weight={w}, tau={t}', 5) for w in (1, 2) for t in (1, 4)
    ]
    run = runs['kd: loss_weight=2, tau=4', 5]
    assert run.cfg.model.distill_loss == dict(
        type='mmdist.KDLoss', tau=4.0, loss_weight=2.0)
    assert run.cfg.randomness.seed == 5


def test_students_have_the_first_teacher(grid, tmp_path):
    """Its weights, and the config with which it is trained."""
    runs = by_name(grid())
    teacher = runs['KD', 1].cfg.model.teacher
    folder = tmp_path / 'runs' / 'teacher' / 'seed_3'
    assert teacher.checkpoint == str(folder / 'epoch_5.pth')
    assert teacher.config == f'{folder}.py'
    assert runs['teacher', 3].command('train') == [
        'tools/train.py', f'{folder}.py', '--work-dir',
        str(folder)
    ]


def test_keys_tell_what_is_trained(grid):
    """Not the seed or the name; but the teacher's options, too."""
    runs = by_name(grid())
    assert runs['KD', 0].key == runs['KD', 1].key == runs['again', 0].key
    assert runs['KD', 0].key != runs['alone', 0].key
    other = by_name(
        grid(
            GRID.replace(
                "seeds=[3])",
                "seeds=[3], options={'optim_wrapper.optimizer.lr': 0.1})")))
    assert other['alone', 0].key == runs['alone', 0].key
    assert other['KD', 0].key != runs['KD', 0].key
    again = by_name(grid(GRID.replace('seeds=[3]', 'seeds=[4]')))
    assert again['teacher', 4].key == runs['teacher', 3].key
    assert again['KD', 0].key != runs['KD', 0].key


def test_keys_do_not_tell_where_data_is(tools, grid, monkeypatch):
    text = '''
title = 'Street scenes'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
runs = dict(alone=dict(
    config='configs/camvid/pspnet_r18-w8-d8_1xb8-1k_camvid-180x240.py'))
'''
    keys = []
    for place in ('data', '/another/place/camvid', 'data/camvid'):
        monkeypatch.setenv('MMDIST_CAMVID', place)
        tools['experiments.runs'].read_config.cache_clear()
        run = by_name(grid(text))['alone', 0]
        assert run.cfg.train_dataloader.dataset.data_root == place
        assert run.checkpoint.name == 'iter_1000.pth'
        keys.append(run.key)
    assert len(set(keys)) == 1


def test_what_trains_the_same_is_trained_once(tools, grid, results):
    runs = tools['run_experiments'].runs_left(grid(), results)
    assert runs[0].label == 'teacher, seed 3'
    # alone and KD twice, the teacher, four of the sweep
    assert len(runs) == 2 + 2 + 1 + 4


def test_known_results_are_not_trained_again(tools, grid, results):
    """By another call, either, nor a teacher whom nobody waits for."""
    for run in by_name(grid(table=results)).values():
        finish(results, run, 50.)
    again = tools['experiments.grid'].Table(results.path)
    assert len(again.rows) == 9
    # the best of the sweep, the first of equals, trains what KD does
    assert ('best KD', 1) in by_name(grid(table=again))
    assert tools['run_experiments'].runs_left(grid(table=again), again) == []


def test_the_best_of_a_sweep_is_taken(grid, results):
    """Once all its members are known."""
    read = grid(table=results)
    members = [run for name, _ in read.members['kd'] for run in read.of(name)]
    for run, value in zip(members[:-1], (10., 30., 20.)):
        finish(results, run, value)
    assert ('best KD', 0) not in by_name(read)
    finish(results, members[-1], 5.)
    best = by_name(read)['best KD', 0]
    assert best.cfg.model.distill_loss == dict(
        type='mmdist.KDLoss', tau=4.0, loss_weight=1.0)


@pytest.mark.parametrize('old, new, message', [
    ("teacher='teacher'", "teacher='nobody'", 'teacher.*nobody'),
    ("best_of='kd'", "best_of='dist'", 'best_of.*dist'),
    ("baseline='alone'", "baseline='none'", 'baseline.*none'),
    ("'again': dict(kd, options", "'again': dict(kd, option",
     'again.*option='),
    ("'again': dict(kd, options", "'again': dict(options", 'again.*config'),
    ("{loss + 'loss_weight': weight", "{f'{weight}.w': 1", 'last names'),
    ("'again':", "'K D': kd, 'K_D':", "folder 'K_D'"),
])
def test_what_does_not_fit_is_refused(grid, old, new, message):
    """Unknown fields and names, and runs that would take each other's place.
    """
    with pytest.raises(ConfigError, match=message):
        grid(GRID.replace(old, new))


def test_another_file_is_no_file_of_results(tools, tmp_path):
    (tmp_path / 'toy.csv').write_text('a,b\n1,2\n')
    with pytest.raises(ConfigError, match='--results'):
        tools['experiments.grid'].Table(tmp_path / 'toy.csv')
    assert (tmp_path / 'toy.csv').read_text() == 'a,b\n1,2\n'


def test_two_calls_may_write_to_a_file(tools, grid, results, tmp_path):
    """Neither loses what the other has added."""
    path, read = tmp_path / 'toy.csv', tools['experiments.grid'].Table
    other, runs = read(path), by_name(grid())
    finish(results, runs['alone', 0], 1.)
    finish(other, runs['alone', 1], 0.1 + 0.2)
    again = read(path)
    assert runs['alone', 0] in again and runs['alone', 1] in again
    assert again.rows.metric.tolist() == [1., 0.1 + 0.2]


def trained(run, metric=None):
    """Leave behind what a training leaves, with or without the metric."""
    run.folder.mkdir(parents=True)
    with zipfile.ZipFile(run.checkpoint, 'w') as archive:
        archive.writestr('weights', b'0' * 500)
    scalars = run.folder / '20260101' / 'vis_data' / 'scalars.json'
    scalars.parent.mkdir(parents=True)
    entry = dict(step=run.length, **({} if metric is None else metric))
    scalars.write_text(json.dumps(entry))
    run.save(60.)


def test_what_is_done_but_not_written_down_is(tools, tmp_path, monkeypatch):
    """A call was killed between the two, or has another file."""
    text = """
title, metric = 'One', dict(key='mIoU', title='mIoU (%)', format='.1f')
runs = dict(alone=dict(
    config='configs/camvid/pspnet_r18-w8-d8_1xb8-1k_camvid-180x240.py'))
"""
    (tmp_path / 'one.py').write_text(text)
    tool = tools['run_experiments']
    trained(
        tool.Grid(tmp_path / 'one.py', tmp_path / 'runs').of('alone')[0],
        dict(mIoU=12.5))
    words = ['one.py', '--work-dir', 'runs', '--results', 'one.csv']
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['run_experiments.py', *words])
    tool.main()
    rows = pd.read_csv(tmp_path / 'one.csv')
    assert rows.metric.tolist() == [12.5] and rows.minutes.tolist() == [1.]


def test_a_training_without_its_metric_begins_anew(grid):
    """It was killed while it validated, and would not do so again."""
    run = by_name(grid())['alone', 0]
    trained(run)
    assert not run.trained
    run.checkpoint.rename(run.folder / 'epoch_4.pth')
    assert run.prepare()[-1] == '--resume'
    (run.folder / 'epoch_4.pth').rename(run.checkpoint)
    assert run.prepare()[-1] != '--resume'
    assert not run.checkpoint.exists() and run.seconds == 60


def test_results_of_another_grid_are_not_reported(tools, grid, results,
                                                  tmp_path):
    finish(results, by_name(grid())['alone', 0], 20.)
    grid(GRID.replace('fpn_r18-w12_5e_digits', 'fpn_r18-w24_5e_digits'))
    with pytest.raises(ValueError, match='toy.csv'):
        tools['report_experiments'].Report(tmp_path / 'toy.py', tmp_path,
                                           tmp_path / 'page.md')


def test_report_has_means_and_deviations(tools, grid, results, tmp_path):
    """Those of numpy, with n - 1; the sweep as a table; figures."""
    # The second seed of KD has no counterpart.
    read = grid(GRID.replace("'KD': kd", "'KD': dict(kd, seeds=[1, 2])"))
    values = {'alone': (20., 24.), 'KD': (21., 31.), 'teacher': (70., )}
    for name, numbers in values.items():
        for run, value in zip(read.of(name), numbers):
            finish(results, run, value)
    finish(results, read.of('kd: loss_weight=1, tau=4')[0], 33.3)
    tool = tools['report_experiments']
    report = tool.Report(tmp_path / 'toy.py', tmp_path,
                         tmp_path / 'a' / 'b.md')
    text = '\n\n'.join(report.text())
    spread = np.std([20., 24.], ddof=1)
    assert f'| alone | 22.0 ± {spread:.1f} (2) |  |  |' in text
    assert 'Gains are over *alone*.' in text
    table = '| options | tau=4 |\n| --- | --- |\n| loss_weight=1 | 33.3 |'
    assert table in text
    assert '| KD | 26.0 ± 7.1 (2) | -3.0 (1) |' in text
    assert '![runs](../toy.png)' in text
    for name in ('toy.png', 'toy_curves.png'):
        assert (tmp_path / name).stat().st_size > 5000


@pytest.mark.parametrize('gains, decided', [((3., 5., 4.), True),
                                            ((3., 5., -4.), False)])
def test_intervals_say_what_is_decided(tools, grid, results, tmp_path, gains,
                                       decided):
    """The interval is SciPy's, of differences that are paired by seed."""
    read = grid(GRID.replace('seeds = [0, 1]', 'seeds = [0, 1, 2]'))
    for name, numbers in dict(
            alone=(20., 24., 40.), KD=np.add((20., 24., 40.), gains)).items():
        for run, value in zip(read.of(name), numbers):
            finish(results, run, value)
    report = tools['report_experiments'].Report(tmp_path / 'toy.py', tmp_path,
                                                tmp_path / 'page.md')
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    text = f'{low:.1f} to {high:.1f}'
    assert (low > 0) == decided
    assert report.interval('alone') == ''
    assert report.interval('KD') == (f'**{text}**' if decided else text)


def test_the_words_of_the_page_stay(tools, grid, results, tmp_path,
                                    monkeypatch):
    """A new grid gets a section; later calls replace its tables alone."""
    run, other = grid().of('alone')
    tool, page = tools['report_experiments'], tmp_path / 'page.md'
    words = [str(tmp_path / 'toy.py'), '--results', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['report', *words, '--out', str(page)])
    finish(results, run, 20.)
    tool.main()
    assert '## A toy' in page.read_text() and '20.0 (1)' in page.read_text()
    page.write_text('Before.\n' + page.read_text() + '\nSo it is.\n')
    finish(results, other, 21.)
    tool.main()
    text = page.read_text()
    assert text.startswith('Before.\n') and text.endswith('\nSo it is.\n')
    assert '20.5 ± 0.7 (2)' in text and '20.0 (1)' not in text
    assert text.count('## A toy') == 1


def get(cfg, name):
    """Whether a config has a field."""
    for part in name.split('.'):
        if part not in cfg:
            return False
        cfg = cfg[part]
    return True


def test_grids_of_the_repository_are_whole(tools, repo):
    """Configs exist and have what options change; runs have a folder each."""
    Grid = tools['experiments.grid'].Grid
    read = tools['experiments.runs'].read_config
    grids = sorted(Path(repo, 'tools', 'experiments', 'grids').glob('*.py'))
    assert len(grids) >= 4
    for path in grids:
        grid = Grid(path, Path('runs'))
        for entry in grid.entries.values():
            entry['seeds'] = [0]
        runs = grid.all()
        assert len({run.folder for run in runs}) == len(runs)
        for run in runs:
            plain = read(repo / Path(grid.entries[run.name]['config']))
            for name in run.declared:
                added = name.startswith(('model.mimic', 'model.feature'))
                assert added or get(plain, name)


TINY = '''
title = 'Tiny'
metric = dict(key='mIoU', title='mIoU (%)', format='.1f')
scenes = dict(out_dir={data!r}, num_train=16, num_val=8, size=96)
options = {{
    'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1,
    'train_dataloader.dataset.data_root': {data!r},
    'val_dataloader.dataset.data_root': {data!r}}}
runs = dict(
    teacher=dict(config='configs/experiments/fpn_r18-w24_5e_digits.py',
                 options=options),
    alone=dict(config='configs/experiments/fpn_r18-w12_5e_digits.py',
               options=options),
    dist=dict(config='configs/experiments/dist_fpn_r18-w12-w24_5e_digits.py',
              options=options, teacher='teacher'),
    broken=dict(config='configs/experiments/fpn_r18-w12_5e_digits.py',
                options={{**options, 'optim_wrapper.optimizer.lr': 'no'}}))
'''


@pytest.mark.slow
def test_a_grid_is_run(repo, tmp_path, monkeypatch, tools):
    """Trained and kept; what fails is named and stops nothing."""
    data = f'{tmp_path}/data/'
    (tmp_path / 'tiny.py').write_text(TINY.format(data=data))
    words = [
        f'{tmp_path}/tiny.py', '--work-dir', f'{tmp_path}/runs', '--results',
        f'{tmp_path}/tiny.csv'
    ]
    monkeypatch.setattr(sys, 'argv', ['run_experiments.py', *words])
    tool = f'{repo}/tools/run_experiments.py'
    with pytest.raises(SystemExit, match='broken.*seed_0'):
        runpy.run_path(tool, run_name='__main__')
    table = pd.read_csv(tmp_path / 'tiny.csv')
    assert sorted(table.run) == ['alone', 'dist', 'teacher']
    log = next((tmp_path / 'runs' / 'dist').rglob('scalars.json')).read_text()
    last = json.loads(log.splitlines()[-1])
    dist = table[table.run == 'dist']
    assert dist.metric.item() == last['mIoU']
    assert dist.curve.item().endswith(f":{last['mIoU']:g}")
    # Without the broken one all are done now.
    monkeypatch.setattr(sys, 'argv', ['run_experiments.py', *words])
    text = (tmp_path / 'tiny.py').read_text()
    (tmp_path / 'tiny.py').write_text(text + "runs.pop('broken')\n")
    runpy.run_path(tool, run_name='__main__')
    assert pd.read_csv(tmp_path / 'tiny.csv').equals(table)


def test_dry_run_trains_nothing(tools, grid, tmp_path, monkeypatch, capsys):
    grid()
    words = [
        str(tmp_path / 'toy.py'), '--work-dir',
        str(tmp_path / 'runs'), '--results',
        str(tmp_path / 'toy.csv'), '--dry-run'
    ]
    monkeypatch.setattr(sys, 'argv', ['run_experiments.py', *words])
    tools['run_experiments'].main()
    said = capsys.readouterr().out
    assert 'train teacher, seed 3' in said
    assert 'best KD: once the sweep kd is done' in said
    assert {path.name for path in tmp_path.iterdir()} == {'toy.py'}
