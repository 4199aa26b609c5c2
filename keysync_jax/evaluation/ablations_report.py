"""The ablations' results for people: Markdown tables, differences clip by clip, and the curves of the training losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import write_atomically
from keysync_jax.evaluation.lip_metrics import mean_and_error
from keysync_jax.training.watch.metrics import read_metrics

Report = Mapping[str, Any]  # of `talkers.evaluate`
_MASK_FIGURES = ("silence_open", "silence_leak", "input_leak", "opening_r", "width_r")
_STAGE_FIGURES = ("flicker", "seam_flicker", "roughness", "opening_r", "width_r")
_GUIDANCE_FIGURES = ("opening_r", "width_r", "closed", "partial_r", "silence_open")
# What the paper chose and what was chosen for the bundled model against plain guidance and against none.
_GUIDANCE_PAIRS = (("5/2", "2/2"), ("2.5/1.5", "2/2"), ("5/2", "1/1"), ("2.5/1.5", "1/1"))
_NAMES = {
    "silence_open": "open under silence", "silence_leak": "weight of the input's mouth: under silence",
    "input_leak": "… under another voice",
    "opening_r": "opening", "width_r": "width", "closed": "closed at m, b, p", "partial_r": "opening given loudness",
    "flicker": "flicker of the pixels", "seam_flicker": "… where windows meet", "roughness": "roughness of the opening",
}  # fmt: skip


class Difference(NamedTuple):
    """One row minus another, clip by clip."""

    mean: float
    error: float
    higher: int
    lower: int
    clips: int

    @property
    def text(self) -> str:
        return f"{_with_error(f'{self.mean:+.3f}', self.error)} ({self.higher} higher, {self.lower} lower)"


def difference(a: Report, b: Report, key: str) -> Difference:
    """`a` minus `b` in one figure over the clips that both have: mean, its standard error, and in how many it is higher and lower."""
    one, two = _per_clip(a, key), _per_clip(b, key)
    values = [one[clip] - two[clip] for clip in sorted(one.keys() & two.keys())]
    if not values:
        raise KeySyncError(f"no clip has the figure {key} on both sides")
    mean, error = mean_and_error(values)
    return Difference(mean, error, sum(v > 0 for v in values), sum(v < 0 for v in values), len(values))


def _per_clip(report: Report, key: str) -> dict[int, float]:
    silent = {"silence_open": "open", "silence_leak": "leak"}
    rows, name = (report["silence"]["per_clip"], silent[key]) if key in silent else (report["per_clip"], key)
    return {row["clip"]: row[name] for row in rows if row.get(name) is not None}


def tables(found: Mapping[str, Sequence[Report]], labels: Mapping[str, str]) -> str:
    """What was measured as Markdown: mask, stages, guidance; a table whose rows are not all there is left out.

    Args:
      found: reports by name of the row ("box", "mouth", "one_stage", "two_stages"), one for each guidance.
      labels: what a person reads, by name.
    """
    out = []
    if {"box", "mouth"} <= found.keys():
        rows = [(labels[name], report) for name in ("box", "mouth") for report in found[name] if report["guidance"] in ("1/1", "2.5/1.5")]
        rows.sort(key=lambda row: row[1]["guidance"])
        out.append(_table("keyframes", rows, _MASK_FIGURES, _every_second("mouth alone minus box", rows)))
    if {"one_stage", "two_stages"} <= found.keys():
        rows = [(labels[name], report) for name in ("two_stages", "one_stage") for report in found[name]]
        out.append(_table("whole dubs", rows, _STAGE_FIGURES, _every_second("one stage minus two", rows)))
    if "box" in found:
        reports = {report["guidance"]: report for report in found["box"]}
        minus = [Minus("clip by clip", f"{a} minus {b}", reports[a], reports[b]) for a, b in _GUIDANCE_PAIRS if {a, b} <= reports.keys()]
        out.append(_table("keyframes, box", [(labels["box"], report) for report in found["box"]], _GUIDANCE_FIGURES, minus))
    return "\n".join(out)


class Minus(NamedTuple):
    """A row of differences: one report minus another, clip by clip."""

    label: str
    guidance: str
    report: Report
    other: Report


def _every_second(label: str, rows: Sequence[tuple[str, Report]]) -> list[Minus]:
    """Each second row minus the one before it."""
    pairs = zip(rows[::2], rows[1::2], strict=False)
    return [Minus(f"{label}, clip by clip", second["guidance"], second, first) for (_, first), (_, second) in pairs]


def _table(title: str, rows: Sequence[tuple[str, Report]], keys: Sequence[str], differences: Sequence[Minus] = ()) -> str:
    clips = rows[0][1]["test"]["clips"]
    lines = [f"| {title}, {clips} clips | guidance | {' | '.join(_NAMES[key] for key in keys)} |", "| --- " * (2 + len(keys)) + "|"]
    for label, report in rows:
        output = report["columns"]["output"]
        values = ("–" if output.get(key) is None else _with_error(f"{output[key]:.3f}", output[f"{key}_error"]) for key in keys)
        lines.append(f"| {label} | {report['guidance']} | {' | '.join(values)} |")
    for minus in differences:
        cells = (difference(minus.report, minus.other, key).text for key in keys)
        lines.append(f"| {minus.label} | {minus.guidance} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_error(text: str, error: float | None) -> str:
    return text if error is None or not math.isfinite(error) else f"{text} ± {error:.3f}"  # one clip has no error


def draw_curves(folder: Path, names: Sequence[str]) -> Path:
    """Training loss of the runs over steps, on one pair of axes, as `folder/curves.png`."""
    from matplotlib.figure import Figure  # takes long to import, and only pictures need it

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(step, row["loss"]) for step, row in read_metrics(folder / name).items() if row.get("loss") is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    if axes.lines:  # none where the runs were too short for a row
        axes.legend()
    write_atomically(folder / "curves.png", lambda partial: figure.savefig(partial, dpi=110))
    return folder / "curves.png"
