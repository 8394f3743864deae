"""The tutorial: a notebook that runs from its first cell to its last."""
import nbformat
import pytest
from nbclient import NotebookClient


def texts(cell):
    """What a cell printed or showed."""
    for output in cell.outputs:
        yield output.get('text', '')
        yield from map(str, output.get('data', {}).values())


@pytest.mark.slow
def test_tutorial_runs(repo, tmp_path):
    """Its own commands, in a folder of the test's."""
    path = f'{repo}/docs/en/notebooks/tutorial.ipynb'
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace('work_dirs/tutorial', str(tmp_path))
    NotebookClient(
        notebook,
        timeout=900,
        resources=dict(metadata=dict(
            path=f'{repo}/docs/en/notebooks'))).execute()
    said = '\n'.join(text for cell in notebook.cells
                     if cell.cell_type == 'code' for text in texts(cell))
    for words in ('is ready: python tools/train.py', 'PixelTap pairs',
                  'loss_kd_inter', 'loss_kd_intra', 'the teacher is right',
                  'Epoch(test)', '<IPython.core.display.Image',
                  'top-1 agreement'):
        assert words in said, said
    assert (tmp_path / 'dist' / 'epoch_5.pth').is_file()
