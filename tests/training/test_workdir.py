"""Workdirs on a disk and on gs://."""

import jax
import numpy as np
import object_store
import pytest

from keysync_jax.config import to_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.start import check, runs
from keysync_jax.training.store import checkpoints
from keysync_jax.training.store.workdir import absolute, as_os_error, beside_training


def test_an_object_store_is_no_folder_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(absolute("runs/../a")) == str(tmp_path / "a")
    assert str(absolute("gs://bucket/run")) == "gs://bucket/run"


def test_checkpoints_and_frozen_weights_lie_in_the_store(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    object_store.mount(tmp_path, monkeypatch)
    saved = []
    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointer, "save", lambda self, path, *_, **__: saved.append(path))
    checkpoints.save_frozen("gs://bucket/run", {"w": jax.numpy.zeros(2)})
    assert saved == ["gs://bucket/run/frozen"]
    with pytest.raises(KeySyncError, match="^gs://bucket/run/frozen is missing"):
        checkpoints.restore_frozen("gs://bucket/run", {"w": jax.ShapeDtypeStruct((2,), np.float32)})
    with pytest.raises(KeySyncError, match="^gs://bucket/run/frozen is missing"):
        runs._frozen("gs://bucket/run", None)
    with pytest.raises(KeySyncError, match="it has no checkpoints/"):
        checkpoints.Checkpoints("gs://bucket/run", read_only=True)
    (tmp_path / "bucket" / "run" / "checkpoints").mkdir(parents=True)

    def manager(directory, *_, **__):  # the real one asks Google's client what kind of bucket this is
        raise KeySyncError(f"opened {directory}")

    monkeypatch.setattr(checkpoints.ocp, "CheckpointManager", manager)
    with pytest.raises(KeySyncError, match="^opened gs://bucket/run/checkpoints$"):
        checkpoints.Checkpoints("gs://bucket/run", read_only=True)
    assert not any((tmp_path / "here").iterdir())


def test_a_store_that_does_not_answer_is_one_line(tmp_path, monkeypatch):
    object_store.mount(tmp_path, monkeypatch)
    with object_store.refusing(monkeypatch):
        with pytest.raises(OSError, match=r"^gs://bucket/run/config.json: HttpError: 503"):
            checkpoints.write_config("gs://bucket/run", to_dict(TrainConfig()))
    with pytest.raises(ImportError):  # which package is missing is for the command line to say
        with as_os_error("gs://bucket/run"):
            raise ImportError("gcsfs")


def test_what_a_run_can_do_without_does_not_end_it():
    said = []
    for problem in (OSError(28, "No space left on device"), ValueError("bad"), ImportError("No module named 'matplotlib'")):
        with beside_training("run/curve.png", said.append):
            raise problem
    reasons = ("No space left on device", "run/curve.png: ValueError: bad", "No module named 'matplotlib'")
    assert said == [f"[red]run/curve.png cannot be written ({reason}); the run goes on without it[/red]" for reason in reasons]
    with pytest.raises(KeyboardInterrupt):
        with beside_training("run/curve.png", said.append):
            raise KeyboardInterrupt


def test_a_first_save_that_was_cut_off_in_the_store_is_no_checkpoint(tmp_path, monkeypatch):
    """There Orbax writes under the final name, and says last that the checkpoint is whole."""
    object_store.mount(tmp_path, monkeypatch)
    checkpoints.write_config(tmp_path / "bucket" / "run", to_dict(TrainConfig()))
    step = tmp_path / "bucket" / "run" / "checkpoints" / "5"
    (step / "params").mkdir(parents=True)
    assert check.stored_config("gs://bucket/run") is None
    (step / "commit_success.txt").write_text("")
    assert check.stored_config("gs://bucket/run") == TrainConfig()
