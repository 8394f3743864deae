"""The checker of the zoos, on a representative of every kind of head."""
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'check_zoo.py'
RPN = 'mmdet::rpn/rpn_r50_fpn_1x_coco.py'
# One of each tap, of each argument that holds class logits, and of models
# that hold their detector within.
CONFIGS = dict(
    mmdet=[
        'faster-rcnn_r50_fpn_1x_coco.py', 'retinanet_r18_fpn_1x_coco.py',
        'centernet_r18_8xb16-crop512-140e_coco.py',
        'cornernet_hourglass104_8xb6-210e-mstest_coco.py',
        'maskformer_r50_ms-16xb1-75e_coco.py',
        'yolov3_mobilenetv2_8xb24-320-300e_coco.py', 'solo_r50_fpn_1x_coco.py',
        'detr_r18_8xb2-500e_coco.py', 'sparse-rcnn_r50_fpn_1x_coco.py',
        'qdtrack_faster-rcnn_r50_fpn_4e_base.py'
    ],
    mmseg=[
        'pspnet_r18-d8_4xb4-80k_isaid-896x896.py',
        'pointrend_r50_4xb2-80k_cityscapes-512x1024.py',
        'encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    ])


@pytest.fixture(scope='module')
def tools(request):
    """The modules of the tool."""
    sys.path.insert(0, str(TOOL.parent))
    request.addfinalizer(lambda: sys.path.remove(str(TOOL.parent)))
    import check_zoo
    import zoo_checks
    import zoo_models
    return check_zoo, zoo_models, zoo_checks


def run(folder, *arguments):
    """The tool's exit code, reports and table."""
    files = folder / 'zoo.json', folder / 'zoo.md'
    done = subprocess.run([
        sys.executable,
        str(TOOL), '--json',
        str(files[0]), '--markdown',
        str(files[1]), *arguments
    ],
                          cwd=ROOT,
                          capture_output=True,
                          text=True)
    return done, json.loads(files[0].read_text()), files[1].read_text()


@pytest.mark.slow
@pytest.mark.parametrize('package', CONFIGS)
def test_representatives_pass_all_checks(package, tmp_path):
    """Finite terms, gradient, KL of 0, plain losses, plain checkpoints."""
    done, reports, table = run(
        tmp_path, '--jobs', '2', '--config',
        *(f'{package}::*/{name}' for name in CONFIGS[package]))
    failed = [r for r in reports if r['status'] != 'passes']
    assert not failed, (failed, done.stderr[-2000:])
    assert done.returncode == 0
    for report in reports:
        assert report['passed'] == dict.fromkeys('abcdef', True)
        assert report['features'].endswith(' maps')
        assert all(value > 0 for value in report['losses'].values())
        assert f'{report["pairs"]} | {report["features"]} |' in table
    names = {report['config'].rpartition('/')[2] for report in reports}
    assert names == set(CONFIGS[package])


@pytest.mark.slow
def test_models_without_classes_are_listed_as_such(tmp_path):
    """An RPN knows no classes; the reason is the wrapper's own sentence. Its
    feature maps can be distilled."""
    done, reports, table = run(tmp_path, '--config', RPN)
    assert [r['status'] for r in reports] == ['no class predictions']
    assert 'has class logits to distil' in reports[0]['reason'] in table
    assert reports[0]['passed'] == dict(f=True)
    assert '| neck, 5 maps |' in table
    assert done.returncode == 0
    # What is known is not checked again.
    reports[0]['reason'] = 'as written down'
    (tmp_path / 'zoo.json').write_text(json.dumps(reports))
    done, again, table = run(tmp_path, '--config', RPN, '--resume')
    assert again == reports and 'as written down' in table


@pytest.mark.slow
def test_what_is_cut_off_is_checked_again(tmp_path):
    """Alone, as others may have left no time or memory; and by each call."""
    for _ in range(2):
        done, reports, _ = run(tmp_path, '--config', RPN, '--timeout', '0.01',
                               '--resume')
        assert done.stdout.count('not ready after') == 2
        assert [r['reason'] for r in reports] == ['not ready after 0.01 s']
        assert done.returncode == 1


@pytest.mark.parametrize('reports, verdict', [
    (('fails the process ended with -9', 'passes '), 'passes '),
    (('fails not ready after 9 s', 'no class predictions '),
     'fails not ready after 9 s'),
    (('fails a: a wrong sum', 'passes '), 'fails a: a wrong sum'),
    (('plain model does not train here KeyError', 'no class predictions '),
     'no class predictions '),
])
def test_a_family_is_judged_by_a_config_that_ends(tools, reports, verdict,
                                                  monkeypatch):
    """One that took too much memory says nothing of the others."""
    check_zoo = tools[0]
    left = [
        dict(status=status, reason=text[len(status):].strip())
        for text in reports
        for status in (check_zoo.PASSES, check_zoo.FAILS, check_zoo.NO_CLASSES,
                       check_zoo.PLAIN) if text.startswith(status)
    ]
    monkeypatch.setattr(check_zoo, 'check_in_child', lambda *_: left.pop(0))
    found = check_zoo.check_one_of([None] * len(reports), 9.)
    assert f'{found["status"]} {found["reason"]}' == verdict


def test_every_family_is_there(tools):
    """All folders of the installed packages but those without models."""
    for package in ('mmdet', 'mmseg'):
        root = tools[1].mim_folder(package) / 'configs'
        folders = {f.parent.name for f in root.glob('*/*.py')}
        assert folders - set(tools[1].zoo_configs(package)) <= {'_base_'}


def test_nothing_is_downloaded(tools):
    """Pretrained weights are left out wherever a config names them."""
    zoo_models = tools[1]
    config = zoo_models.zoo_configs('mmdet')['retinanet'][0]
    model = zoo_models.load(config).model
    assert 'torchvision' not in str(model)
    assert model.backbone.init_cfg is None


def test_an_unknown_config_is_refused():
    """One line, no traceback."""
    done = subprocess.run(
        [sys.executable,
         str(TOOL), '--config', 'no_such_config'],
        capture_output=True,
        text=True)
    assert done.returncode == 1
    assert done.stderr.startswith('Error: --config: no config of the zoo')
    assert len(done.stderr.splitlines()) == 1


def test_a_difference_is_seen(tools):
    """The comparison of losses and of weights is exact."""
    equal = tools[2].equal
    one, other = dict(a=torch.ones(2)), dict(a=torch.ones(2))
    assert equal(one, other)
    other['a'][1] += 2e-7
    assert not equal(one, other)
    assert not equal(one, dict(one, b=torch.ones(1)))


def test_errors_show_no_folders(tools):
    """The table of one machine is that of another."""
    error = ValueError('first line\nno file /home/me/x/y.pth at 0x7f12ab')
    line = tools[1].last_line(error)
    assert line == 'ValueError: no file …/y.pth at 0x…'
    error = RuntimeError('no operator\nException raised from f at g.cpp:1\n'
                         'frame #0: main (0x12 in python)\n')
    assert tools[1].last_line(error) == 'RuntimeError: no operator'
    error = RuntimeError('shapes 2200x1024 and 512x256')  # no address
    assert tools[1].last_line(error) == f'RuntimeError: {error}'


def test_checks_are_described(tools):
    """Each of the six has a sentence for the table."""
    source = ''.join(map(inspect.getsource, (tools[2].Check, tools[0].check)))
    for name in tools[2].CHECKS:
        assert f'{name}=' in source or f"['{name}']" in source
