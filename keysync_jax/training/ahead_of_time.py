"""The training step compiled for a TPU slice that is not there: bytes per chip, as the TPU's own compiler places them.

At full size libtpu has placed every buffer after minutes and then writes machine code for more than an hour, in more than 24 GiB of host
memory. So it runs in a process of its own, writes down its buffer assignment, and is stopped there unless the whole program is wanted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from keysync_jax.config import to_dict
from keysync_jax.errors import KeySyncError, UsageError
from keysync_jax.parallel import mesh as meshes
from keysync_jax.training.config import TrainConfig, train_config
from keysync_jax.training.plan import Topology, lower_step, parse_topology

# What XLA names its dumps of the step, in the order in which it writes them.
_MODULE = "jit_step"
_STAGES = {
    "before_optimizations.txt": "the compiler optimises the program",
    "after_optimizations_before_buffer_assignment.txt": "the compiler places the buffers",
    "after_optimizations_after_buffer_assignment.txt": "the compiler writes machine code",
}
_ASSIGNMENT, _USAGE = "after_optimizations-buffer-assignment.txt", "after_optimizations-memory-usage-report.txt"
# libtpu takes a v4 chip for two devices unless told that its cores work as one; of later chips it knows.
_CHIP_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
_LOOK_SECONDS = 2.0
_LINE_SECONDS = 60.0


class Compiled(NamedTuple):
    """Bytes per chip as the compiler plans them, and the seconds it took.

    Attributes:
      arguments: train state and batch; the new state takes their place.
      temporaries: everything that the step needs in the chip's memory besides.
      code: the program; None when the compiler was stopped before it wrote it.
      seconds: from start to end, tracing included.
    """

    arguments: int
    temporaries: int
    code: int | None
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + (self.code or 0)


def check_libtpu(topology: Topology) -> None:
    """Raises:
    UsageError: no TPU topology.
    KeySyncError: libtpu is not installed.
    """
    if topology.device.platform != "tpu":
        raise UsageError(f"--compile needs a TPU topology such as v5e:4x4, not {topology.name}")
    if importlib.util.find_spec("libtpu") is None:
        raise KeySyncError(f"compiling for {topology.name} needs libtpu, which is not installed (pip install 'jax[tpu]')")


def compile_step(config: TrainConfig, topology: Topology, *, whole: bool = False, quiet: bool = False) -> Compiled:
    """Compile the step of a recipe for a TPU topology, as far as its memory plan or to the end.

    Args:
      config: the recipe.
      topology: one of the recipe's `mesh.slices` TPU slices.
      whole: wait for the machine code, whose size is then known.
      quiet: say nothing while waiting.

    Raises:
      KeySyncError: libtpu is missing or does not know the topology, or the step does not fit the chips.
    """
    check_libtpu(topology)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="keysync_compile_") as folder:
        recipe, dump = Path(folder, "config.json"), Path(folder, "dump")
        recipe.write_text(json.dumps(to_dict(config)))
        output, errors = Path(folder, "output"), Path(folder, "errors")
        with output.open("w") as out, errors.open("w") as err:
            child = subprocess.Popen(_command(recipe, topology), env=_environment(dump, topology), stdout=out, stderr=err)
            try:
                done = _wait(child, dump, whole, quiet, begin)
            finally:
                if child.poll() is None:
                    child.kill()
                child.wait()
        if not done:
            lines = [line for line in errors.read_text(errors="replace").splitlines() if line.startswith("error: ")]
            reason = lines[-1].removeprefix("error: ") if lines else f"the compiler ended with status {child.returncode}"
            raise KeySyncError(reason)
        sizes = json.loads(output.read_text().splitlines()[-1]) if whole else read_assignment(dump)
    return Compiled(**sizes, seconds=time.perf_counter() - begin)


def read_assignment(dump: Path) -> dict[str, int | None]:
    """The sizes of `Compiled` from XLA's dumped buffer assignment.

    Raises:
      KeySyncError: this libtpu writes its plan in another way.
    """
    usage, assignment = _dumped(dump, _USAGE), _dumped(dump, _ASSIGNMENT)
    # Color 0 is the chip's main memory (HBM); the others are on the core.
    total = re.search(r"^Memory Space: .*\(color=0\)\s+Total bytes: (\d+)", usage.read_text() if usage else "", re.MULTILINE)
    # Newer libtpu (0.0.52) names a page before what the allocation is for, 0.0.42 does not.
    line = r"^allocation \d+: size (\d+), (?:page \d+, )?parameter "
    sizes = re.findall(line, assignment.read_text() if assignment else "", re.MULTILINE)
    if total is None or not sizes:
        raise KeySyncError("libtpu's memory plan has a form that is not known here; --compile=whole takes the long way")
    arguments = sum(map(int, sizes))
    return {"arguments": arguments, "temporaries": int(total.group(1)) - arguments, "code": None}


def _command(recipe: Path, topology: Topology) -> list[str]:
    return [sys.executable, "-m", __name__, str(recipe), topology.name, str(os.getpid())]


def _environment(dump: Path, topology: Topology) -> dict[str, str]:
    """libtpu looks for the machine it runs on and for others that use it; there is none, and it touches no chip."""
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={_MODULE}"
    return os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": _accelerator(topology),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def _wait(child: subprocess.Popen, dump: Path, whole: bool, quiet: bool, begin: float) -> bool:
    """Until the plan is written (or the program is); whether it came to that."""
    said = begin
    last = list(_STAGES)[-1]
    while child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_SECONDS)
        if not whole and _dumped(dump, last) is not None:
            return True
        now = time.perf_counter()
        if not quiet and now - said >= _LINE_SECONDS:
            said = now
            stage = next((words for name, words in reversed(_STAGES.items()) if _dumped(dump, name)), "the step is traced")
            print(f"compiling: {now - begin:.0f} s: {stage}", file=sys.stderr, flush=True)
    return child.returncode == 0 or (not whole and _dumped(dump, last) is not None)


def _dumped(dump: Path, ending: str) -> Path | None:
    return next(iter(dump.glob(f"*{_MODULE}*.{ending}")), None)


def tpu_mesh(config: TrainConfig, topology: Topology) -> Mesh:
    """The recipe's mesh over the devices of its TPU slices, each of the topology, that need not be here.

    Raises:
      KeySyncError: libtpu does not know the topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = dict(_CHIP_OPTIONS.get(topology.kind, {}))
    if config.mesh.slices > 1:
        options["num_slices"] = config.mesh.slices  # of the named topology each
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0][:160]
        raise KeySyncError(f"libtpu cannot compile for {topology.name}: {reason}") from error
    return meshes.train_mesh(config.mesh, found.devices)


def _accelerator(topology: Topology) -> str:
    chips = topology.devices
    return {"v5e": f"v5litepod-{chips}", "v6e": f"v6e-{chips}"}.get(topology.kind, f"{topology.kind}-{2 * chips}")


def end_with(parent: int, folder: Path) -> None:
    """In the child: a compiler whose starter was killed must not go on for an hour. Removes its folder and ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _compile(recipe: str, name: str) -> dict[str, int]:
    """In the child: the sizes of `Compiled` from the whole program."""
    topology = parse_topology(name)
    config = train_config(json.loads(Path(recipe).read_text()), recipe)
    mesh = tpu_mesh(config, topology)
    lowered = lower_step(config, mesh, "tpu")
    try:
        with jax.set_mesh(mesh):
            found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0][:300]
        raise KeySyncError(f"the step does not fit {name}: {reason}; take a stronger config.remat or a wider mesh") from error
    new = found.output_size_in_bytes - found.alias_size_in_bytes  # results that take no argument's place
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes + new,
        "code": found.generated_code_size_in_bytes,
    }


if __name__ == "__main__":
    recipe_path, topology_name, starter = sys.argv[1:]
    end_with(int(starter), Path(recipe_path).parent)
    try:
        print(json.dumps(_compile(recipe_path, topology_name)))
    except KeySyncError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
