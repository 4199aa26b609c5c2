"""What `keysync evaluate --talkers` prints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console

from keysync_jax.core.progress import Bars
from keysync_jax.evaluation import marks
from keysync_jax.evaluation.talkers import marks_of

_EXTRA = (
    ("lag_within_1", "clips with a lag within ± 1 frame"),
    ("lag_missing", "clips in which no lag can be measured"),
    ("roughness", "roughness of the opening (truth 1)"),
    ("flicker", "flicker of the mask's pixels (truth 1)"),
    ("seam_flicker", "the same where windows meet (truth 1)"),
    ("input_leak", "weight of the input's opening (copy 1)"),
    ("silence_leak", "the same under silence (copy 1)"),
    ("found", "frames in which a mouth is seen"),
)


@contextlib.contextmanager
def progress(label: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """How much of one job is done, with the time left."""
    with Bars(quiet) as bars:
        task = bars.add_task(label, total=total)
        yield lambda: bars.advance(task)


def show_talkers(report: dict[str, Any]) -> None:
    """Figures beside marks and baselines; the copied input and the loudness meter must miss, the truth must pass."""
    test = report["test"]
    title = (
        f"{test['clips']} held-out talkers ({test['split']}), {test['seconds']:g} s each, other people's voices; "
        f"guidance {report['guidance']}; mean over clips ± its standard error"
    )
    extra = [row for row in _EXTRA if row[0] in report["columns"]["output"]]
    marks.show(title, marks_of(report), report["columns"], extra)
    console = Console()
    if test["mode"] == "keyframes":
        console.print("[dim]output: only frames where keyframes stand; the other columns: all frames[/dim]", highlight=False)
    console.print(_verdict(report), highlight=False)


def show_vae(report: dict[str, Any]) -> None:
    """The gate's two figures."""
    title = f"autoencoder on {report['test']['clips']} held-out talkers; mean over clips ± its standard error"
    marks.show(title, marks_of(report), report["columns"], [("pixel_error", "mean absolute error, of 255"), _EXTRA[-1]])
    Console().print(_verdict(report), highlight=False)


def show_grid(reports: Sequence[dict[str, Any]]) -> None:
    """One column per guidance, and the one with the best correlation of the opening."""
    test = reports[0]["test"]
    columns = {report["guidance"]: report["columns"]["output"] for report in reports}
    title = f"guidance audio/identity on {test['clips']} {test['split']} talkers; mean over clips ± its standard error"
    wanted = [mark for mark in marks_of(reports[0]) if mark not in marks.MEASURER]
    marks.show(title, wanted, columns, [row for row in _EXTRA if row[0] in reports[0]["columns"]["output"]])
    best = max(reports, key=lambda report: report["columns"]["output"]["opening_r"] or -1.0)
    console = Console()
    console.print(f"best correlation of the opening: {best['guidance']}", highlight=False)


def _verdict(report: dict[str, Any]) -> str:
    rows = report["marks"]
    missed, unknown = ([row["label"] for row in rows if row["passed"] is verdict] for verdict in (False, None))
    parts = [f"{len(missed)} of {len(rows)} marks are missed: {'; '.join(missed)}"] if missed else []
    if not missed:
        parts.append(f"{len(rows) - len(unknown)} of {len(rows)} marks are met" if unknown else f"all {len(rows)} marks are met")
    if unknown:
        parts.append(f"not measured: {'; '.join(unknown)}")
    if report["undecided"]:
        parts.append(report["undecided"])
    return f"{'; '.join(parts)} ({report['seconds']:.0f} s)"
