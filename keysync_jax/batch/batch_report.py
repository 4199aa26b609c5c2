"""What became of a batch, from its ledger alone: the table, `report.jsonl`, rate and time left."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from keysync_jax.batch.batch_page import page
from keysync_jax.batch.folders import BatchFolder
from keysync_jax.batch.ledger import CLAIMED, DONE, FAILED, FINISHED, OPEN, REVIEW, STATES, Entry, Ledger
from keysync_jax.core.files import write_text

_RECENT = 50  # items over which the rate is taken
_LINES = 40  # of the table; the rest stands in report.jsonl
_WORST_FIRST = (FAILED, REVIEW, CLAIMED, OPEN, DONE)


class Status(NamedTuple):
    """Where a batch stands.

    Attributes:
      counts: items by state.
      per_minute: items finished a minute of late; None before there are two.
      left_s: seconds until the last one at this rate; None where that is not known.
      video_s: seconds of video done.
    """

    counts: dict[str, int]
    per_minute: float | None
    left_s: float | None
    video_s: float

    def __str__(self) -> str:
        total = sum(self.counts.values())
        parts = [f"{self.counts[state]} {state}" for state in STATES if self.counts[state]]
        text = f"{total} items: {', '.join(parts) or 'none'}"
        if self.video_s:
            text += f"; {self.video_s / 60:.1f} min of video"
        if self.per_minute is not None:
            text += f"; {self.per_minute:.1f} items/min"
        return text if self.left_s is None else f"{text}; {_duration(self.left_s)} left"


def status_of(entries: Sequence[Entry]) -> Status:
    """Counts, rate and time left."""
    counts = dict.fromkeys(STATES, 0) | Counter(entry.state for entry in entries)
    ended = sorted(float(entry.result["ended"]) for entry in entries if entry.state in FINISHED and entry.result.get("seconds"))
    recent = ended[-_RECENT:]
    rate = 60 * (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 1 and recent[-1] > recent[0] else None
    left = counts[OPEN] + counts[CLAIMED]
    video = sum(float(entry.result.get("video_seconds") or 0) for entry in entries if entry.state in (DONE, REVIEW))
    return Status(counts, rate, 60 * left / rate if rate and left else None, video)


def rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """The lines of `report.jsonl`, in order of the list."""
    return [_row(entry) for entry in entries]


def _row(entry: Entry) -> dict[str, Any]:
    job, result = entry.item.job, dict(entry.result)
    row: dict[str, Any] = {"id": job.id, "state": entry.state}
    if entry.state == FAILED:
        row["reason"] = result.pop("reason", "unknown")
    if entry.state == REVIEW:
        row["reason"] = "; ".join(result.pop("review", ()))
    row |= {"output": job.output if entry.state in (DONE, REVIEW) else None, "video": job.video, "audio": job.audio}
    row |= {"consent": job.consent, "licence": job.licence, "deaths": entry.deaths}
    ended = result.pop("ended", None)
    if ended is not None:
        row["ended"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ended))
    return row | result | {"recipe": dict(entry.item.recipe)}


def write_reports(folder: BatchFolder, ledger: Ledger) -> tuple[Status, list[Entry]]:
    """`report.jsonl` and `report.html` in the output folder, each replaced in one step.

    Raises:
      KeySyncError: they cannot be written.
    """
    entries = list(ledger.entries())
    lines = rows(entries)
    status = status_of(entries)
    write_text(folder.root / "report.jsonl", "".join(json.dumps(line, ensure_ascii=False, default=str) + "\n" for line in lines))
    ordered = sorted(zip(lines, entries, strict=True), key=lambda each: (_WORST_FIRST.index(each[1].state), each[1].item.position))
    strips = [(line, folder.strip(entry.item.name)) for line, entry in ordered]
    write_text(folder.root / "report.html", page(str(status), strips))
    return status, entries


def table(status: Status, entries: Sequence[Entry], folder: Path) -> str:
    """Counts, then the items that a person has to look at, worst first."""
    bad = [row for row in rows(entries) if row["state"] in (FAILED, REVIEW)]
    bad.sort(key=lambda row: _WORST_FIRST.index(row["state"]))
    width = min(40, max((len(row["id"]) for row in bad), default=0))
    lines = [f"{row['state']:<7} {row['id']:<{width}}  {row['reason']}" for row in bad[:_LINES]]
    if len(bad) > _LINES:
        lines.append(f"and {len(bad) - _LINES} more: {folder / 'report.jsonl'}")
    return "\n".join([*lines, f"{status}; {folder / 'report.html'}"])


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
