"""What a figure must reach, and figures beside their marks as JSON and as a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Mark:
    """A bound on one figure.

    Attributes:
      key: the figure's name in JSON.
      label: what a person reads.
      bound: the number.
      at_most: the figure must not exceed the bound, in absolute value; otherwise it must reach it.
      valid: a check of the measurement rather than of the model.
    """

    key: str
    label: str
    bound: float
    at_most: bool = False
    valid: bool = False

    def passed(self, value: float | None) -> bool:
        """Whether a figure meets the mark; one that could not be taken does not."""
        if value is None or not math.isfinite(value):
            return False
        return abs(value) <= self.bound if self.at_most else value >= self.bound

    def met(self, figures: Mapping[str, float | None]) -> bool | None:
        """Whether the mark is met; None where the figure was not asked for (its key is missing).

        A clip that should have the figure and has none (counted as `key_missing`) misses the mark, whatever the mean of the others.
        """
        if self.key not in figures:
            return None
        return self.passed(figures[self.key]) and not figures.get(f"{self.key}_missing")

    @property
    def text(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


# What the marks were set for: means over so many clips and more of that length, cross-sync, held-out faces and voices.
CLIPS, SILENT_CLIPS, SECONDS = 50, 24, 6.0
FOLLOW = (
    Mark("opening_r", "opening: correlation with the truth", 0.80),
    Mark("width_r", "width: correlation with the truth", 0.60),
    Mark("lag", "lag of the opening, frames", 1, at_most=True),
    Mark("closed", "closed where m, b, p are truly closed", 0.80),
    Mark("partial_r", "opening: correlation given loudness", 0.40),
)
SILENCE = (
    Mark("silence_open", "open mouth under silence (or no mouth)", 0.05, at_most=True),
    Mark("silence_input_open", "  the input of these: open mouth", 0.40, valid=True),
)
OUTSIDE = (Mark("outside_change", "change outside the mask, of 255", 0, at_most=True),)
MEASURER = (
    Mark("measurer_opening_r", "measurer on true frames: opening", 0.98, valid=True),
    Mark("measurer_width_r", "measurer on true frames: width", 0.98, valid=True),
)
TALKERS = (*MEASURER, *FOLLOW, *SILENCE, *OUTSIDE)
KEYFRAMES = (*MEASURER, *(mark for mark in FOLLOW if mark.key != "lag"), *OUTSIDE)
VAE = (
    *MEASURER,
    Mark("opening_r", "decoded frames: opening", 0.97),
    Mark("width_r", "decoded frames: width", 0.93),
)


def judge(marks: Sequence[Mark], figures: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """One JSON-ready row per mark: key, bound, direction, figure, verdict (None where the figure was not measured)."""
    return [
        {
            "key": mark.key,
            "label": mark.label.strip(),
            "bound": mark.bound,
            "direction": "at most" if mark.at_most else "at least",
            "figure": number(figures.get(mark.key)),
            "passed": mark.met(figures),
        }
        for mark in marks
    ]


def number(value: float | None, digits: int = 4) -> float | None:
    """A figure for JSON, which has no NaN: None where there is none."""
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def clean(values: Any) -> Any:
    """Nested dicts and lists with every float rounded and every NaN turned into None."""
    if isinstance(values, Mapping):
        return {key: clean(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [clean(value) for value in values]
    return number(values) if isinstance(values, float) else values


def show(
    title: str,
    marks: Sequence[Mark],
    columns: Mapping[str, Mapping[str, float | None]],
    extra: Sequence[tuple[str, str]] = (),
    judged: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Print figures beside their marks.

    Args:
      title: above the table.
      marks: one row each.
      columns: heading -> figures by key; a key that is missing leaves the cell empty, one that every column lacks was not measured.
      extra: (key, label) of figures without a mark, after the others.
      judged: headings whose figures are coloured by their verdict; default all.
      console: default stdout.
    """
    judged = judged or list(columns)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("figure")
    table.add_column("mark", justify="right")
    for heading in columns:
        table.add_column(heading, justify="right")
    for mark in marks:
        cells = [_cell(figures, mark.key, mark if heading in judged else None) for heading, figures in columns.items()]
        table.add_row(mark.label, mark.text, *(cells if any(cells) else ["[yellow]not measured[/yellow]"]))
    if extra:
        table.add_section()
    for key, label in extra:
        table.add_row(label, "", *(_cell(figures, key, None) for figures in columns.values()))
    console = console or Console()
    # Piped into a file there is no width to fit: nothing is cut off.
    console.width = console.width if console.is_terminal else max(console.width, 118)
    console.print(table)


def _cell(figures: Mapping[str, float | None], key: str, mark: Mark | None) -> str:
    if key not in figures:
        return ""
    value = figures[key]
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:.3f}"
    error = figures.get(f"{key}_error")
    if error is not None and math.isfinite(error):
        text += f" ±{error:.3f}"
    if mark is None:
        return text
    return f"[green]{text} ok[/green]" if mark.met(figures) else f"[red]{text} missed[/red]"
