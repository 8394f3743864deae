"""Hooks of MkDocs: the repository's own pages, with their own links.

Pages are read where they are, so that they look the same on GitHub: the
README is the home page, those of ``configs`` follow, and files they link to
(configs, licence) are copied beside them.
"""
import os.path as osp
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = 'docs/en/'
# what a page may link to, beside the pages
COPIED = ('configs/**/*.py', 'tools/**/*.py', 'benchmarks/*.py',
          'requirements/*.txt', 'LICENSE')
LINK = re.compile(r'(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in the folder of the documentation."""
    pages = [ROOT / 'README.md', ROOT / 'CHANGELOG.md']
    pages += sorted(ROOT.glob('configs/*/README.md'))
    copied = [path for pattern in COPIED for path in ROOT.glob(pattern)]
    for path in pages + sorted(copied):
        place = site_path(path.relative_to(ROOT).as_posix())
        files.append(
            File.generated(config, place, abs_src_path=path.as_posix()))
    return files


def on_page_markdown(markdown: str, page: Page, **kwargs) -> str:
    """Turn links between files of the repository into those of the site."""
    source = repository_path(page.file.src_uri)

    def moved(match: re.Match) -> str:
        target = osp.normpath(osp.join(osp.dirname(source), match[2]))
        if (ROOT / target / 'README.md').is_file():
            target += '/README.md'
        elif (ROOT / target).is_dir():
            return match[0]
        here = osp.dirname(page.file.src_uri)
        place = osp.relpath(site_path(target), here or '.')
        return match[1] + place + match[3]

    return LINK.sub(moved, markdown)


def site_path(path: str) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == 'README.md':
        return 'index.md'
    return path[len(DOCS):] if path.startswith(DOCS) else path


def repository_path(place: str) -> str:
    """Where a file of the site's sources is in the repository."""
    if place == 'index.md':
        return 'README.md'
    return place if (ROOT / place).is_file() else DOCS + place
