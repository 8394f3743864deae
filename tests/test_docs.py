"""Each block of code on the pages runs here, or the page says what it needs.

Each page is walked from top to bottom in a folder of a toy student and toy
teachers. The other pages begin where the quickstart ends.
"""
import ast
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.nn.functional import cross_entropy

from mmdist.models.teacher import build_model
from mmdist.registry import MODELS, TAPS
from mmdist.utils import find_config
from tests.helpers import (CLASSES, detector, run_cfg, save_teacher,
                           write_coco, write_new_style)

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / 'docs/en/quickstart.md'
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding='utf-8')
    for path in (QUICKSTART, ROOT / 'README.md',
                 *sorted(ROOT.glob('docs/en/*.md')),
                 *sorted(ROOT.glob('configs/*/README.md')))
}
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PATHS = re.compile(
    r'(?<!\w)(?:configs|tools|benchmarks|requirements)/[\w/.+-]+')
# above a block or in its comments: why it does not run here
NEEDS = re.compile(r'needs? (a GPU|GPUs|mmdeploy)|downloads|minutes?|hours?')
PROGRAMS = ('python', 'pip', 'git', 'make', 'bash', 'cp', 'mkdir')
DONE = []  # what two pages name is run once


def blocks():
    """Parameters: page, language, code, and whether it needs something."""
    for page, text in PAGES.items():
        for match in BLOCK.finditer(text):
            above = text[:match.start()].rstrip().rpartition('\n\n')[2]
            hints = [*above.split(), *re.findall('# .*', match[2])]
            line = text.count('\n', 0, match.start()) + 1
            yield pytest.param(
                page,
                *match.groups(),
                bool(NEEDS.search(' '.join(hints))),
                id=f'{page}:{line}')


@pytest.fixture(scope='module')
def folder_of(tmp_path_factory):
    """A function: the folder of a page."""
    root = tmp_path_factory.mktemp('docs')
    write_toys(root / QUICKSTART.name)

    def get(page):
        folder = root / page.replace('docs/en/', '').replace('/', '_')
        if not folder.exists():
            shutil.copytree(root / QUICKSTART.name, folder)
        return folder

    # pages register a loss and a tap
    with mock.patch.dict(MODELS.module_dict), \
            mock.patch.dict(TAPS.module_dict):
        yield get


def write_toys(folder):
    """A student, its teacher, and one of more classes, with their weights."""
    data = write_coco(folder / 'data', num=2)
    cv2.imwrite(str(folder / 'image.jpg'), np.full((64, 64, 3), 99, np.uint8))
    for name, classes in dict(
            COCO=[*CLASSES, 'person', 'car', 'dog'],
            TEACHER=CLASSES,
            STUDENT=CLASSES).items():
        model = detector('retina', bbox_head=dict(num_classes=len(classes)))
        cfg = run_cfg(model, data, folder, epochs=12)
        cfg.val_dataloader, cfg.val_cfg = cfg.test_dataloader, {}
        cfg.val_evaluator, cfg.train_cfg.val_interval = cfg.test_evaluator, 12
        for key in ('custom_imports', 'work_dir', 'experiment_name'):
            cfg.pop(key)
        cfg.dump(str(folder / f'{name}.py'))
        meta = dict(dataset_meta=dict(classes=classes))
        saved = save_teacher(model, folder, meta=meta)['checkpoint']
        Path(saved).rename(folder / f'{name}.pth')
    write_new_style(cfg, folder / 'student.py')


@pytest.mark.parametrize('page, language, code, needs', blocks())
def test_block(page, language, code, needs, folder_of, monkeypatch):
    monkeypatch.chdir(folder_of(page))
    monkeypatch.syspath_prepend(folder_of(page))
    if '.onnx' in code and not needs:
        for module in ('onnxscript', 'onnxruntime'):
            pytest.importorskip(module, reason='an extra')
    if language == 'python':
        run_python(page, code, needs)
    elif language == 'shell':
        for program, *words in commands(code):
            for path in PATHS.findall(' '.join(words)):
                assert (ROOT / path).exists(), path
            if program == 'make':
                assert f'\n{words[0]}:' in (ROOT / 'Makefile').read_text()
                ci = (ROOT / '.ci' / 'run').read_text()
                assert needs or f'make {words[0]}' in ci
            elif program == 'python' and PATHS.match(words[0]):
                run_tool(words, needs, monkeypatch)
            else:  # pip's word is enough
                assert needs or 'install' in words
    else:
        assert language in ('text', 'bibtex')


def commands(code):
    """The commands of a block, as Bash expands them."""
    show = ''.join(f'{name}() {{ printf "%q " {name} "$@"; echo; }}\n'
                   for name in PROGRAMS)
    done = subprocess.run([
        shutil.which('bash'), '-euc',
        show + code.replace('.venv-cls/bin/', '')
    ],
                          env=dict(PATH=''),
                          capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return map(shlex.split, done.stdout.splitlines())


class Parsed(Exception):
    """The tool has read its arguments."""


def run_tool(words, needs, monkeypatch):
    """Run a tool, or only let it read its arguments."""
    tool = ROOT / words[0]
    monkeypatch.setattr(sys, 'argv', words)
    monkeypatch.syspath_prepend(tool.parent)
    if needs:
        parse = ArgumentParser.parse_args

        def parse_only(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(ArgumentParser, 'parse_args', parse_only)
        with pytest.raises(Parsed):
            runpy.run_path(str(tool), run_name='__main__')
    elif words not in DONE:
        DONE.append(words)
        runpy.run_path(str(tool), run_name='__main__')


def run_python(page, code, needs):
    """Build the model of a config, import a module, or run the lines."""
    lines = ast.parse(code).body
    for config in re.findall(r"'(mm\w+::[^']+)'", code):
        find_config(config, page)
    name = re.match(r'# (\w+\.py)', code)
    if needs:
        return
    if 'read_base' in code or all(isinstance(x, ast.Assign) for x in lines):
        base = '' if '_base' in code else "_base_ = 'dist.py'\n"
        Path('block.py').write_text(base + code)
        cfg = Config.fromfile('block.py')
        if '::' in code and 'teacher' in cfg.model:  # no download
            cfg.model.update(
                student='STUDENT.py',
                teacher=dict(config='TEACHER.py', checkpoint='TEACHER.pth'))
            cfg.dump('block.py')
        build_model('block.py', 'model', resolve=False)
    elif name:
        Path(name[1]).write_text(code)
        importlib.invalidate_caches()
        importlib.import_module(name[1][:-3])
    else:
        exec(code, dict(NAMES))


# what lines of Python take for granted
NAMES = dict(
    student=torch.nn.Linear(9, 5),
    teacher=torch.nn.Linear(9, 5),
    images=torch.rand(6, 9),
    student_logits=torch.rand(6, 5, requires_grad=True),
    teacher_logits=torch.rand(6, 5),
    labels=torch.arange(6) % 5,
    cross_entropy=cross_entropy,
    student_feats=torch.rand(2, 4, 8, 8, requires_grad=True),
    teacher_feats=torch.rand(2, 4, 8, 8))


def test_flags_and_files_in_the_text_exist():
    """Flags and paths between backticks; and no block is indented."""
    sources = ''.join(path.read_text()
                      for folder in ('tools', 'benchmarks', 'mmdist/utils')
                      for path in (ROOT / folder).rglob('*.py'))
    flags = {*re.findall(r"'(--[a-z][\w-]*)'", sources)}
    flags |= {'--checkpoint', '--config-settings', '--no-deps'}  # mim's, pip's
    for page, text in PAGES.items():
        assert text.count('```') == 2 * len(BLOCK.findall(text)), page
        for code in re.findall('`([^`\n]+)`', BLOCK.sub('', text)):
            assert {*re.findall(r'--[a-z][\w-]*', code)} <= flags, page
            # tables of the zoo quote errors of other packages
            for path in () if 'zoo' in page else PATHS.findall(code):
                assert (ROOT / path).exists(), (page, path)
