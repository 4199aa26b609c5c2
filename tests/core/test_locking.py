"""One process at a time in a folder."""

import os
import subprocess
import sys
import types

import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.locking import only_process

HOLD = """
import sys, time
from keysync_jax.core.locking import only_process
with only_process(sys.argv[1], "never said"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), str(seconds)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    first = hold(tmp_path / "run", 60)
    with pytest.raises(KeySyncError, match="somebody is at work"), only_process(str(tmp_path / "run"), "somebody is at work"):
        pass
    first.kill()
    first.wait()
    with only_process(str(tmp_path / "run"), "somebody is at work"):
        pass


def test_one_that_is_leaving_is_waited_for(tmp_path):
    said = []
    first = hold(tmp_path / "run", 1)
    with only_process(str(tmp_path / "run"), "somebody is at work", wait_s=60, say=said.append):
        assert first.wait() == 0 and len(said) == 1 and "waiting up to 60 s" in said[0]


def test_errors_inside_pass_and_free_it(tmp_path):
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), only_process(str(tmp_path), "somebody is at work"):
            1 / 0  # noqa: B018
    with only_process("gs://bucket/run", "never said"), only_process("gs://bucket/run", "object stores have no locks"):
        pass


def test_windows_locks_by_its_own_module(tmp_path, monkeypatch):
    """There is no `fcntl`; the first byte of the file is locked, and PermissionError says that another process has it."""
    calls, refused = [], []

    def locking(fd, mode, count):
        calls.append((os.lseek(fd, 0, os.SEEK_CUR), mode, count))
        if refused:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with only_process(str(tmp_path), "somebody is at work"):
        refused.append(True)
        with pytest.raises(KeySyncError, match="somebody is at work"), only_process(str(tmp_path), "somebody is at work"):
            pass
    assert calls == [(0, 2, 1)] * 2
