"""Parity harness: runs stored reference tensors through this code base and compares within the stored tolerances.

A *case* is a folder with `case.json` (what was computed and with which configuration), `io.safetensors` (`in.*` inputs, `out.*`
expected outputs, `mid.*` expected intermediates), weights, and sometimes extra JSON files. The reference is the KeySync repository
at commit cfff7cf, run in float32 on a CPU; tensors are in torch's layouts.

A *runner* recomputes one kind of case:

    @runner("guiders")
    def guiders(case: Case) -> dict[str, np.ndarray]:
        return {"out.cfg.y": ...}

Every expected tensor must come back; what is not a tensor in `io.safetensors` is compared through `Case.compare` (numbers) and
`Case.check_equal` / `Case.check` (everything else).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import logging
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.box
import rich.console
import rich.markup
import rich.table
import safetensors
import safetensors.numpy

from keysync_jax.core.errors import KeySyncError, in_one_line
from keysync_jax.core.progress import Bars
from keysync_jax.verify.weights_recipe import recipe_weights

# Every module that registers runners; imported when the first case is run.
_PARTS = (
    *("model", "diffusion", "stage", "audio", "mask", "plan"),
    *("keyface_audio", "keyface_plan", "keyface", "keyface_stage"),
    *("sam2", "sam2_video"),
    *("figure", "metric"),
)
RUNNER_MODULES = tuple(f"keysync_jax.verify.{part}_cases" for part in _PARTS)

# Relative part of the stored tolerances, applied to a tensor that has no tolerance of its own.
DEFAULT_RELATIVE_TOLERANCE = 2e-5

log = logging.getLogger(__name__)


class Comparison(NamedTuple):
    """Outcome of comparing one tensor, or of one check.

    `error` is the largest absolute difference and `tolerance` what is allowed there; `ratio` is the largest error / tolerance
    over all elements (tolerances may differ per step), infinite where no finite number describes the failure.
    """

    name: str
    error: float
    tolerance: float
    ratio: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


class CaseResult(NamedTuple):
    """All comparisons of one case. `reason` says why the case failed as a whole (no runner, an exception, nothing compared)."""

    name: str
    comparisons: tuple[Comparison, ...]
    seconds: float = 0.0
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and bool(self.comparisons) and all(c.ok for c in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        return max(self.comparisons, key=lambda c: c.ratio, default=None)

    @property
    def ratio(self) -> float:
        """Worst error over tolerance; infinite if the case failed as a whole."""
        return self.worst.ratio if self.worst and not self.reason else math.inf


@dataclasses.dataclass
class Case:
    """One stored case.

    Attributes:
      folder: where it lies.
      meta: `case.json`, whole.
      inputs: input arrays, keyed without the `in.` prefix.
      expected: expected arrays with their full names (`out.*`, `mid.*`).
    """

    folder: pathlib.Path
    meta: dict[str, Any]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    comparisons: list[Comparison] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.meta["name"]

    @property
    def config(self) -> dict[str, Any]:
        return self.meta.get("config", {})

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """Torch key -> array in torch's layout, merged over `weights_files` (each may filter by prefix and add one), or by recipe."""
        merged: dict[str, np.ndarray] = {}
        if recipe := self.meta.get("weights_recipe"):
            merged |= recipe_weights(self.json(recipe["file"]))
        for source in self.meta.get("weights_files", ()):
            path = self.folder / source["file"]
            if not path.is_file():
                raise KeySyncError(f"{self.folder}: weights file {path} is missing; keep the cases of a set side by side")
            tensors = safetensors.numpy.load_file(path)
            merged |= {source["add_prefix"] + key: value for key, value in tensors.items() if key.startswith(source["keep_prefix"])}
        return merged

    def json(self, filename: str) -> Any:
        """Content of an extra JSON file of the case."""
        path = self.folder / filename
        if not path.is_file():
            raise KeySyncError(f"{self.folder}: {filename} is missing")
        return json.loads(path.read_text())

    def compare(self, name: str, got: Any, expected: Any, atol: Any = None) -> None:
        """Adds a numeric comparison that is not one of the stored tensors.

        Args:
          name: how to list it.
          got: computed value.
          expected: stored value of the same shape.
          atol: absolute tolerance, a scalar or broadcastable to `expected`; None takes the rule for tensors without an entry.
        """
        expected = np.asarray(expected)
        self.comparisons.append(_compare(name, got, expected, _default_tolerance(expected) if atol is None else atol))

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        """Adds a check that is right or wrong, with what to say if it is wrong."""
        self.comparisons.append(Comparison(name, 0.0, 0.0, 0.0) if ok else _failure(name, detail or "does not hold"))

    def check_equal(self, name: str, got: Any, expected: Any) -> None:
        """Adds an exact comparison of JSON-like values; the first difference is named."""
        difference = _first_difference(got, expected)
        self.check(name, not difference, difference)


Runner = Callable[[Case], dict[str, np.ndarray]]
CASES: dict[str, Runner] = {}


def runner(name: str) -> Callable[[Runner], Runner]:
    """Registers the decorated function as the runner of the cases called `name`."""

    def register(function: Runner) -> Runner:
        if name in CASES and CASES[name].__module__ != function.__module__:
            raise ValueError(f"two runners for case {name!r}: {CASES[name].__module__} and {function.__module__}")
        CASES[name] = function
        return function

    return register


def load_case(folder: str | pathlib.Path) -> Case:
    """Reads a case folder (weights are read when first asked for).

    Raises:
      KeySyncError: there is no readable `case.json`, or `io.safetensors` is damaged or lacks a tensor that is listed there.
    """
    folder = pathlib.Path(folder)
    try:
        meta = json.loads((folder / "case.json").read_text())
    except (OSError, ValueError) as error:
        raise KeySyncError(f"{folder}/case.json cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise KeySyncError(f"{folder}/case.json is not a JSON object")
    meta.setdefault("name", folder.name)
    io = folder / "io.safetensors"
    try:
        tensors = safetensors.numpy.load_file(io) if io.is_file() else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise KeySyncError(f"{io} cannot be read: {error}") from error
    missing = sorted(set(meta.get("tensors", {})) - set(tensors))
    if missing:
        raise KeySyncError(f"{io}: lacks {', '.join(missing[:5])} ({len(missing)} of the tensors listed in case.json)")
    inputs = {key.removeprefix("in."): value for key, value in tensors.items() if key.startswith("in.")}
    expected = {key: value for key, value in tensors.items() if not key.startswith("in.")}
    return Case(folder, meta, inputs, expected)


def run_case(case: Case) -> CaseResult:
    """Recomputes a case and compares it. A case without a runner, or whose runner raises, is a failed result with the reason."""
    _register_runners()
    if case.name not in CASES:
        return CaseResult(case.name, (), reason=f"no runner for case {case.name!r}")
    start = time.perf_counter()
    case.comparisons.clear()
    try:
        with jax.default_matmul_precision("highest"):
            got = CASES[case.name](case)
    except Exception as error:  # one broken case must not hide the others; the reason stands in the table
        log.exception("case %s", case.name)
        return CaseResult(case.name, (), time.perf_counter() - start, in_one_line(error))
    comparisons = [_compare_stored(case, key, got) for key in sorted(case.expected)] + case.comparisons
    reason = "" if comparisons else "nothing was compared"
    return CaseResult(case.name, tuple(comparisons), time.perf_counter() - start, reason)


def run_folder(path: str | pathlib.Path, names: Iterable[str] | None = None, quiet: bool = True) -> list[CaseResult]:
    """Runs the cases in `path` (a folder of case folders, or one case folder), in order of name.

    Args:
      path: where the cases are.
      names: run only these; a name that has no folder gives a failed result.
      quiet: no progress on stderr.

    Raises:
      KeySyncError: `path` is not a folder.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise KeySyncError(f"{path} is not a folder; give a folder of parity cases")
    folders = [path] if (path / "case.json").is_file() else sorted(f.parent for f in path.glob("*/case.json"))
    found = {folder.name: folder for folder in folders}
    wanted = list(found if names is None else names)
    results = []
    with Bars(quiet) as bars:
        task = bars.add_task("cases", total=len(wanted))
        for name in wanted:
            results.append(_run_named(name, found.get(name), path))
            bars.advance(task)
    return results


def _run_named(name: str, folder: pathlib.Path | None, path: pathlib.Path) -> CaseResult:
    if folder is None:
        return CaseResult(name, (), reason=f"no folder {name} with a case.json in {path}")
    try:
        case = load_case(folder)
    except KeySyncError as error:
        return CaseResult(name, (), reason=str(error))
    return run_case(case)


def print_table(results: Iterable[CaseResult], console: rich.console.Console | None = None) -> None:
    """Prints one line per case: how many tensors and checks, the worst error over its tolerance and where, ok or FAIL."""
    console = console or _console()
    table = rich.table.Table("case", box=rich.box.SIMPLE)
    for title in ("tensors", "worst error / tolerance", "seconds"):
        table.add_column(title, justify="right")
    table.add_column("worst tensor", overflow="fold")
    table.add_column("")
    for result in results:
        ratio = f"{result.ratio:.3g}" if math.isfinite(result.ratio) else "-"
        worst = result.reason or (f"{result.worst.name} {result.worst.reason}".strip() if result.worst else "")
        verdict = "[green]ok[/green]" if result.ok else "[red]FAIL[/red]"
        table.add_row(result.name, str(len(result.comparisons)), ratio, f"{result.seconds:.1f}", rich.markup.escape(worst), verdict)
    console.print(table)


def verify(folder: str | pathlib.Path, names: Iterable[str] | None = None) -> int:
    """Runs the cases of a folder and prints the table. Returns the exit status: 0 if every case holds and there is one, else 1.

    Raises:
      KeySyncError: `folder` is not a folder.
    """
    results = run_folder(folder, names, quiet=False)
    console = _console()
    if not results:
        console.print(f"{folder} holds no case (no */case.json); give a folder of parity cases", highlight=False, markup=False)
        return 1
    print_table(results, console)
    failed = [result.name for result in results if not result.ok]
    ratio = max(result.ratio for result in results)
    worst = f"worst error / tolerance {ratio:.3g}" if math.isfinite(ratio) else "some comparisons have no finite error"
    console.print(f"{len(results) - len(failed)} of {len(results)} cases hold, {worst}", highlight=False)
    for result in results:
        bad = [c for c in result.comparisons if not c.ok]
        for comparison in bad[:20]:
            text = comparison.reason or f"error {comparison.error:.3g}, tolerance {comparison.tolerance:.3g}"
            console.print(f"FAIL {result.name} {comparison.name}: {text}", highlight=False, markup=False)
        if len(bad) > 20:
            console.print(f"FAIL {result.name}: {len(bad) - 20} more comparisons failed", highlight=False, markup=False)
    return 1 if failed else 0


def _console() -> rich.console.Console:
    console = rich.console.Console()
    return console if console.is_terminal else rich.console.Console(width=140)  # a log file has no width to fit


@functools.cache
def _register_runners() -> None:
    for module in RUNNER_MODULES:
        importlib.import_module(module)


def _compare_stored(case: Case, key: str, got: Mapping[str, np.ndarray]) -> Comparison:
    """Compares one stored tensor at its stored tolerance."""
    if key not in got:
        return _failure(key, "the runner did not return it")
    expected = case.expected[key]
    tolerances = case.meta.get("tolerances", {}).get("per_tensor", {})
    entry = tolerances.get(key, tolerances.get(key.removeprefix("out.")))
    if entry is None:
        atol = _default_tolerance(expected)
    elif "atol_per_step" in entry:
        steps = np.asarray(entry["atol_per_step"], np.float64)
        if expected.ndim == 0 or len(steps) != len(expected):
            return _failure(key, f"{len(steps)} tolerances for a tensor of shape {expected.shape}")
        atol = steps.reshape(-1, *[1] * (expected.ndim - 1))
    elif entry.get("exact"):
        atol = 0.0
    else:
        atol = entry.get("atol", _default_tolerance(expected))
    return _compare(key, got[key], expected, atol)


def _default_tolerance(expected: np.ndarray) -> float:
    """What a tensor without its own entry is allowed: integers exact, 8-bit video (frames, 3, H, W) +-1, floats by magnitude."""
    if expected.dtype == np.uint8 and expected.ndim >= 4 and expected.shape[-3] == 3:
        return 1.0
    if expected.dtype.kind in "biu":
        return 0.0
    return DEFAULT_RELATIVE_TOLERANCE * float(np.abs(expected).max(initial=0.0))


def _compare(name: str, got: Any, expected: np.ndarray, atol: Any) -> Comparison:
    got = np.asarray(got)
    if got.shape != expected.shape:
        return _failure(name, f"shape {got.shape}, expected {expected.shape}")
    if expected.dtype.kind in "biu" and got.dtype.kind not in "biu":
        return _failure(name, f"type {got.dtype}, expected {expected.dtype}")
    if not np.isfinite(got).all():
        return _failure(name, f"{np.count_nonzero(~np.isfinite(got))} of {got.size} values are not finite")
    if not got.size:
        return Comparison(name, 0.0, 0.0, 0.0)
    error = np.abs(got.astype(np.float64) - expected.astype(np.float64))
    allowed = np.broadcast_to(np.asarray(atol, np.float64), error.shape)
    if not (np.isfinite(error).all() and np.isfinite(allowed).all()):  # such a reference cannot vouch for anything
        return _failure(name, "the stored value or its tolerance is not finite")
    # No error is right at any tolerance, and any error is wrong at tolerance 0.
    ratio = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
    worst = np.unravel_index(np.argmax(ratio), ratio.shape)
    return Comparison(name, float(error[worst]), float(allowed[worst]), float(ratio[worst]))


def _failure(name: str, reason: str) -> Comparison:
    return Comparison(name, math.inf, 0.0, math.inf, reason)


def _first_difference(got: Any, expected: Any, at: str = "value") -> str:
    """Where two JSON-like values first differ ("" if they are equal). Tuples count as lists."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for key in expected:
            if key not in got:
                return f"{at} lacks {key!r}"
        extra = [key for key in got if key not in expected]
        if extra:
            return f"{at} has the unexpected key {extra[0]!r}"
        differences = (_first_difference(got[key], expected[key], f"{at}[{key!r}]") for key in expected)
        return next(filter(None, differences), "")
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        differences = (_first_difference(g, e, f"{at}[{i}]") for i, (g, e) in enumerate(zip(got, expected, strict=False)))
        return next(filter(None, differences), "" if len(got) == len(expected) else f"{at} has {len(got)} items, expected {len(expected)}")
    same = got == expected and isinstance(got, bool) == isinstance(expected, bool)
    return "" if same else f"{at} is {got!r}, expected {expected!r}"
