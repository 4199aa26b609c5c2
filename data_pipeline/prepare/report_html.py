"""The report as one HTML page: no script, no file beside it, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fafaf8;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.6em 0}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #e4e4e0}
th{color:#666;font-weight:600}td:first-child,th:first-child,.words{text-align:left}
.bar{display:inline-block;height:.8em;background:#3c6eaa;vertical-align:middle}.off{color:#a33}
.hist{display:inline-block;margin:.4em 1.2em .4em 0;vertical-align:top}.hist text{font-size:10px;fill:#555}
.sheet{display:flex;flex-wrap:wrap;gap:8px}figure{margin:0;width:104px;font-size:10px;line-height:1.25;overflow-wrap:anywhere}
figure img{width:96px;min-height:30px;border:3px solid #4a9a5a;border-radius:3px}figure.gone img{border-color:#c04a4a}
code{background:#eee;padding:0 .3em}
"""


def page(figures: dict[str, Any], pictures: Sequence[tuple[str, str, str, bool]]) -> str:
    """The page's text.

    Args:
      figures: see `report.build_report`.
      pictures: (clip, caption, base64 JPEG, kept).
    """
    kept = sum(row["clips"] for row in figures["dataset"]["by_source"].values())
    hours = sum(row["hours"] for row in figures["dataset"]["by_source"].values())
    videos = sum(row["videos"] for row in figures["inputs"].values())
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Data preparation report</title>",
        f"<style>{_STYLE}</style></head><body><h1>What was kept and why</h1>",
        f"<p><b>{kept}</b> clips, <b>{_length(hours)}</b> in the dataset; {videos} videos in this run's input; "
        f"{figures['run_seconds']:.0f} s of this run. Every dropped file and clip with its reason: <code>dead_letter.jsonl</code>.</p>",
        "<h2>Before curation</h2>", _table(figures["inputs"], "source"),
        "<h2>After curation</h2>", _table(figures["dataset"]["by_source"], "source"), _table(figures["dataset"]["by_split"], "split"),
        "<p>Keyframe clips: long enough (171 frames) for the keyframe stage at its full spacing.</p>",
        "<h2>Learned scorers</h2><ul>", *(_scorer(words) for words in figures["scorers"].values()), "</ul>",
        "<h2>Hours left after each stage</h2>", _funnel(figures["funnel"]),
        "<h2>Dropped, by stage and reason</h2>", _rows(figures["dropped"]) if figures["dropped"] else "<p>Nothing was dropped.</p>",
        "<h2>Kept clips</h2>", *(_histogram(name, h) for name, h in figures["histograms"].items()),
        "<h2>Columns</h2>", _rows([{k: v for k, v in row.items() if k != "info"} for row in figures["columns"]]),
        "<h2>Work</h2>", _work(figures["work"]),
        "<h2>Contact sheet: kept</h2>", _sheet(p for p in pictures if p[3]),
        "<h2>Contact sheet: dropped</h2>", _sheet(p for p in pictures if not p[3]),
        "<h2>Settings</h2>", _settings(figures["settings"]),
        "</body></html>\n",
    ]  # fmt: skip
    return "\n".join(parts)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return escape(", ".join(str(v) for v in value))
    return escape(f"{value:g}" if isinstance(value, float) else "–" if value is None else str(value))


def _length(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.2f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"


def _table(rows: dict[str, dict[str, Any]], first: str) -> str:
    return _rows([{first: name, **row} for name, row in rows.items()])


def _rows(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<p>None.</p>"
    wordy = {name for name in rows[0] if any(isinstance(row[name], (str, list, tuple)) for row in rows)}
    css = {name: " class=words" if name in wordy else "" for name in rows[0]}
    head = "".join(f"<th{css[name]}>{escape(name.replace('_', ' '))}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td{css[name]}>{_cell(v)}</td>" for name, v in row.items()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _scorer(words: str) -> str:
    return f"<li{' class=off' if ': OFF' in words else ''}>{escape(words)}</li>"


def _funnel(rows: Sequence[dict[str, Any]]) -> str:
    top = max((row["hours"] for row in rows), default=0.0) or 1.0
    lines = "".join(
        f"<tr><td>{escape(row['stage'])}</td><td>{row['hours']:.4f}</td><td>{row['dropped_hours']:.4f}</td>"
        f"<td style='text-align:left'><span class=bar style='width:{300 * row['hours'] / top:.0f}px'></span></td></tr>"
        for row in rows
    )
    return f"<table><tr><th>stage</th><th>hours left</th><th>dropped</th><th></th></tr>{lines}</table>"


def _histogram(name: str, histogram: dict[str, Any]) -> str:
    counts, edges = histogram["counts"], histogram["edges"]
    top = max(counts) or 1
    bars = "".join(
        f"<rect x='{i * 11}' y='{80 - 78 * c / top:.1f}' width='10' height='{78 * c / top:.1f}' fill='#3c6eaa'><title>{edges[i]:g} to "
        f"{edges[i + 1]:g}: {c}</title></rect>"
        for i, c in enumerate(counts)
    )
    return (
        f"<div class=hist><b>{escape(name)}</b> median {histogram['median']:g}<br><svg width='{len(counts) * 11}' height='95'>{bars}"
        f"<text x='0' y='93'>{edges[0]:.4g}</text><text x='{len(counts) * 11}' y='93' text-anchor='end'>{edges[-1]:.4g}</text></svg></div>"
    )


def _work(work: dict[str, Any]) -> str:
    memory = ", ".join(f"{name} {value:g} MB" for name, value in work["peak_memory_mb"].items())
    return (
        f"<p>{work['videos']} videos, {work['clips']} clips; {work['shard_megabytes']:g} MB of shards written; largest memory of a worker: "
        f"{escape(memory)}. Work that was found finished counts with the time it once took.</p>{_table(work['stages'], 'stage')}"
    )


def _sheet(pictures: Iterable[tuple[str, str, str, bool]]) -> str:
    figures = "".join(
        f"<figure class={'kept' if kept else 'gone'}><img alt='' src='data:image/jpeg;base64,{data}'>{escape(clip)}<br>{escape(words)}"
        "</figure>"
        for clip, words, data, kept in pictures
    )
    return f"<div class=sheet>{figures}</div>" if figures else "<p>None.</p>"


def _settings(settings: dict[str, Any]) -> str:
    rows = [{"setting": "model", "value": settings["model"]}]
    for part in ("curation", "output"):
        rows += [{"setting": f"{part}.{name}", "value": str(value)} for name, value in settings[part].items()]
    return _rows(rows)
