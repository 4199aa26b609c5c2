"""A worker of `keysync prepare` that is killed is noticed, named, and does not hold up the others."""

import functools
import os
from pathlib import Path

import killing_pipeline
import pytest

from keysync_jax.data_pipeline.prepare import jobs
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.supervise import Marks, run_supervised
from keysync_jax.data_pipeline.prepare.work_state import Folders, drops


def test_a_killed_worker_is_noticed_and_its_item_put_aside_after_the_second_time(tmp_path, monkeypatch, capfd):
    helpers = str(Path(killing_pipeline.__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [helpers, os.environ.get("PYTHONPATH")])))
    told = []
    run_supervised(functools.partial(killing_pipeline.run, str(tmp_path)), lambda name, reason: told.append((name, reason)))
    assert [name for name, _ in told] == ["killer"] and "died 2 times" in told[0][1]
    assert (tmp_path / "a").exists() and (tmp_path / "z").exists()
    error = capfd.readouterr().err
    assert error.count("keysync: a worker died") == 2 and "killer" in error and ("137" in error or "-9" in error)


def test_an_error_of_the_pipeline_is_told(tmp_path):
    with pytest.raises(RuntimeError, match="no such disk"):
        run_supervised(killing_pipeline.fail, lambda name, reason: None)


def test_marks_tell_the_dead_from_the_living(tmp_path):
    marks = Marks(str(tmp_path))
    with marks.holding("mine"):
        (tmp_path / "theirs.99999999").touch()
        assert marks.of_the_dead() == ("theirs",)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.99999999"]
    with Marks("").holding("nothing"):
        assert len(list(tmp_path.iterdir())) == 1


def test_an_item_that_is_put_aside_says_so(tmp_path):
    folders, item = Folders(str(tmp_path), str(tmp_path / "work")), Item(path="/v.mp4", name="v.mp4")
    jobs.put_item_aside(folders, item, "its worker died 2 times")
    (drop,) = drops(folders.analyses.load(item.id))
    assert (drop.path, drop.stage, drop.reason, drop.detail) == ("/v.mp4", "analyse", "killed_worker", "its worker died 2 times")
    assert folders.encoded.load(item.id) is None
