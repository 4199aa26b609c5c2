"""One process at a time in a folder."""

import subprocess
import sys

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
