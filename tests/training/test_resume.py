"""A run that is killed and started again ends where the uninterrupted one ends, bit for bit; on other devices it ends close by.

The long versions (unhooked kills, two processes, 30 steps on three meshes) are in tests/scenarios/train_kill.py.
"""

import os
import shutil
import signal

import numpy as np
import pytest
import tiny_runs as tiny

from keysync_jax.converters import model_directory
from keysync_jax.training.export.export_run import export

SMALL = ("data.batch_size=2",)
STEPS = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return tiny.write_dataset(tmp_path_factory.mktemp("data") / "set")


def finish(*args, **options):
    done = tiny.run(*args, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_killed_in_a_step_and_in_a_save_it_ends_bit_equal(tmp_path, dataset):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole, dataset, *SMALL)

    # SIGKILL while step 13 is computed: the last checkpoint is that of step 10.
    done = tiny.run(killed, dataset, *SMALL, hooks=("kill-at-batch=13",))
    assert done.returncode == -signal.SIGKILL and tiny.saved_steps(killed) in ([5, 10], [5])

    # SIGKILL while the checkpoint of step 20 is written: its directory has no name yet.
    process = tiny.start(killed, dataset, *SMALL, hooks=("slow-commit=3",))
    tiny.wait_for(lambda: [p for p in tiny.unfinished(killed) if p.name.startswith("20.")], process)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [p.name.split(".")[0] for p in tiny.unfinished(killed)] == ["20"] and tiny.saved_steps(killed)[-1] == 15

    done = finish(killed, dataset, *SMALL)
    assert "continuing from step 15" in done.stderr and not tiny.unfinished(killed)
    assert tiny.assert_equal_runs(whole, killed, STEPS) > 300
    a, b = tiny.losses(whole), tiny.losses(killed)
    assert a == b and sorted(a) == list(range(1, STEPS + 1))
    assert (killed / "frozen").is_dir() and len(set(a.values())) == STEPS


@pytest.mark.slow
def test_saved_on_eight_devices_it_continues_on_four(tmp_path, dataset):
    options = ("data.batch_size=8", "checkpoint.every=10", "num_steps=11", "optimizer.warmup_steps=0")
    eight, four = tmp_path / "eight", tmp_path / "four"
    finish(eight, dataset, *options, "mesh.data=2", "mesh.fsdp=4", devices=8)
    assert tiny.saved_steps(eight) == [10, 11]
    shutil.copytree(eight, four)
    shutil.rmtree(four / "checkpoints" / "11")
    done = finish(four, dataset, *options, "mesh.data=4", "mesh.fsdp=1", devices=4)
    assert "the recipe changed: mesh.fsdp 4 -> 1" in done.stderr and "continuing from step 10" in done.stderr
    tiny.assert_equal_runs(eight, four, 10)
    before, a, b = tiny.arrays(eight, 10), tiny.arrays(eight, 11), tiny.arrays(four, 11)
    names = [name for name in a if name.startswith("params/")]
    worst = max(np.abs(a[name] - b[name]).max() for name in names)
    moved = max(np.abs(a[name] - before[name]).max() for name in names)
    assert worst < 1e-6 < 1e-4 < moved


@pytest.mark.slow
def test_a_run_that_rotates_its_checkpoints_is_exported_while_it_trains(tmp_path, dataset):
    """Every checkpoint makes way for the next; each export takes the one that is there when it reads."""
    run = tmp_path / "run"
    options = ("num_steps=1000000", "checkpoint.every=1", "checkpoint.keep_last=1", "checkpoint.keep_every=0")
    process = tiny.start(run, dataset, *SMALL, *options)
    try:
        tiny.wait_for(lambda: tiny.saved_steps(run), process)
        steps = []
        for i in range(8):
            export([run], tmp_path / f"model{i}")
            notes = model_directory.load(tmp_path / f"model{i}", complete=False).index["notes"]
            steps.append(next(int(note.split("step ")[1].split(",")[0]) for note in notes if note.startswith("keyframe: ")))
        assert process.poll() is None and steps == sorted(steps) and steps[0] < steps[-1]
        assert steps[0] not in tiny.saved_steps(run)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
