"""What a run says of itself: one line per interval, JSONL for programs, TensorBoard and wandb where installed.

WORKDIR/metrics.jsonl   one object per line: `step`, `time` (Unix seconds) and the values; after a resume some steps appear twice,
                        the later line counts
WORKDIR/tensorboard/    the same for TensorBoard
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from rich.console import Console

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.training.profiling import Speed, memory
from keysync_jax.training.store import jsonl
from keysync_jax.training.store.workdir import absolute, beside_training

METRICS = "metrics.jsonl"
LINE_WIDTH = 160
_TERMS = 3  # terms of the loss that the line keeps longest
_CURRENT = ("learning_rate", "skipped")  # state rather than measurements: the last value counts, not the mean


def due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens at this one."""
    return every > 0 and step % every == 0


class MetricLog:
    """Writes metrics of process 0; the other processes stay silent. As a context manager it is closed at the end, but for an end by an
    error: wandb then calls the run crashed.

    Raises:
      UsageError: wandb is asked for and not installed.
      KeySyncError: wandb does not begin a run, for want of a key for example.
      OSError: metrics.jsonl is there and cannot be read.
    """

    def __init__(self, workdir: epath.PathLike, *, tensorboard: bool = True, wandb: bool = False, run: Mapping[str, Any] | None = None):
        self._main = jax.process_index() == 0
        self._console = Console(stderr=True)
        self._path = epath.Path(workdir) / METRICS
        self._events: _Events | None = None
        self._wandb: Any = None
        self._failed = False
        if not self._main:
            return
        if wandb:
            self._wandb = _wandb(workdir, run)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = jsonl.JsonLines(self._path)
        self._folder = epath.Path(workdir) / "tensorboard"
        if tensorboard:
            with beside_training(self._folder, self.say):
                self._events = _tensorboard(self._folder, self.say)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append to metrics.jsonl, TensorBoard and wandb. Values that are not finite become null."""
        if not self._main:
            return
        values = {name: float(value) for name, value in values.items()}
        stored = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with beside_training(self._path, self._say_once):
            self._lines.add({"step": step, "time": round(time.time(), 3)} | stored)
        self._to_events(lambda events: events.scalars(step, values))
        self._to_wandb(lambda run: run.log(values, step=step))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture `[H, W, 3]` uint8 for TensorBoard."""
        self._to_events(lambda events: events.image(step, name, image))

    def _to_events(self, add: Callable[[_Events], None]) -> None:
        if self._events is None:
            return
        events, self._events = self._events, None  # a file that was cut short is not continued
        with beside_training(self._folder, self.say):
            add(events)
            self._events = events

    def _to_wandb(self, send: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except (require_wandb().Error, OSError) as error:
            self._wandb = None
            self.say(f"[red]wandb: {_one_line(error)}; the run goes on without it[/red]")

    def _say_once(self, text: str) -> None:
        if not self._failed:
            self.say(text)
        self._failed = True

    def say(self, text: Any) -> None:
        """One line for the person who watches, or a `rich` table. A line may stand in [red]...[/red] or [yellow]...[/yellow], which is all
        the markup there is: paths and the words of others may hold brackets."""
        if not self._main:
            return
        coloured = re.fullmatch(r"\[(red|yellow)\](.*)\[/\1\]", text, re.DOTALL) if isinstance(text, str) else None
        style, text = coloured.groups() if coloured else (None, text)
        self._console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._events is not None:
            with beside_training(self._folder, self.say):
                self._events.close()
        self._to_wandb(lambda run: run.finish())

    def __enter__(self) -> MetricLog:
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind in (None, SystemExit):  # SystemExit: stopped by SIGTERM, its state saved
            self.close()


def read_metrics(workdir: epath.PathLike) -> dict[int, dict[str, Any]]:
    """step -> values of metrics.jsonl, ascending; of a step that was logged again after a resume the later values."""
    rows: dict[int, dict[str, Any]] = {}
    for row in jsonl.read(epath.Path(workdir) / METRICS):
        rows.setdefault(row.pop("step"), {}).update(row)
    return dict(sorted(rows.items()))


class _Events:
    """TensorBoard's file, written at once and without tensorboardX's `SummaryWriter`, which writes from a thread behind a queue.

    That thread dies when the disk is full, and the run would then wait for ever on the full queue. A process that is killed would also
    lose what the queue still holds.

    Raises:
      ImportError: tensorboardX, or what it needs for `gs://`, is not installed.
    """

    def __init__(self, folder: str):
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  # protobuf makes it
        from tensorboardX.record_writer import directory_check

        directory_check(folder)
        self._summary, self._event, self._writer = summary, Event, EventsWriter(f"{folder}/events")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, [self._summary.scalar(name, value) for name, value in values.items()])

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(step, [self._summary.image(name, image, dataformats="HWC")])

    def _write(self, step: int, summaries: Sequence[Any]) -> None:
        for each in summaries:
            self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=each))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _tensorboard(folder: epath.PathLike, say: Callable[[str], None]) -> _Events | None:
    try:
        return _Events(str(folder))
    except ImportError as error:
        missing = error.name == "tensorboardX"
        why = "tensorboardX is not installed (pip install 'keysync-jax[log]')" if missing else error
        say(f"no TensorBoard: {why}; metrics.jsonl has everything")
        return None


def require_wandb() -> Any:
    """The module `wandb`.

    Raises:
      UsageError: it is not installed.
    """
    try:
        import wandb
    except ImportError:
        raise UsageError("config.log.wandb is on but wandb is not installed; pip install wandb, or set --config.log.wandb=False") from None
    return wandb


def _wandb(workdir: epath.PathLike, run: Mapping[str, Any] | None) -> Any:
    wandb = require_wandb()
    path = str(absolute(workdir))
    # The same workdir is the same run: a resumed run continues its curves.
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    try:
        return wandb.init(project="keysync-jax", id=name, name=epath.Path(path).name, resume="allow", config=dict(run or {}))
    except (wandb.Error, OSError) as error:
        advice = "log in with `wandb login`, or set WANDB_MODE=offline or --config.log.wandb=False"
        raise KeySyncError(f"wandb does not begin a run: {_one_line(error)}; {advice}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Meter:
    """Means and rates of the interval between two lines."""

    def __init__(self, first: int, last: int, batch_size: int, speed: Speed | None = None, unit: str = "clips"):
        """Args:
        first: updates done before this process began.
        last: updates at which it ends.
        batch_size: samples of an update.
        speed: FLOPs of an update and what the devices could do; None where unknown.
        unit: what a sample is, for the line.
        """
        self.last, self._batch_size, self.speed, self.unit = last, batch_size, speed, unit
        self._started, self._all_paused = time.perf_counter(), 0.0
        self._restart(first)

    def _restart(self, step: int) -> None:
        self._begin, self._step, self._waited, self._paused = time.perf_counter(), step, 0.0, 0.0
        self._sums: dict[str, float] = {}
        self._current: dict[str, float] = {}
        self._count = self._nonfinite = 0

    def add(self, values: Mapping[str, float]) -> None:
        """Metrics of one step, on the host. A step that was not finite is counted and left out of the means."""
        self._current = {name: values[name] for name in _CURRENT if name in values}
        if not values.get("finite", 1.0):
            self._nonfinite += 1
            return
        self._count += 1
        for name, value in values.items():
            if name != "finite" and name not in _CURRENT:
                self._sums[name] = self._sums.get(name, 0.0) + value

    def waited(self, seconds: float) -> None:
        """Time that the loop stood still for want of data."""
        self._waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is no training (validation, samples): not part of the rates, but of the time left."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._paused += seconds
        self._all_paused += seconds

    def take(self, step: int) -> dict[str, float]:
        """Values of the interval that ends with `step`, and a new interval begins.

        Means of the losses and the gradient norm, then `learning_rate`, `skipped` (in a row), `nonfinite` (of this interval),
        `steps_per_s`, `clips_per_s`, `data_wait` (fraction of the time), `device_peak_gib` or `rss_peak_gib`, `eta_s`, and with a known
        speed `tflops_per_s` (of one device) and `mfu` (fraction of its peak).
        """
        now = time.perf_counter()
        seconds = max(now - self._begin - self._paused, 1e-9)
        values = {name: total / self._count for name, total in self._sums.items()} | self._current
        rate = (step - self._step) / seconds
        values |= {"nonfinite": self._nonfinite, "steps_per_s": rate, "clips_per_s": rate * self._batch_size}
        values["data_wait"] = self._waited / seconds
        used = memory()
        values["device_peak_gib" if used.on_device else "rss_peak_gib"] = used.gib
        whole = max(now - self._started, 1e-9)
        values["eta_s"] = (self.last - step) / max(rate, 1e-9) * whole / max(whole - self._all_paused, 1e-9)
        if self.speed is not None:
            values["tflops_per_s"] = rate * self.speed.flops / self.speed.devices / 1e12
            if self.speed.peak:
                values["mfu"] = values["tflops_per_s"] * 1e12 / self.speed.peak
        self._restart(step)
        return values


def line(step: int, values: Mapping[str, float], meter: Meter) -> str:
    """The values of an interval for a person, at most `LINE_WIDTH` characters; what matters least is left out where they are too many."""
    speed = meter.speed
    known = {"loss", "grad_norm", "nonfinite", "steps_per_s", "clips_per_s", "data_wait", "device_peak_gib", "rss_peak_gib", "eta_s"}
    known |= {"tflops_per_s", "mfu", *_CURRENT}
    parts = [(0, f"{step:>{len(str(meter.last))}}/{meter.last}")]  # (how soon it may go: higher sooner; text)
    if "loss" in values:
        parts.append((0, f"loss {values['loss']:.4g}"))
    others = [name for name in values if name not in known]
    parts += [(2 if i < _TERMS else 10 + i, f"{name} {values[name]:.3g}") for i, name in enumerate(others)]
    if "grad_norm" in values:
        parts.append((8, f"grad {values['grad_norm']:.3g}"))
    if "learning_rate" in values:
        parts.append((9, f"lr {values['learning_rate']:.3g}"))
    if values.get("nonfinite"):
        parts.append((1, f"not finite {values['nonfinite']:.0f}"))
    parts += [(1, f"{values['steps_per_s']:.3g} steps/s"), (5, f"{values['clips_per_s']:.3g} {meter.unit}/s")]
    if "tflops_per_s" in values:
        each = "/chip" if speed is not None and speed.devices > 1 else ""
        parts.append((4, f"{values['tflops_per_s']:.3g} TFLOP/s{each}"))
    if "mfu" in values and speed is not None:
        parts.append((4, f"MFU {values['mfu']:.1%} ({speed.name})"))
    parts.append((1, f"data {values['data_wait']:.0%}"))
    for name, what in (("device_peak_gib", "GiB"), ("rss_peak_gib", "GiB RSS")):
        parts += [(1, f"{values[name]:.3g} {what}")] if name in values else []
    parts.append((0, f"ETA {duration(values['eta_s'])}"))
    while len(text := "  ".join(part for _, part in parts)) > LINE_WIDTH and any(p for p, _ in parts):
        parts.remove(max(parts, key=lambda part: part[0]))
    return text


def duration(seconds: float) -> str:
    """`h:mm:ss`, with days in front where there are any."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"
