"""Files that are whole, and which of them is the newest."""
import os

import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.registry import HOOKS, DefaultScope

from mmdist.engine import SeedHook, newest_checkpoint


@pytest.fixture
def files():
    """The backend as a checkpoint hook builds it: anew for every call."""

    def build():
        return get_file_backend(backend_args=dict(backend='mmdist.whole'))

    yield build
    build()._outdated.clear()


def write(path, age=0):
    """A checkpoint that was written so many seconds ago."""
    torch.save(dict(state_dict={}), path)
    os.utime(path, (1e9 - age, ) * 2)
    return str(path)


def test_what_is_outdated_stays_until_the_next_file_is_whole(files, tmp_path):
    """MMEngine removes first, and writes by another backend."""
    old, new = str(tmp_path / 'epoch_1.pth'), str(tmp_path / 'new/epoch_2.pth')
    files().put(b'old', old)
    files().remove(old)
    assert os.path.isfile(old)
    files().put(b'new', new)
    assert not os.path.exists(old)
    assert files().get(new) == b'new'
    assert os.listdir(tmp_path / 'new') == ['epoch_2.pth']


def test_the_same_name_again(files, tmp_path):
    """MMEngine removes the best checkpoint, and may write its name anew."""
    path = str(tmp_path / 'best_epoch_0.pth')
    files().put(b'old', path)
    for _ in range(2):
        files().remove(path)
    files().put(b'new', path)
    assert files().get(path) == b'new'
    for _ in range(2):
        files().remove(path)
    files().put(b'other', str(tmp_path / 'other.pth'))
    assert os.listdir(tmp_path) == ['other.pth']


def test_a_file_that_cannot_be_written_changes_nothing(files, tmp_path):
    """Here a folder is in its way."""
    old, new = tmp_path / 'epoch_1.pth', tmp_path / 'epoch_2.pth'
    files().put(b'old', str(old))
    files().remove(str(old))
    new.mkdir()
    with pytest.raises(OSError, match='epoch_2.pth could not be written'):
        files().put(b'new', str(new))
    assert sorted(os.listdir(tmp_path)) == ['epoch_1.pth', 'epoch_2.pth']
    assert old.read_bytes() == b'old'


@pytest.mark.parametrize('scope', ['mmengine', 'mmdet', 'mmseg'])
def test_a_config_may_name_the_hook(scope):
    """For other tools than ours; MMEngine's runner builds hooks so."""
    with DefaultScope.overwrite_default_scope(scope):
        hook = HOOKS.build(dict(type='mmdist.SeedHook'))
    assert isinstance(hook, SeedHook)


def test_newest_checkpoint(tmp_path):
    """By its time, not by what MMEngine noted as the last before."""
    assert newest_checkpoint(str(tmp_path)) is None
    first = write(tmp_path / 'epoch_9.pth', age=9)
    (tmp_path / 'last_checkpoint').write_text(first)
    assert newest_checkpoint(str(tmp_path)) == first
    second = write(tmp_path / 'epoch_10.pth', age=5)
    assert newest_checkpoint(str(tmp_path)) == second
    # These are no states of the run.
    write(tmp_path / 'best_coco_bbox_mAP_epoch_10.pth')
    write(tmp_path / 'pretrained.pth')
    (tmp_path / 'epoch_11.pth.partial').write_bytes(b'PK')
    assert newest_checkpoint(str(tmp_path)) == second


def test_what_was_made_of_checkpoints_is_no_state(tmp_path):
    """Published by MMEngine or MMDetection, or exported, and newer."""
    state = write(tmp_path / 'epoch_12.pth', age=9)
    for name in ('epoch_12-deadbeef.pth', 'epoch_12_student.pth'):
        write(tmp_path / name)
    assert newest_checkpoint(str(tmp_path)) == state


def test_times_may_be_lost(tmp_path):
    """As in a copy of the folder; then the note says which is the last."""
    for epoch in (3, 11, 12):
        write(tmp_path / f'epoch_{epoch}.pth', age=epoch)
    (tmp_path / 'last_checkpoint').write_text('/elsewhere/epoch_12.pth')
    newest = str(tmp_path / 'epoch_12.pth')
    assert newest_checkpoint(str(tmp_path)) == newest
    os.truncate(newest, 10)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / 'epoch_3.pth')


def test_a_run_that_was_started_anew(tmp_path):
    """Its first epochs are newer than the last ones of the run before."""
    write(tmp_path / 'epoch_12.pth', age=9)
    new = write(tmp_path / 'epoch_3.pth')
    (tmp_path / 'last_checkpoint').write_text(new)
    assert newest_checkpoint(str(tmp_path)) == new


def test_checkpoints_on_a_server(tmp_path):
    """MMEngine finds out whether they are there."""
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_3.pth')
    assert newest_checkpoint(str(tmp_path)) == 's3://bucket/epoch_3.pth'


def test_damaged_checkpoints_are_skipped(tmp_path):
    """Whichever byte is wrong, none is an error."""
    whole = write(tmp_path / 'epoch_1.pth', age=5)
    path = tmp_path / 'epoch_2.pth'
    content = open(write(path), 'rb').read()
    for i in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[i] ^= 0xff
        path.write_bytes(damaged)
        assert newest_checkpoint(str(tmp_path)) in (whole, str(path))


@pytest.mark.parametrize('left', [0., 0.1, 0.5, 0.99])
def test_half_a_checkpoint_is_not_the_newest(tmp_path, left):
    """Whatever part of it was written."""
    whole = write(tmp_path / 'iter_1.pth', age=5)
    half = write(tmp_path / 'iter_2.pth')
    os.truncate(half, int(left * os.path.getsize(half)))
    (tmp_path / 'last_checkpoint').write_text(half)
    assert newest_checkpoint(str(tmp_path)) == whole
    os.unlink(whole)
    assert newest_checkpoint(str(tmp_path)) is None


def test_a_killed_note_of_the_last_checkpoint(tmp_path):
    """MMEngine empties the note before it writes it anew."""
    whole = write(tmp_path / 'epoch_1.pth')
    for note in ('', str(tmp_path / 'epoch_7.pth'), '\n'):
        (tmp_path / 'last_checkpoint').write_text(note)
        assert newest_checkpoint(str(tmp_path)) == whole


def test_checkpoints_elsewhere_and_of_other_names(tmp_path):
    """`out_dir` and `filename_tmpl` of the hook."""
    (tmp_path / 'out').mkdir()
    older = write(tmp_path / 'out/step-3.pth', age=9)
    newer = write(tmp_path / 'out/step-4.pth')
    (tmp_path / 'last_checkpoint').write_text(older)
    for template in ('step-{}.pth', 'step-{:03d}.pth'):
        assert newest_checkpoint(str(tmp_path), template) == newer
    assert newest_checkpoint(str(tmp_path)) == older
