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
        timeout=300,
        resources=dict(metadata=dict(
            path=f'{repo}/docs/en/notebooks'))).execute()
    said = [
        '\n'.join(texts(cell)) for cell in notebook.cells
        if cell.cell_type == 'code'
    ]
    everything = '\n'.join(said)
    assert 'is ready: python tools/train.py' in everything
    assert 'loss_kd_inter' in said[6] and 'loss_kd_intra' in said[6]
    assert 'mIoU' in said[7]
    assert '<IPython.core.display.Image' in said[8]
    assert 'top-1 agreement' in said[9]
    assert (tmp_path / 'dist' / 'epoch_5.pth').is_file()
