"""Kill training runs as machines do and continue them: one process, two processes, other meshes, a full disk, SIGTERM.

    python tests/scenarios/train_kill.py FOLDER [--only NAME ...]

Everything runs through `keysync train`. Kills are SIGKILL from outside at moments that nothing in the run knows of: during a step, and
while an unfinished checkpoint directory exists. Prints a line per check and stops at the first that fails. A quarter of an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import tiny_runs as tiny  # noqa: E402

STEPS = 30
# Wide enough that a mesh has leaves to split and a checkpoint takes long enough to be hit.
WIDE = ("data.batch_size=8", "stage.unet.model_channels=64", f"num_steps={STEPS}")
TERMINATED = 128 + signal.SIGTERM


def check(condition: bool, words: str) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {words}")
    print(f"ok: {words}", flush=True)


def finish(workdir: Path, dataset: str, *overrides: str, **options) -> subprocess.CompletedProcess:
    done = tiny.run(workdir, dataset, *overrides, timeout=1200, **options)
    if done.returncode:
        raise SystemExit(f"FAILED: {workdir.name} ended with {done.returncode}\n{done.stderr[-3000:]}")
    return done


def kill(*processes: subprocess.Popen) -> None:
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.wait()


def equal(left: Path, right: Path, step: int = STEPS) -> None:
    count = tiny.assert_equal_runs(left, right, step)
    check(True, f"{right.name}: all {count} arrays of step {step} (params, EMA, AdamW) are bit-equal to {left.name}'s")


# ------------------------------------------------------------------------------------------------------------------ one process


def uninterrupted(folder: Path, dataset: str) -> Path:
    """The run that the others are compared with."""
    whole = folder / "whole"
    if not (whole / "checkpoints" / str(STEPS)).exists():
        finish(whole, dataset, *WIDE)
    return whole


def one_process(folder: Path, dataset: str) -> None:
    whole, killed = uninterrupted(folder, dataset), folder / "killed"
    process = tiny.start(killed, dataset, *WIDE)
    tiny.wait_for(lambda: tiny.saved_steps(killed) and max(tiny.losses(killed)) >= 7, process, 1200)
    kill(process)
    check(True, f"killed at a step after {max(tiny.losses(killed))}; saved are {tiny.saved_steps(killed)}")
    began = time.time()
    process = tiny.start(killed, dataset, *WIDE)
    caught = tiny.wait_for(lambda: tiny.unfinished(killed, since=began), process, 1200)
    kill(process)
    check(bool(tiny.unfinished(killed)), f"killed during a save: {caught[0].name} stayed, saved are {tiny.saved_steps(killed)}")
    finish(killed, dataset, *WIDE)
    check(not tiny.unfinished(killed), "the unfinished directory is gone")
    equal(whole, killed)


def sigterm(folder: Path, dataset: str) -> None:
    whole, stopped = uninterrupted(folder, dataset), folder / "stopped"
    process = tiny.start(stopped, dataset, *WIDE)
    tiny.wait_for(lambda: max(tiny.losses(stopped), default=0) >= 12, process, 1200)
    process.send_signal(signal.SIGTERM)
    status, steps = process.wait(), tiny.saved_steps(stopped)
    check(status == TERMINATED and steps[-1] >= 12, f"SIGTERM: status {status}, saved are {steps}")
    finish(stopped, dataset, *WIDE)
    equal(whole, stopped)


def full_disk(folder: Path, dataset: str) -> None:
    """The kernel refuses writes beyond 64 KiB per file (EFBIG) from the second save to the fourth, as ENOSPC on a full disk."""
    whole, full = uninterrupted(folder, dataset), folder / "full"
    process, log = tiny.start(full, dataset, *WIDE), folder / "full.log"
    tiny.wait_for(lambda: tiny.saved_steps(full) == [5], process, 1200)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))
    tiny.wait_for(lambda: "could not be written" in log.read_text(), process, 1200)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    lines = [line for line in log.read_text().splitlines() if "could not be written" in line]
    check("File too large" in lines[0] and "last good one is step 5" in lines[0], lines[0])
    status = process.wait()
    check(status == 0 and not tiny.unfinished(full), f"the run went on to its end; saved are {tiny.saved_steps(full)}")
    equal(whole, full)


# ---------------------------------------------------------------------------------------------------------------- two processes


def start_two(workdir: Path, dataset: str, *overrides: str, devices: int = 1) -> list[subprocess.Popen]:
    """Two processes of one run on this machine."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    out = []
    for number in range(2):
        command = tiny.command(workdir, dataset, *WIDE, *overrides)
        command += ["--coordinator", address, "--num-processes", "2", "--process-id", str(number)]
        with Path(f"{workdir}.{number}.log").open("a") as log:
            out.append(subprocess.Popen(command, stdout=log, stderr=log, env=tiny.environment(devices), start_new_session=True))
    return out


def finish_two(workdir: Path, dataset: str, *overrides: str, devices: int = 1) -> None:
    statuses = [process.wait(1200) for process in start_two(workdir, dataset, *overrides, devices=devices)]
    if statuses != [0, 0]:
        raise SystemExit(f"FAILED: {workdir.name} ended with {statuses}; see {workdir}.*.log")


def two_processes(folder: Path, dataset: str) -> None:
    whole, killed = folder / "two_whole", folder / "two_killed"
    finish_two(whole, dataset, "mesh.data=1", "mesh.fsdp=2")

    def start() -> list[subprocess.Popen]:
        return start_two(killed, dataset, "mesh.data=1", "mesh.fsdp=2")

    both = start()
    tiny.wait_for(lambda: tiny.saved_steps(killed) and max(tiny.losses(killed)) >= 7, both[0], 1200)
    kill(*both)
    check(True, f"both killed at a step after {max(tiny.losses(killed))}; saved are {tiny.saved_steps(killed)}")
    began = time.time()
    both = start()
    caught = tiny.wait_for(lambda: tiny.unfinished(killed, since=began), both[0], 1200)
    kill(*both)
    check(bool(tiny.unfinished(killed)), f"both killed during a save: {caught[0].name} stayed, saved are {tiny.saved_steps(killed)}")
    for victim in (1, 0):
        both = start()
        before = max(tiny.losses(killed), default=0)
        began = time.time()
        tiny.wait_for(lambda began=began: (killed / "metrics.jsonl").stat().st_mtime > began, both[0], 1200)
        kill(both[victim])
        begin = time.monotonic()
        try:
            status = both[1 - victim].wait(60)
        finally:
            if both[1 - victim].poll() is None:
                kill(both[1 - victim])
        seconds = time.monotonic() - begin
        words = f"process {victim} alone killed (after step {before} or later): the other ended with {status} after {seconds:.1f} s"
        check(status != 0 and seconds < 30, words)
    finish_two(killed, dataset, "mesh.data=1", "mesh.fsdp=2")
    equal(whole, killed)
    before = (killed / "config.json").stat().st_mtime_ns
    finish_two(killed, dataset, "mesh.data=1", "mesh.fsdp=2")  # neither may wait for the other, or be taken for dead
    said = f"nothing to do: step {STEPS} is reached" in " ".join(Path(f"{killed}.0.log").read_text().split())
    check(said and (killed / "config.json").stat().st_mtime_ns == before, "started once more, both find nothing to do and end with 0")

    stopped = folder / "two_stopped"
    both = start_two(stopped, dataset, "mesh.data=1", "mesh.fsdp=2")
    tiny.wait_for(lambda: max(tiny.losses(stopped), default=0) >= 7, both[0], 1200)
    both[1].send_signal(signal.SIGTERM)  # one host is taken away: JAX tells the other
    statuses = [process.wait(120) for process in both]
    check(statuses == [TERMINATED] * 2, f"SIGTERM to one of two: statuses {statuses}, saved are {tiny.saved_steps(stopped)}")
    finish(stopped, dataset, *WIDE, "mesh.data=2", devices=2)
    check(tiny.saved_steps(stopped)[-1] == STEPS, "a run of two hosts continued on one host with two devices")


# ------------------------------------------------------------------------------------------------------------------- other meshes


def norm(tree: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in tree.values())))


def meshes(folder: Path, dataset: str) -> None:
    """Saved on 8 devices after 10 steps; 30 more on 8, on 4, and on data 2 x fsdp 4."""
    options = (*WIDE[:2], "checkpoint.every=1", "checkpoint.keep_every=1", f"num_steps={10 + STEPS}")
    eight = folder / "mesh_8"
    finish(eight, dataset, *options, devices=8)
    runs = {"mesh_4": (4, ()), "mesh_2x4": (8, ("mesh.data=2", "mesh.fsdp=4"))}

    def params(workdir: Path, step: int) -> dict[str, np.ndarray]:
        return {name: x for name, x in tiny.arrays(workdir, step).items() if name.startswith("params/")}

    start, one, end = (params(eight, step) for step in (10, 11, 10 + STEPS))
    for name, (devices, mesh) in runs.items():
        other = folder / name
        (other / "checkpoints").mkdir(parents=True)
        shutil.copytree(eight / "frozen", other / "frozen")
        shutil.copytree(eight / "checkpoints" / "10", other / "checkpoints" / "10")
        finish(other, dataset, *options, *mesh, devices=devices)
        first, last = params(other, 11), params(other, 10 + STEPS)
        worst = max(float(np.abs(first[n] - one[n]).max()) for n in one)
        apart, moved = norm({n: last[n] - end[n] for n in end}), norm({n: end[n] - start[n] for n in end})
        check(worst < 1e-6, f"{name}: one step within {worst:.1e} of the 8 devices'")
        check(apart < 0.01 * moved, f"{name}: after {STEPS} steps {apart / moved:.2e} of the update's norm apart")
    restored_equal(folder, eight)


_RESTORE = """
import sys
import jax, numpy as np
from keysync_jax.training import recipes
from keysync_jax.parallel.mesh import AXES
from keysync_jax.parallel.sharding import state_shardings
from keysync_jax.training import state as states
from keysync_jax.training.store.checkpoints import Checkpoints
from keysync_jax.training.config import train_config
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.trainables import trainable_of

workdir = sys.argv[1]
config = train_config(recipes.load("tiny_test", ["--config.stage.unet.model_channels=64"]))
weights, tx = trainable_of(config).abstract_weights(), make_optimizer(config.optimizer)
shapes = jax.eval_shape(lambda p, f: states.create(p, f, tx, True), weights.params, weights.frozen)
found = []
for count, shape in ((8, (8, 1, 1)), (4, (4, 1, 1)), (8, (2, 4, 1)), (8, (2, 2, 2))):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES)
    shardings = state_shardings(mesh, shapes)
    abstract = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)
    with Checkpoints(workdir, read_only=True) as saved:
        state, _ = saved.restore(10, abstract)
    assert all(x.sharding == s.sharding for x, s in zip(jax.tree.leaves(state.params), jax.tree.leaves(abstract.params)))
    split = sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    found.append([np.asarray(x) for x in jax.tree.leaves((state.params, state.ema, state.opt_state))])
    same = all(a.tobytes() == b.tobytes() for a, b in zip(found[0], found[-1], strict=True))
    print(f"mesh {shape}: {len(found[-1])} arrays, {split} of them split, {'bit-equal' if same else 'DIFFERENT'}")
"""


def restored_equal(folder: Path, workdir: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RESTORE, str(workdir)], capture_output=True, text=True, env=tiny.environment(8), check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or len(lines) != 4:
        raise SystemExit(f"FAILED: {done.stderr[-3000:]}")
    for line in lines:
        check("bit-equal" in line, f"step 10 restored onto {line}")


PARTS = {"one_process": one_process, "sigterm": sigterm, "full_disk": full_disk, "two_processes": two_processes, "meshes": meshes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for data, runs and logs; must not exist (except with --only)")
    parts_help = "run this part only, repeat for more"
    parser.add_argument("--only", action="append", choices=list(PARTS), help=parts_help)
    args = parser.parse_args()
    if args.folder.exists() and not args.only:
        raise SystemExit(f"{args.folder} exists; name a folder that does not")
    args.folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((args.folder / "xla").resolve()))
    dataset = str(args.folder / "data")
    if not Path(dataset).exists():
        tiny.write_dataset(dataset)
    begin = time.monotonic()
    for name in args.only or PARTS:
        start = time.monotonic()
        PARTS[name](args.folder, dataset)
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"all as it should be, {time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
