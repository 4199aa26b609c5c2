"""The page of a batch: no script, no file beside it, nothing fetched."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fafaf8;max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.4em}article{border-top:1px solid #ddd;padding:.6em 0}img{max-width:100%;display:block;margin:.3em 0}
b.failed{color:#a33}b.review{color:#a60}b.done{color:#383}.id{font-weight:600;margin-left:.6em}.why{margin:.1em 0}
.figures{color:#555;font-size:13px}.figures span{margin-right:1.2em;white-space:nowrap}.off{color:#a60;font-weight:600}
"""


def page(status: str, items: Iterable[tuple[Mapping[str, Any], Path]]) -> str:
    """The page's text.

    Args:
      status: the line above all.
      items: lines of the report, worst first, each with the place of its thumbnails, which need not exist.
    """
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>keysync batch</title>",
        f"<style>{_STYLE}</style></head><body><h1>Batch</h1><p>{escape(status)}</p>",
        *(_item(row, strip) for row, strip in items),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _item(row: Mapping[str, Any], strip: Path) -> str:
    state = str(row["state"])
    words = [f"<b class={escape(state)}>{escape(state)}</b><span class=id>{escape(str(row['id']))}</span>"]
    if row.get("output"):
        words.append(f" → {escape(str(row['output']))}")
    text = f"<div>{''.join(words)}</div>"
    if row.get("reason"):
        text += f"<p class=why>{escape(str(row['reason']))}</p>"
    try:
        text += f"<img alt='' loading=lazy src='data:image/jpeg;base64,{base64.b64encode(strip.read_bytes()).decode()}'>"
    except FileNotFoundError:
        pass
    return f"<article>{text}<div class=figures>{''.join(_figures(row))}</div></article>"


def _figures(row: Mapping[str, Any]) -> Iterable[str]:
    for name in ("video_seconds", "seconds", "frames", "frames_dubbed", "microbatch", "attempts"):
        if row.get(name) is not None:
            yield _figure(name, row[name])
    missed = set(row.get("missed") or ())
    for name, value in (row.get("figures") or {}).items():
        yield _figure(name, value, name in missed)
    for reason, frames in (row.get("skipped") or {}).items():
        yield _figure(f"kept as they are, {reason}", f"{frames} frames")
    for note in row.get("notes") or ():
        yield f"<div>{escape(str(note))}</div>"
    for name in ("consent", "licence"):
        if row.get(name):
            yield _figure(name, row[name])


def _figure(name: str, value: Any, off: bool = False) -> str:
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"<span{' class=off' if off else ''}>{escape(name.replace('_', ' '))} {escape(shown)}</span>"
