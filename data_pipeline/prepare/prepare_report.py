"""What a run kept and why: figures for one HTML page and the same as JSON.

The tables follow the paper's Tables 5 and 6 (videos, clips, speakers, mean length and hours before and after curation) and add what
each stage and reason cost.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.prepare import scorers
from keysync_jax.data_pipeline.prepare import work_state as state
from keysync_jax.data_pipeline.prepare.groups import FeaturePlan
from keysync_jax.data_pipeline.prepare.item import Drop, Item
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.prepare.work import Entry, write_text
from keysync_jax.data_pipeline.prepare.work_state import Folders

_CONTACT_CLIPS = 60  # of each kind on the contact sheet
_BINS = 20

STAGES = ("input", "probe", "quality", "shots", "faces", "checks", "active_speaker", "sync", "features")


@dataclasses.dataclass(frozen=True)
class Report:
    """Figures of a run; `pictures` are (title, caption, JPEG bytes, kept) of the contact sheet."""

    figures: dict[str, Any]
    pictures: list[tuple[str, str, bytes, bool]]

    def write(self, output: str | os.PathLike) -> None:
        """Write `report.json` and `report.html` into the dataset directory."""
        from keysync_jax.data_pipeline.prepare.report_html import page

        write_text(epath.Path(output) / "report.json", json.dumps(self.figures, indent=1, sort_keys=True, allow_nan=False) + "\n")
        pictures = [(title, words, base64.b64encode(data).decode(), kept) for title, words, data, kept in self.pictures]
        write_text(epath.Path(output) / "report.html", page(self.figures, pictures))


def build_report(
    items: Sequence[Item], analyses: Mapping[str, Entry | None], dropped: Sequence[Drop], folders: Folders, plan: FeaturePlan,
    curation: Curation, target: Output, seconds: float,
) -> Report:  # fmt: skip
    """Figures from the work folder and the dataset."""
    clips = layout.read_clips(folders.output) if (epath.Path(folders.output) / layout.INDEX_FILE).exists() else []
    figures = {
        "inputs": _inputs(items, analyses),
        "dataset": _dataset(clips),
        "dropped": _dropped(dropped),
        "funnel": _funnel(items, analyses, dropped),
        "scorers": scorers.in_words(curation.scorers),
        "histograms": _histograms(clips),
        "work": _work(items, analyses, folders),
        "columns": _columns(folders, plan),
        "settings": {"curation": dataclasses.asdict(curation), "output": dataclasses.asdict(target), "model": plan.model},
        "run_seconds": round(seconds, 1),
    }
    return Report(figures, _contact_sheet(items, analyses, dropped, clips))


def _inputs(items: Sequence[Item], analyses: Mapping[str, Entry | None]) -> dict[str, Any]:
    """Before curation, by source: videos, speakers stated, hours readable (paper Table 5)."""
    rows: dict[str, dict[str, Any]] = {}
    speakers: dict[str, set[str]] = defaultdict(set)
    for item in items:
        row = rows.setdefault(item.source or "(no source)", {"videos": 0, "readable": 0, "speakers": 0, "hours": 0.0})
        entry = analyses.get(item.id)
        length = entry.values["facts"].get("seconds", 0.0) if entry else 0.0
        row["videos"] += 1
        row["readable"] += bool(length)
        row["hours"] += length / 3600
        speakers[item.source or "(no source)"].add(item.speaker or item.name)
    for source, row in rows.items():
        row["speakers"] = len(speakers[source])
        row["mean_seconds"] = round(row["hours"] * 3600 / max(1, row["readable"]), 2)
        row["hours"] = round(row["hours"], 4)
    return rows


def _dataset(clips: Sequence[Clip]) -> dict[str, Any]:
    """After curation, by source and by split (paper Table 6)."""
    out: dict[str, Any] = {"by_source": {}, "by_split": {}}
    for kind, name in (("by_source", "source"), ("by_split", "split")):
        for value in sorted({getattr(c, name) for c in clips}):
            own = [c for c in clips if getattr(c, name) == value]
            frames = sum(c.num_frames for c in own)
            out[kind][value or "(no source)"] = {
                "clips": len(own), "videos": len({c.video for c in own}), "speakers": len({c.speaker_key for c in own}),
                "hours": round(frames / FRAME_RATE / 3600, 4), "mean_seconds": round(frames / FRAME_RATE / len(own), 2),
                "keyframe_clips": sum(c.num_frames >= 171 for c in own),
            }  # fmt: skip
    return out


def _dropped(dropped: Sequence[Drop]) -> list[dict[str, Any]]:
    """Per stage and reason: videos that went whole, clips, hours."""
    table: dict[tuple[str, str], list[Drop]] = defaultdict(list)
    for drop in dropped:
        table[drop.stage, drop.reason].append(drop)
    order = {stage: i for i, stage in enumerate(STAGES)}
    return [
        {
            "stage": stage, "reason": reason, "videos": sum(not d.clip for d in drops), "clips": sum(bool(d.clip) for d in drops),
            "hours": round(sum(d.seconds for d in drops) / 3600, 4),
        }
        for (stage, reason), drops in sorted(table.items(), key=lambda kv: (order.get(kv[0][0], 99), kv[0][1]))
    ]  # fmt: skip


def _funnel(items: Sequence[Item], analyses: Mapping[str, Entry | None], dropped: Sequence[Drop]) -> list[dict[str, Any]]:
    """Hours left after each stage."""
    total = sum((a.values["facts"].get("seconds", 0.0) if a else 0.0) for a in analyses.values())
    # What probing drops is not among the readable hours unless the whole video had been read.
    lost_early = sum(d.seconds for d in dropped if d.stage == "probe" and not d.clip)
    left = total + lost_early
    rows = [{"stage": "input", "hours": round(left / 3600, 4), "dropped_hours": 0.0}]
    for stage in STAGES:
        gone = sum(d.seconds for d in dropped if d.stage == stage)
        left -= gone
        rows.append({"stage": stage, "hours": round(max(0.0, left) / 3600, 4), "dropped_hours": round(gone / 3600, 4)})
    return rows


def _histograms(clips: Sequence[Clip]) -> dict[str, Any]:
    values: dict[str, list[float]] = {"length (s)": [c.num_frames / FRAME_RATE for c in clips]}
    for clip in clips:
        for name, value in clip.scores.items():
            values.setdefault(name, []).append(float(value))
    out = {}
    for name, numbers in values.items():
        if numbers:
            counts, edges = np.histogram(numbers, bins=_BINS)
            out[name] = {
                "counts": counts.tolist(), "edges": [round(float(e), 6) for e in edges], "mean": round(float(np.mean(numbers)), 4),
                "median": round(float(np.median(numbers)), 4), "clips": len(numbers),
            }  # fmt: skip
    return out


def _work(items: Sequence[Item], analyses: Mapping[str, Entry | None], folders: Folders) -> dict[str, Any]:
    """Seconds of work per stage, clips per minute of work, and the largest memory of any worker."""
    seconds: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    clips = videos = 0
    for item in items:
        entry = analyses.get(item.id)
        if entry is None:
            continue
        videos += 1
        clips += len(entry.values["candidates"])
        facts = entry.values["facts"]
        for stage, value in facts.get("seconds_per_stage", {}).items():
            seconds[stage] += value
        memory["curate"] = max(memory["curate"], facts.get("peak_memory_mb", 0.0))
        encoded = folders.encoded.load(item.id)
        if encoded is not None:
            for stage, value in encoded.values["seconds"].items():
                seconds[f"features: {stage}"] += value
            memory["encode"] = max(memory["encode"], encoded.values["peak_memory_mb"])
    written = 0
    for name in folders.shard_times.names():
        entry = folders.shard_times.load(name)
        if entry is not None:
            seconds["write shards"] += entry.values["seconds"]
            written += entry.values["bytes"]
            memory["write"] = max(memory["write"], entry.values["peak_memory_mb"])
    stages = {
        name: {"seconds": round(value, 2), "clips_per_minute": round(60 * clips / value, 1) if value > 0.01 else None}
        for name, value in seconds.items()
    }
    return {"videos": videos, "clips": clips, "stages": stages, "peak_memory_mb": dict(memory), "shard_megabytes": round(written / 1e6, 3)}


def _columns(folders: Folders, plan: FeaturePlan) -> list[dict[str, Any]]:
    rows = []
    for group in plan.groups:
        directory = group.directory(folders.output)
        if not (directory / layout.SUCCESS_FILE).exists():
            continue
        held = layout.read_group(directory)
        size = sum(s.bytes for s in held.shards)
        records = sum(s.num_records for s in held.shards)
        rows.append(
            {
                "group": group.name, "columns": [c.name for c in held.group.columns], "shards": len(held.shards), "records": records,
                "megabytes": round(size / 1e6, 3), "bytes_per_frame": round(size / max(1, records), 1), "info": dict(held.group.info),
            }
        )  # fmt: skip
    return rows


def _contact_sheet(
    items: Sequence[Item], analyses: Mapping[str, Entry | None], dropped: Sequence[Drop], clips: Sequence[Clip]
) -> list[tuple[str, str, bytes, bool]]:
    """Thumbnails of kept and dropped clips, evenly picked when there are many."""
    kept, gone = [], []
    reasons = {d.clip or d.item: d for d in dropped}
    index = {c.id: c for c in clips}
    for item in items:
        entry = analyses.get(item.id)
        if entry is None:
            continue
        for name in sorted(entry.arrays):
            if not name.startswith("thumbnail."):
                continue
            clip = name.removeprefix("thumbnail.")
            picture = state.thumbnail(entry, clip)
            if clip in reasons:
                gone.append((clip, f"{reasons[clip].reason}: {reasons[clip].detail}", picture, False))
            elif clip in index:
                kept.append((clip, f"{index[clip].num_frames / FRAME_RATE:.1f} s, {index[clip].split}", picture, True))
    return [*_spread(kept), *_spread(gone)]


def _spread(rows: list) -> list:
    if len(rows) <= _CONTACT_CLIPS:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, _CONTACT_CLIPS).round().astype(int)]
