"""Packaging beyond pyproject.toml: configs, tools and the README's links.

``mim train mmdist ...`` and ``mmdist::...`` look for configs and tools in
``mmdist/.mim``.
"""
import os
import re
import shutil
from pathlib import Path
from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def readme():
    """The README without images and links that a package page cannot show."""
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    text = re.sub(r'!\[[^\]]*\]\((?!https:)[^)]*\)', '', text)
    return re.sub(r'\[([^\]]*)\]\((?!https:|#)[^)]*\)', r'\1', text)


def add_mim_files(base, link):
    """Put configs and tools into ``mmdist/.mim``, linked when editable."""
    for name in MIM_FILES:
        source, target = ROOT / name, base / 'mmdist' / '.mim' / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.exists():
            shutil.rmtree(target)
        if link:
            target.symlink_to(os.path.relpath(source, target.parent))
        elif source.is_dir():
            ignore = shutil.ignore_patterns('__pycache__', '*.pyc')
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)


class BuildWithMim(build_py):

    def run(self):
        super().run()
        editable = getattr(self, 'editable_mode', False)
        add_mim_files(ROOT if editable else Path(self.build_lib), editable)


class DevelopWithMim(develop):

    def run(self):
        super().run()
        if not self.uninstall:
            add_mim_files(ROOT, link=True)


setup(
    long_description=readme(),
    long_description_content_type='text/markdown',
    cmdclass={
        'build_py': BuildWithMim,
        'develop': DevelopWithMim
    })
