"""The training step compiled for devices that are not there: bytes per device, as the compiler for them places its buffers.

At full size libtpu has placed every buffer after minutes and then writes machine code for more than an hour, in more than 24 GiB of host
memory. So a compiler runs in a process of its own, writes down its buffer assignment, and is stopped there unless the whole program is
wanted.
"""

from __future__ import annotations

import contextlib
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
from typing import NamedTuple, TypedDict

import jax

from keysync_jax.config import to_dict
from keysync_jax.core.errors import KeySyncError, first_line
from keysync_jax.planning import compile_targets
from keysync_jax.planning.recipe_plan import Topology, lower_step, parse_topology
from keysync_jax.training.config import TrainConfig, train_config

# What XLA names its dumps of the step, in the order in which it writes them.
_MODULE = "jit_step"
_STAGES = {
    "before_optimizations.txt": "the compiler optimises the program",
    "after_optimizations_before_buffer_assignment.txt": "the compiler places the buffers",
    "after_optimizations_after_buffer_assignment.txt": "the compiler writes machine code",  # libtpu
    ".ir-no-opt.ll": "the compiler writes machine code",  # for GPUs, a file for each kernel
}
_PLACED = tuple(_STAGES)[-2:]  # the buffers have been by then
_ASSIGNMENT, _USAGE = "after_optimizations-buffer-assignment.txt", "after_optimizations-memory-usage-report.txt"
_LOOK_SECONDS = 2.0
_LINE_SECONDS = 60.0


class Compiled(NamedTuple):
    """Bytes per device as the compiler plans them, and the seconds it took.

    Attributes:
      arguments: train state and batch; the new state takes their place.
      temporaries: everything that the step needs in the device's memory besides.
      code: the program; None when the compiler was stopped before it wrote it, or does not say.
      seconds: from start to end, tracing included.
    """

    arguments: int
    temporaries: int
    code: int | None
    seconds: float

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries + (self.code or 0)


def compile_step(config: TrainConfig, topology: Topology, *, whole: bool = False, quiet: bool = False) -> Compiled:
    """Compile the step of a recipe for a topology of TPUs or GPUs, as far as its memory plan or to the end.

    Args:
      config: the recipe.
      topology: one of the recipe's `mesh.slices` TPU slices or GPU hosts.
      whole: wait for the machine code, whose size is then known.
      quiet: say nothing while waiting.

    Raises:
      UsageError: a topology of neither.
      KeySyncError: the compiler is missing or does not know the topology, or the step does not fit the devices.
    """
    compile_targets.check(topology)
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
            lines = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            # Otherwise the last line, where a traceback names what was raised.
            ended = f"the compiler ended with status {child.returncode}" + (f": {lines[-1][:300]}" if lines else "")
            reason = said[-1] if said else ended
            raise KeySyncError(reason)
        sizes: Sizes = json.loads(output.read_text().splitlines()[-1]) if whole else read_assignment(dump)
    return Compiled(**sizes, seconds=time.perf_counter() - begin)


class Sizes(TypedDict):
    """The sizes of `Compiled`."""

    arguments: int
    temporaries: int
    code: int | None


def read_assignment(dump: Path) -> Sizes:
    """The sizes of `Compiled` from XLA's dumped buffer assignment.

    Raises:
      KeySyncError: this compiler writes its plan in another way.
    """
    usage, assignment = _dumped(dump, _USAGE), _dumped(dump, _ASSIGNMENT)
    # Color 0 is the device's main memory (HBM); the others of a TPU are on the core.
    total = re.search(r"^Memory Space: .*\(color=0\)\s+Total bytes: (\d+)", usage.read_text() if usage else "", re.MULTILINE)
    # Newer libtpu (0.0.52) names a page before what the allocation is for, 0.0.42 does not.
    line = r"^allocation \d+: size (\d+), (?:page \d+, )?parameter "
    sizes = re.findall(line, assignment.read_text() if assignment else "", re.MULTILINE)
    if total is None or not sizes:
        raise KeySyncError("the compiler's memory plan has a form that is not known here; --compile=whole takes the long way")
    arguments = sum(map(int, sizes))
    return {"arguments": arguments, "temporaries": int(total.group(1)) - arguments, "code": None}


def _command(recipe: Path, topology: Topology) -> list[str]:
    return [sys.executable, "-m", __name__, str(recipe), topology.name, str(os.getpid())]


def _environment(dump: Path, topology: Topology) -> dict[str, str]:
    variables, flags = compile_targets.environment(topology)
    given = (os.environ.get("XLA_FLAGS", ""), flags, f"--xla_dump_to={dump} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={_MODULE}")
    return os.environ | variables | {"XLA_FLAGS": " ".join(filter(None, given))}


def _wait(child: subprocess.Popen, dump: Path, whole: bool, quiet: bool, begin: float) -> bool:
    """Until the plan is written (or the program is); whether it came to that."""
    said = begin
    while child.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_LOOK_SECONDS)
        if not whole and _is_placed(dump):
            return True
        now = time.perf_counter()
        if not quiet and now - said >= _LINE_SECONDS:
            said = now
            stage = next((words for name, words in reversed(_STAGES.items()) if _dumped(dump, name)), "the step is traced")
            print(f"compiling: {now - begin:.0f} s: {stage}", file=sys.stderr, flush=True)
    return child.returncode == 0 or (not whole and _is_placed(dump))


def _is_placed(dump: Path) -> bool:
    return any(_dumped(dump, ending) is not None for ending in _PLACED)


def _dumped(dump: Path, ending: str) -> Path | None:
    return next(iter(dump.glob(f"*{_MODULE}*{ending}")), None)


def end_with(parent: int, folder: Path) -> None:
    """In the child: a compiler whose starter was killed must not go on for an hour. Removes its folder and ends."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _compile(recipe: str, name: str) -> Sizes:
    """In the child: the sizes of `Compiled` from the whole program."""
    topology = parse_topology(name)
    config = train_config(json.loads(Path(recipe).read_text()), recipe)
    mesh = compile_targets.mesh(config, topology)
    lowered = lower_step(config, mesh, topology.device.platform)
    try:
        with jax.set_mesh(mesh):
            found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = first_line(error, 300)
        raise KeySyncError(f"the step does not fit {name}: {reason}; take a stronger config.remat or a wider mesh") from error
    if found is None:
        raise KeySyncError(f"the compiler for {name} does not say what memory a program takes")
    new = found.output_size_in_bytes - found.alias_size_in_bytes  # results that take no argument's place
    return {
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes + new,
        "code": found.generated_code_size_in_bytes or None,  # for GPUs it is not counted
    }


if __name__ == "__main__":
    recipe_path, topology_name, starter = sys.argv[1:]
    end_with(int(starter), Path(recipe_path).parent)
    try:
        print(json.dumps(_compile(recipe_path, topology_name)))
    except KeySyncError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
