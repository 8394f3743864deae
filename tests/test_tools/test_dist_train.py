"""The launchers: two processes on the CPU, and what Slurm would be given."""
import json
import os
import os.path as osp
import runpy
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch

from tests import helpers, segmentors

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
TOOLS = osp.join(ROOT, 'tools')
# Imported by the config: every rank writes what it ends with.
NOTES = '''
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class NoteRank(Hook):

    def after_train(self, runner):
        wrapped = {id(p) for p in runner.model.parameters()}
        teacher = runner.model.module.distillation.teacher.model
        history = runner.message_hub.log_scalars
        torch.save(
            dict(
                wrapper=type(runner.model).__name__,
                weights=runner.model.module.state_dict(),
                teacher=teacher.state_dict(),
                teacher_inside=any(
                    id(p) in wrapped for p in teacher.parameters()),
                losses={name: list(buffer.data[0])
                        for name, buffer in history.items()
                        if name.startswith('train/loss')}),
            f'{runner.work_dir}/rank{runner.rank}.pth')
'''


class Detector:
    """RetinaNet with mimic."""
    terms = {'inter', 'intra', 'mimic'}
    metrics = ('coco/bbox_mAP', 'coco/bbox_mAP_50')
    lib = helpers
    student = helpers.detector('retina', test_cfg=dict(score_thr=0.))
    options = dict(mimic_loss=dict(type='mmdist.MimicLoss'))
    write_data = staticmethod(helpers.write_coco)


class Segmentor:
    """PSPNet with its auxiliary head."""
    terms = {'inter', 'intra'}
    metrics = ('mIoU', 'aAcc')
    lib = segmentors
    student = segmentors.segmentor('pspnet')
    options = dict()
    # Two batches of two a process: PSPNet cannot normalise a single picture.
    write_data = staticmethod(partial(segmentors.write_masks, num=8))


@pytest.fixture(scope='module', params=[Detector, Segmentor])
def kind(request):
    """What is trained."""
    return request.param


@pytest.fixture(scope='module')
def case(kind, tmp_path_factory):
    """A config, its folder and the environment to run it."""
    root = tmp_path_factory.mktemp('dist')
    (root / 'note_rank.py').write_text(NOTES)
    teacher = kind.lib.save_teacher(kind.student, root)
    cfg = kind.lib.run_cfg(
        kind.lib.distiller_cfg(kind.student, teacher, **kind.options),
        kind.write_data(root / 'data'),
        root,
        epochs=1,
        custom_imports=dict(imports=['mmdist', 'note_rank']),
        custom_hooks=[dict(type='NoteRank')])
    cfg.pop('work_dir')
    cfg.pop('experiment_name')
    cfg.dump(str(root / 'toy.py'))
    path = os.pathsep.join([osp.dirname(sys.executable), os.environ['PATH']])
    env = dict(
        os.environ, PATH=path, PYTHONPATH=str(root), OMP_NUM_THREADS='1')
    return root, env


def launch(case, script, *arguments):
    """Run a launcher of two processes from another folder."""
    root, env = case
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    subprocess.run(
        ['bash', osp.join(TOOLS, script), *map(str, arguments)],
        check=True,
        cwd=root,
        env=dict(env, PORT=port))


@pytest.fixture(scope='module')
def trained(case):
    """The work directory of a run of two processes."""
    root = case[0]
    launch(case, 'dist_train.sh', root / 'toy.py', 2, '--work-dir',
           root / 'work')
    return root / 'work'


@pytest.mark.slow
def test_two_processes_train_one_student(kind, case, trained):
    """Equal weights, finite losses, a teacher outside of DDP."""
    ranks = [
        torch.load(trained / f'rank{i}.pth', weights_only=False)
        for i in (0, 1)
    ]
    for name, weight in ranks[0]['weights'].items():
        # Batch norms that are not synchronised see their own half only.
        same = torch.equal(weight, ranks[1]['weights'][name])
        assert same or '.running_' in name, name
    # Each rank saw its own half of the data.
    key = 'train/loss_kd_inter'
    assert list(ranks[0]['losses'][key]) != list(ranks[1]['losses'][key])
    given = torch.load(next(case[0].glob('*_1.pth')))['state_dict']
    for rank in ranks:
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert not rank['teacher_inside']
        assert all(
            torch.equal(given[n], w) for n, w in rank['teacher'].items())
        assert {f'train/loss_kd_{term}'
                for term in kind.terms} <= set(rank['losses'])
        for values in rank['losses'].values():
            assert torch.tensor([float(v) for v in values]).isfinite().all()


@pytest.mark.slow
def test_the_checkpoint_of_two_processes_is_the_students(kind, trained):
    """No `module.` before the names; only mimic's convs besides."""
    state = torch.load(
        trained / 'epoch_1.pth', weights_only=False)['state_dict']
    rank = torch.load(trained / 'rank0.pth', weights_only=False)
    assert list(state) == list(rank['weights'])
    plain = kind.lib.build(kind.student).state_dict()
    assert {n for n in state if not n.startswith('distiller.')} == set(plain)


@pytest.mark.slow
def test_two_processes_test_as_one(kind, case, trained, monkeypatch):
    """dist_test.sh gives the metrics of tools/test.py."""
    root, _ = case
    options = (root / 'toy.py', trained / 'epoch_1.pth')
    launch(case, 'dist_test.sh', *options, 2, '--work-dir', root / 'two')
    words = [osp.join(TOOLS, 'test.py'), *options, '--work-dir', root / 'one']
    monkeypatch.setattr(sys, 'argv', [str(word) for word in words])
    monkeypatch.syspath_prepend(root)  # for the config's import
    runpy.run_path(words[0], run_name='__main__')
    # MMEngine lets both processes write the file: behind the last one's
    # figures may stand the end of the other's, whose times were longer.
    one, two = (
        json.JSONDecoder().raw_decode(
            next((root / run).glob('*/*.json')).read_text())[0]
        for run in ('one', 'two'))
    for name in kind.metrics:
        assert one[name] == two[name]


@pytest.mark.parametrize(
    'script', sorted(n for n in os.listdir(TOOLS) if n.endswith('.sh')))
def test_shell_scripts_parse(script):
    """bash reads every launcher without complaint."""
    subprocess.run(['bash', '-n', osp.join(TOOLS, script)], check=True)


@pytest.mark.parametrize('script,expected', [
    ('slurm_train.sh',
     'tools/train.py cfg.py --work-dir=third --launcher=slurm --amp'),
    ('slurm_test.sh', 'tools/test.py cfg.py third --launcher=slurm --amp'),
])
def test_slurm_gets_the_command(script, expected, tmp_path):
    """srun is called with the resources and the tool's flags."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\necho "$@"\nprintf "<%s>\\n" "$@" >&2\n')
    srun.chmod(0o755)
    env = dict(
        os.environ,
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS='4',
        GPUS_PER_NODE='2')
    command = [
        'bash',
        osp.join(TOOLS, script), 'part', 'job', 'cfg.py', 'third', '--amp'
    ]
    done = subprocess.run(
        command, check=True, env=env, capture_output=True, text=True)
    out = done.stdout
    assert out.strip().endswith(f'python -u {expected}')
    for flag in ('-p part', '--job-name=job', '--gres=gpu:2', '--ntasks=4'):
        assert flag in out
    # a value with spaces stays one word
    done = subprocess.run([*command, '--cfg-options', 'a=[1, 2]'],
                          check=True,
                          env=env,
                          capture_output=True,
                          text=True)
    assert '<a=[1, 2]>' in done.stderr
