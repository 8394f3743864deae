"""The launchers: two processes on the CPU, and what Slurm would be given."""
import json
import os
import os.path as osp
import socket
import subprocess
import sys

import pytest
import torch

from tests.helpers import (detector, distiller_cfg, run_cfg, save_teacher,
                           write_coco)

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
        teacher = runner.model.module.teacher.model
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


@pytest.fixture(scope='module')
def case(tmp_path_factory):
    """A config with mimic, its folder and the environment to run it."""
    root = tmp_path_factory.mktemp('dist')
    (root / 'note_rank.py').write_text(NOTES)
    model = distiller_cfg(
        detector('retina', test_cfg=dict(score_thr=0.)),
        save_teacher(detector('retina'), root),
        mimic_loss=dict(type='mmdist.MimicLoss'))
    cfg = run_cfg(
        model,
        write_coco(root / 'data'),
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
def test_two_processes_train_one_student(case, trained):
    """Equal weights, finite losses, a teacher outside of DDP."""
    ranks = [
        torch.load(trained / f'rank{i}.pth', weights_only=False)
        for i in (0, 1)
    ]
    for name, weight in ranks[0]['weights'].items():
        assert torch.equal(weight, ranks[1]['weights'][name]), name
    # Each rank saw its own half of the data.
    key = 'train/loss_kd_inter'
    assert list(ranks[0]['losses'][key]) != list(ranks[1]['losses'][key])
    given = torch.load(case[0] / 'teacher_1.pth')['state_dict']
    for rank in ranks:
        assert rank['wrapper'] == 'MMDistributedDataParallel'
        assert not rank['teacher_inside']
        assert all(
            torch.equal(given[n], w) for n, w in rank['teacher'].items())
        assert {'train/loss_kd_intra',
                'train/loss_kd_mimic'} <= set(rank['losses'])
        for values in rank['losses'].values():
            assert torch.tensor([float(v) for v in values]).isfinite().all()


@pytest.mark.slow
def test_the_checkpoint_of_two_processes_is_the_students(trained):
    """No `module.` before the names; only mimic's convs besides."""
    state = torch.load(
        trained / 'epoch_1.pth', weights_only=False)['state_dict']
    rank = torch.load(trained / 'rank0.pth', weights_only=False)
    assert list(state) == list(rank['weights'])
    plain = set(detector_keys())
    assert {n for n in state if not n.startswith('distiller.')} == plain


def detector_keys():
    """The plain student's names."""
    from tests.helpers import build
    return build(detector('retina')).state_dict()


@pytest.mark.slow
def test_two_processes_test_as_one(case, trained):
    """dist_test.sh gives the metrics of tools/test.py."""
    root, env = case
    options = (root / 'toy.py', trained / 'epoch_1.pth')
    launch(case, 'dist_test.sh', *options, 2, '--work-dir', root / 'two')
    subprocess.run([
        sys.executable,
        osp.join(TOOLS, 'test.py'), *map(str, options), '--work-dir',
        str(root / 'one')
    ],
                   check=True,
                   cwd=ROOT,
                   env=dict(env, PYTHONPATH=f'{ROOT}:{root}'))
    one, two = (
        json.loads(next((root / run).glob('*/*.json')).read_text())
        for run in ('one', 'two'))
    for name in ('coco/bbox_mAP', 'coco/bbox_mAP_50'):
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
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    env = dict(
        os.environ,
        PATH=f'{tmp_path}:{os.environ["PATH"]}',
        GPUS='4',
        GPUS_PER_NODE='2')
    out = subprocess.run([
        'bash',
        osp.join(TOOLS, script), 'part', 'job', 'cfg.py', 'third', '--amp'
    ],
                         check=True,
                         env=env,
                         stdout=subprocess.PIPE,
                         text=True).stdout
    assert out.strip().endswith(f'python -u {expected}')
    for flag in ('-p part', '--job-name=job', '--gres=gpu:2', '--ntasks=4'):
        assert flag in out
