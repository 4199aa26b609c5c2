"""Files appear whole or not at all."""

import errno
import os

import pytest

from keysync_jax.core import files
from keysync_jax.core.errors import KeySyncError, UsageError


def test_text_is_replaced_and_follows_the_umask(tmp_path):
    path = tmp_path / "new" / "a.json"
    before = os.umask(0o027)
    try:
        files.write_text(path, "one")
        files.write_text(path, "zwei ü")
    finally:
        os.umask(before)
    assert path.read_text(encoding="utf-8") == "zwei ü" and os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a.json: the disk is full; free space"),
        (OSError("4096 requested and 100 written"), "a.json: the disk is full"),  # NumPy's own error has no number
        (OSError(errno.EACCES, "Permission denied"), "a.json: Permission denied; choose another folder"),
    ],
)
def test_a_write_that_fails_is_named_and_leaves_what_was_there(error, words, tmp_path):
    path = tmp_path / "a.json"
    files.write_text(path, "whole")

    def fail(partial):
        partial.write_text("half")
        raise error

    with pytest.raises(KeySyncError, match=words):
        files.write_atomically(path, fail)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, lambda partial: (partial.write_text("half"), _interrupt()))
    assert path.read_text() == "whole" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["a" * 250 + ".json", "ä" * 120 + ".json"])
def test_a_name_may_be_as_long_as_names_can_be(name, tmp_path):
    files.write_text(tmp_path / name, "whole")
    assert os.listdir(tmp_path) == [name]


def _interrupt():
    raise KeyboardInterrupt


def test_folders_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert files.local_folder(tmp_path / "not" / "yet") == tmp_path / "not" / "yet"
    with pytest.raises(KeySyncError, match="file is a file; name a folder"):
        files.local_folder(tmp_path / "file" / "inside")
    for path in ("", "gs://bucket/set"):
        with pytest.raises(UsageError, match="no local folder"):
            files.local_folder(path)
