"""Where the time and the memory of a run go: FLOPs of a step, peak memory, and a profiler window."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.extend.core import ClosedJaxpr

from keysync_jax.core.errors import UsageError
from keysync_jax.core.memory import peak_bytes
from keysync_jax.costs import flops
from keysync_jax.training.store.workdir import beside_training

PROFILE = "profile"
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


class Speed(NamedTuple):
    """What a step costs and what the devices could do.

    Attributes:
      flops: of one update over all devices, recomputation not counted.
      devices: how many share it.
      peak: FLOP/s of one device in the compute type, 0 where unknown.
      name: of the peak, for example "H200 bf16".
    """

    flops: float
    devices: int
    peak: float = 0.0
    name: str = ""


class Memory(NamedTuple):
    """Peak memory in GiB: of the fullest local device, or of this process where the backend does not count its own (CPU)."""

    gib: float
    on_device: bool


def memory() -> Memory:
    """The peak since the process began."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return Memory(max(peaks) / 2**30, True)
    return Memory(peak_bytes() / 2**30, False)


def step_speed(jaxpr: ClosedJaxpr, dtype: str, *, decoder_is_network: bool) -> Speed:
    """Of a traced training step that computes in `dtype`, on this process's kind of device; see `flops.count_step`."""
    counted = flops.count_step(jaxpr, decoder_is_network=decoder_is_network)
    entry = flops.device(jax.devices()[0].device_kind)
    peak = flops.peak(entry, dtype)
    name = f"{entry.name} {_SHORT[dtype]}" if entry and peak else ""
    return Speed(counted.model, jax.device_count(), peak.flops if peak else 0.0, name)


def describe(speed: Speed) -> str:
    """For a person, once: what the rates of the run are measured against."""
    peak = f"{speed.peak / 1e12:.0f} TFLOP/s ({speed.name}, datasheet)" if speed.peak else "not known, so no MFU"
    return f"{speed.flops / 1e12:.3g} TFLOP per step without recomputation; peak of a device: {peak}"


def parse_profile_steps(text: str) -> tuple[int, int]:
    """`A:B` as (A, B).

    Raises:
      UsageError: anything else, or B not after A.
    """
    first, separator, last = text.partition(":")
    if not separator or not first.strip().isdecimal() or not last.strip().isdecimal() or int(first) >= int(last):
        raise UsageError(f"--profile_steps {text!r} is not A:B with 0 <= A < B; 100:105 records the five steps after step 100")
    return int(first), int(last)


class ProfileWindow:
    """Records the updates A + 1 to B with jax.profiler into WORKDIR/profile (for TensorBoard's profile plugin or xprof)."""

    def __init__(self, workdir: epath.PathLike, steps: tuple[int, int] | None, say: Callable[[str], None]):
        self._folder, self._steps, self._say = str(epath.Path(workdir) / PROFILE), steps, say
        self._active = False

    def step(self, done: int) -> contextlib.AbstractContextManager:
        """To be entered around the update that follows `done` ones."""
        if self._steps is None or not self._steps[0] <= done < self._steps[1]:
            return contextlib.nullcontext()
        if not self._active:
            self._say(f"recording steps {done + 1} to {self._steps[1]} into {self._folder}")
            self._active = True
            with beside_training(self._folder, self._say):
                jax.profiler.start_trace(self._folder)
        return jax.profiler.StepTraceAnnotation("train", step_num=done)

    def after(self, done: int, state: Any) -> None:
        """To be called when `done` updates were dispatched."""
        if self._active and self._steps is not None and done >= self._steps[1]:
            jax.block_until_ready(state)  # else the window ends before its last steps have run
            self.close()

    def close(self) -> None:
        """End a window that the run ended within."""
        if self._active:
            self._active = False
            with beside_training(self._folder, self._say):
                jax.profiler.stop_trace()
                self._say(f"wrote {self._folder}; look at it with xprof or TensorBoard's profile plugin")
