"""Tiny training runs for the tests: a dataset that fits `configs/tiny_test.py`, and the real entry point in a process of its own."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
from tiny import LATENT, MELS, SIZE

from keysync_jax.data_pipeline import records
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import make_group
from keysync_jax.data_pipeline.records import audio_column, landmarks_column, latent_column, record_bytes
from keysync_jax.data_pipeline.shards import write_group

COLUMNS = (latent_column(LATENT, LATENT), audio_column("log_mel", MELS), landmarks_column())
ENTRY = Path(__file__).with_name("train_entry.py")


def write_dataset(root, clips=6, frames=60, split="train", not_finite=()) -> str:
    """Random latents and audio, a face in the middle. `not_finite` names clips that a careless writer put NaN into."""

    def load(piece):
        rng = np.random.default_rng([int(piece.clip.removeprefix("c")), piece.start])
        count = piece.stop - piece.start
        latents = rng.standard_normal((count, LATENT, LATENT, 4)).astype(np.float16)
        points = np.stack([16 + 32 * np.arange(68) / 67, 20 + 40 * np.arange(68) / 67], axis=-1)
        return {
            "latent": latents * np.float16(np.nan if piece.clip in not_finite else 1),
            "audio_log_mel": rng.standard_normal((count, 2, MELS)).astype(np.float16),
            "landmarks": np.repeat(points[None], count, axis=0).astype(np.float32),
        }

    size = record_bytes(COLUMNS)
    group = make_group(COLUMNS, (SIZE, SIZE), size, size * 100)
    index = [Clip(f"c{i}", frames, split=split, speaker=f"s{i}", source="tiny") for i in range(clips)]
    if not_finite:  # our own writer refuses
        with mock.patch.object(records, "_checked", lambda column, clip, first, value: np.asarray(value)):
            write_group(str(root), group, load, index)
    else:
        write_group(str(root), group, load, index)
    return str(root)


def command(workdir, dataset, *overrides, hooks=()) -> list[str]:
    """`keysync train` on the tiny recipe; `hooks` as in train_entry.py."""
    settings = [f"--config.{o}" for o in (f"data.datasets=('{dataset}',)", *overrides)]
    return [sys.executable, str(ENTRY), *hooks, "--", "train", "--config", "tiny_test", "--workdir", str(workdir), *settings]


def environment(devices=1, **variables) -> dict[str, str]:
    # One thread: a step of milliseconds gains nothing from more, and on a busy machine it waits for them.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false"
    fixed = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return os.environ | fixed | variables


def start(workdir, dataset, *overrides, hooks=(), devices=1, log=None, **variables) -> subprocess.Popen:
    """The run in the background, its output in `log` (default WORKDIR.log, appended to)."""
    path = Path(log or f"{workdir}.log")
    with path.open("a") as out:
        return subprocess.Popen(
            command(workdir, dataset, *overrides, hooks=hooks), stdout=out, stderr=out, env=environment(devices, **variables),
            start_new_session=True,
        )  # fmt: skip


def run(workdir, dataset, *overrides, hooks=(), devices=1, timeout=900, **variables) -> subprocess.CompletedProcess:
    """The run to its end."""
    return subprocess.run(
        command(workdir, dataset, *overrides, hooks=hooks), capture_output=True, text=True, env=environment(devices, **variables),
        timeout=timeout,
    )  # fmt: skip


def wait_for(ready, process, seconds=900, what="the run"):
    """Poll until `ready()` is true and return it; the process must not end before."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert process.poll() is None, f"{what} ended (status {process.returncode}) before it was to be stopped"
        assert time.monotonic() < end, f"{what}: waited {seconds} s"
        time.sleep(0.005)
    return value


def unfinished(workdir, since=0.0) -> list[Path]:
    """Checkpoint directories without their name yet, last written to after `since`."""
    out = []
    for path in sorted((Path(workdir) / "checkpoints").glob("*.orbax-checkpoint-tmp*")):
        with contextlib.suppress(FileNotFoundError):  # it has just been given its name
            if path.stat().st_mtime > since:
                out.append(path)
    return out


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (Path(workdir) / "checkpoints").glob("*") if p.name.isdigit())


def losses(workdir) -> dict[int, float]:
    """Loss by step; of a step that was done twice the last one."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


def arrays(workdir, step) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by item and name, read without our own code."""
    import jax
    import orbax.checkpoint as ocp

    out = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        for item in ("params", "ema", "opt_state"):
            path = Path(workdir).resolve() / "checkpoints" / str(step) / item
            stored = checkpointer.metadata(path).item_metadata.tree
            tree = checkpointer.restore(path, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored))
            for name, leaf in jax.tree_util.tree_leaves_with_path(tree):
                out[f"{item}/{jax.tree_util.keystr(name, simple=True, separator='/')}"] = np.asarray(leaf)
    return out


def assert_equal_runs(left, right, step) -> int:
    """Bit-equal checkpoints; returns how many arrays were compared."""
    a, b = arrays(left, step), arrays(right, step)
    assert a and a.keys() == b.keys()
    different = [name for name in a if a[name].dtype != b[name].dtype or a[name].tobytes() != b[name].tobytes()]
    assert not different, f"{len(different)} of {len(a)} arrays differ, e.g. {different[:3]}"
    return len(a)
