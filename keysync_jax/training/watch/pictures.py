"""Pictures of a run for people: grids and clips of samples, and the curves of the losses. Everything here is NumPy, Pillow and PyAV."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from keysync_jax.training.watch.metrics import read_metrics

CURVE = "curve.png"
_PAPER, _INK, _TINT = (250, 250, 248), (40, 40, 40), np.array([230, 50, 50], np.float32)
_LEFT, _TOP, _GAP = 92, 44, 3
_MIN_SECONDS = 2.0  # shorter clips are repeated up to this


class Item(NamedTuple):
    """One sample: rows of equally many frames, (label, `[T, H, W, 3]` uint8)."""

    rows: tuple[tuple[str, np.ndarray], ...]


def tint(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """`[T, H, W, 3]` uint8 with the region to regenerate tinted red; masks `[T, h, w, 1]` at the latents' resolution."""
    height, width = (frames.shape[i] // masks.shape[i] for i in (1, 2))
    weight = 0.5 * np.repeat(np.repeat(masks, height, axis=1), width, axis=2)
    return (frames * (1 - weight) + _TINT * weight).astype(np.uint8)


def preview(latents: np.ndarray, like: np.ndarray, side: int = 128) -> np.ndarray:
    """The first three channels of latents `[T, h, w, C]` as colours `[T, S, S, 3]` uint8, S about `side`.

    The range of each channel is that of `like`, so that what is compared has the same colours.
    """
    low, high = (np.percentile(like[..., :3], q, axis=(0, 1, 2)) for q in (1, 99))
    colours = 255 * np.clip((latents[..., :3] - low) / np.maximum(high - low, 1e-6), 0, 1)
    zoom = max(1, side // latents.shape[1])
    return np.repeat(np.repeat(colours.astype(np.uint8), zoom, axis=1), zoom, axis=2)


def grid(title: str, items: Sequence[Item], times: Sequence[float], cell: int = 112) -> np.ndarray:
    """All frames of all items under one another, `[H, W, 3]` uint8, with a title, the seconds of each column and the rows' labels."""
    font = ImageFont.load_default(13)
    rows = [(f"{number + 1}  {label}", frames) for number, item in enumerate(items) for label, frames in item.rows]
    height = round(cell * rows[0][1].shape[1] / rows[0][1].shape[2])
    gaps = _GAP * (len(rows) + 3 * len(items))
    picture = Image.new("RGB", (_LEFT + len(times) * (cell + _GAP), _TOP + len(rows) * height + gaps), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((6, 4), title, _INK, font)
    for column, t in enumerate(times):
        draw.text((_LEFT + column * (cell + _GAP) + 2, _TOP - 18), f"{t:.2f} s", _INK, font)
    y = _TOP
    for number, (label, frames) in enumerate(rows):
        draw.text((6, y + height // 2 - 8), label, _INK, font)
        for column, frame in enumerate(frames):
            picture.paste(Image.fromarray(frame).resize((cell, height), Image.Resampling.LANCZOS), (_LEFT + column * (cell + _GAP), y))
        last_of_item = (number + 1) % len(items[0].rows) == 0
        y += height + _GAP * (4 if last_of_item else 1)
    return np.asarray(picture)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


def clip(items: Sequence[Item], rate: Fraction, rows: Sequence[int] | None = None) -> bytes:
    """An MP4 (H.264): items side by side, their rows (all, or these) under one another; repeated where it is very short."""
    import av

    chosen = range(len(items[0].rows)) if rows is None else rows
    columns = [np.concatenate([item.rows[row][1] for row in chosen], axis=1) for item in items]
    frames = np.concatenate(columns, axis=2)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)))  # H.264 halves the chroma
    times = max(1, round(_MIN_SECONDS * rate / len(frames)))
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "16", "preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in np.concatenate([frames] * times):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    return out.getvalue()


def draw_curve(workdir: epath.PathLike) -> epath.Path | None:
    """Draws the training and validation losses of metrics.jsonl into WORKDIR/curve.png; None where there is nothing to draw yet."""
    rows = read_metrics(workdir)
    left = {"loss": "training", "val/loss": "validation", "val_ema/loss": "validation, averaged weights"}
    first = next((row for row in reversed(rows.values()) if "val/loss" in row), {})
    prefix = "val_ema/" if "val_ema/loss" in first else "val/"
    levels = [name for name in first if name.startswith(f"{prefix}loss_sigma_")]
    right = {name: f"σ {name.rpartition('_')[2]}" for name in levels}
    heading = "validation at each noise level"
    if not levels:  # an autoencoder: its terms instead
        right = {name: name.removeprefix(prefix) for name in first if name.startswith(prefix) and name != f"{prefix}loss"}
        heading = "validation, terms of the loss"
    if not any(name in row for row in rows.values() for name in left):
        return None

    from matplotlib.figure import Figure  # a second to import; no pyplot, which has global state

    figure = Figure(figsize=(12 if right else 6.5, 4), layout="constrained")
    for axes, names, title in zip(figure.subplots(1, 2 if right else 1, squeeze=False)[0], (left, right), ("loss", heading), strict=False):
        for name, label in names.items():
            points = [(step, row[name]) for step, row in rows.items() if row.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="" if name == "loss" else "o", markersize=3, linewidth=1)
        axes.set(title=title, xlabel="step", yscale="log")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    out: Any = io.BytesIO()
    figure.savefig(out, dpi=110)
    path = epath.Path(workdir) / CURVE
    path.write_bytes(out.getvalue())
    return path
