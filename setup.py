"""Packaging of mmdist; versions are pinned in requirements/ alone."""
import os
import shutil
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.develop import develop

ROOT = Path(__file__).resolve().parent
# `mim train mmdist ...` and `mmdist::...` look for these in mmdist/.mim
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def get_version():
    """Read the version without importing mmdist, which imports torch."""
    scope = {}
    exec((ROOT / 'mmdist' / 'version.py').read_text(), scope)
    return scope['__version__']


def parse_requirements(name):
    """The requirements listed in ``requirements/<name>.txt``."""
    lines = (ROOT / 'requirements' / f'{name}.txt').read_text().splitlines()
    return [line for line in lines if line and not line.startswith('#')]


def readme():
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


def add_mim_files(base, link):
    """Put configs and tools into ``mmdist/.mim``, linked when editable."""
    for name in MIM_FILES:
        source, target = ROOT / name, base / 'mmdist' / '.mim' / name
        if not source.exists():
            continue
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
    name='mmdist',
    version=get_version(),
    description='Knowledge distillation with DIST for MMDetection, '
    'MMSegmentation and MMPretrain',
    long_description=readme(),
    long_description_content_type='text/markdown',
    keywords='computer vision, knowledge distillation, object detection, '
    'semantic segmentation, image classification',
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    python_requires='>=3.10',
    packages=find_packages(include=('mmdist', 'mmdist.*')),
    install_requires=parse_requirements('runtime'),
    extras_require={
        **{
            name: parse_requirements(name)
            for name in ('openmmlab', 'onedl', 'dev', 'weights')
        },
        'cls': parse_requirements('cls') + parse_requirements('mmpretrain'),
    },
    cmdclass={
        'build_py': BuildWithMim,
        'develop': DevelopWithMim
    },
    zip_safe=False)
