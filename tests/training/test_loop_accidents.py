"""What may happen to a run, through `keysync train` in this process: bad data, Ctrl-C, SIGTERM, a full disk, numbers that overflow."""

import os
import resource
import signal

import numpy as np
import pytest
import tiny_runs as tiny
import train_entry
from tiny import CONFIG

from keysync_jax.cli import main as cli
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import KeyframeWindows
from keysync_jax.training.store.checkpoints import Checkpoints, read_config

EVERY_STEP = ("checkpoint.every=1", "data.batch_size=2")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "good", clips=12)


@pytest.fixture
def keysync(monkeypatch, capsys):
    """`keysync train` on the tiny recipe with an accident at the batch of some step; gives (exit status, lines of stderr)."""
    from keysync_jax.data_pipeline.source.loader import Batches

    original = Batches.__next__

    def train(workdir, data, *overrides, accidents=None):
        monkeypatch.setattr(Batches, "__next__", original)
        for step, action in (accidents or {}).items():
            train_entry.at_batch(step, action)
        argv = tiny.command(workdir, data, *EVERY_STEP, *overrides)
        try:
            status = cli.main(argv[argv.index("--") + 1 :])
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().err.splitlines()

    monkeypatch.setattr(Batches, "__next__", original)  # put back at the end
    return train


def said(lines, words):
    return [line for line in lines if words in line]


@pytest.mark.slow
def test_stopped_in_every_way_a_run_goes_on(tmp_path, dataset, keysync, monkeypatch):
    workdir = tmp_path / "run"

    # Ctrl-C: one line, and the save under way is completed.
    status, lines = keysync(workdir, dataset, accidents={4: train_entry.interrupt})
    assert status == 1 and lines[-1] == "keysync: error: stopped"
    assert tiny.saved_steps(workdir) == [2, 3] and not tiny.unfinished(workdir)

    # A dataset that cannot be read.
    status, lines = keysync(workdir, dataset, accidents={6: train_entry.broken})
    assert status == 1 and lines[-1].startswith("keysync: error: [Errno 5] Input/output error")
    assert said(lines, "continuing from step 3") and tiny.saved_steps(workdir) == [4, 5]

    # SIGTERM: saved, told, and a status that asks to be started again.
    status, lines = keysync(workdir, dataset, accidents={9: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert status == 128 + signal.SIGTERM and tiny.saved_steps(workdir) == [8, 9]
    assert "SIGTERM: stopped after step 9 of 30, which is saved; the same command continues from there" in lines[-1]

    # A disk that is full between steps 10 and 12, as far as the kernel is concerned.
    full = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        status, lines = keysync(
            workdir, dataset, "num_steps=14", "optimizer.max_skipped=4",
            accidents={
                10: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, full[1])),
                12: lambda: resource.setrlimit(resource.RLIMIT_FSIZE, full),
            },
        )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, full)
    warnings = said(lines, "WARNING: the checkpoint of step")
    # The write of step 11 goes on beside step 12, at which the limit is lifted: it may succeed.
    failed = [line.split("step ")[1].split()[0] for line in warnings]
    assert status == 0 and failed in (["10"], ["10", "11"])
    assert all("File too large" in line and "the last good one is step 9" in line for line in warnings)
    assert tiny.saved_steps(workdir) == [13, 14] and not tiny.unfinished(workdir)
    assert said(lines, "the recipe changed: num_steps 30 -> 14") and said(lines, "optimizer.max_skipped 10 -> 4")
    assert len(said(lines, "the recipe changed")) == 2 and read_config(workdir)["num_steps"] == 14

    # Another batch size: said, and no sample is left out or seen twice.
    read, sample = [], WindowReader.sample
    with monkeypatch.context() as patch:
        patch.setattr(WindowReader, "sample", lambda self, *where: read.append(where) or sample(self, *where))
        status, lines = keysync(workdir, dataset, "num_steps=15", "data.batch_size=4")
    assert status == 0 and said(lines, "the recipe changed: data.batch_size 2 -> 4")
    assert sorted(step * size + row + shift for step, row, size, shift in read)[:4] == [28, 29, 30, 31]
    with Checkpoints(workdir, read_only=True) as saved:
        assert saved.counters(14)["samples"] == 28 and saved.counters(15)["samples"] == 32

    # Another model is refused by the key.
    status, lines = keysync(workdir, dataset, "stage.unet.num_head_channels=32", "stage.mask.kind=mouth")
    assert status == 1
    for words in ("checkpoint 15 of", "stage.unet.num_head_channels 16 -> 32", "stage.mask.kind box -> mouth"):
        assert words in lines[-1]
    assert tiny.saved_steps(workdir) == [14, 15]


def test_nan_in_a_record_stops_the_run_and_names_the_record(tmp_path, dataset, keysync):
    config = CONFIG
    reader = WindowReader(
        SourceConfig(
            (DatasetChoice(dataset),), KeyframeWindows(num_frames=config.stage.num_frames, min_spacing=config.data.min_spacing),
            audio_encoder="log_mel", seed=config.seed,
        )
    )  # fmt: skip
    bad = reader.clip(reader.sample(3, 1, 2)).id
    data = tiny.write_dataset(tmp_path / "bad", clips=12, not_finite=(bad,))
    status, lines = keysync(tmp_path / "run", data)
    assert status == 1 and lines[-1].startswith("keysync: error: ") and f"clip '{bad}' frame " in lines[-1]
    assert "column 'latent' is not finite" in lines[-1] and tiny.saved_steps(tmp_path / "run") == [1, 2]


def test_updates_that_overflow_are_left_out_stop_the_run_and_push_nothing_good_out(tmp_path, dataset, keysync):
    workdir = tmp_path / "run"
    assert keysync(workdir, dataset, "num_steps=2")[0] == 0
    before = tiny.arrays(workdir, 2)
    status, lines = keysync(workdir, dataset, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.max_skipped=3")
    assert status == 1 and lines[-1].startswith("keysync: error: step 5: 3 updates in a row were not finite")
    assert lines[-1].endswith("the same command goes on from the last good checkpoint, step 2")
    skipped = said(lines, "is not finite; the update was left out")
    assert [line.split(":")[0].split()[-1] for line in skipped] == ["3", "4", "5"]
    assert tiny.saved_steps(workdir)[-1] == 2
    after = tiny.arrays(workdir, 2)
    assert all(np.isfinite(x).all() and np.array_equal(before[n], x) for n, x in after.items())
