"""`keysync data inspect`: what a dataset holds, and one clip as a picture strip with mask and waveform."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from keysync_jax.config import MaskConfig
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.records import JPEG, LANDMARKS, LATENT, SOUND
from keysync_jax.data_pipeline.source.clips import FrameStore

_STRIP_FRAMES = 8
_WIDEST = 10_000  # characters of a line that goes to a file
_DRAWN_SIDE = 384  # pixels of a picture on which landmarks are drawn


def summary(root: str | os.PathLike) -> dict[str, Any]:
    """Figures of a finished dataset: splits, columns, scores, terms, landmark networks.

    Raises:
      KeySyncError: no finished dataset there.
    """
    store = FrameStore(root)
    splits = {}
    for name in sorted({c.split for c in store.clips}):
        own = [c for c in store.clips if c.split == name]
        frames = sum(c.num_frames for c in own)
        splits[name] = {
            "clips": len(own), "speakers": len({c.speaker_key for c in own}), "frames": frames,
            "hours": round(frames / FRAME_RATE / 3600, 4),
            "shortest": min(c.num_frames for c in own), "longest": max(c.num_frames for c in own),
            "keyframe_clips": sum(c.num_frames >= 171 for c in own),
        }  # fmt: skip
    columns = []
    for name, group_file in store.groups.items():
        size = sum(s.bytes for s in group_file.shards)
        for column in group_file.group.columns:
            columns.append(
                {
                    "column": column.name, "type": f"{column.dtype}{list(column.shape)}", "group": name, "shards": len(group_file.shards),
                    "group_megabytes": round(size / 1e6, 2),
                }
            )  # fmt: skip
    scores: dict[str, list[float]] = {}
    for clip in store.clips:
        for name, value in clip.scores.items():
            scores.setdefault(name, []).append(value)
    measured = {name: {"clips": len(v), "min": min(v), "median": float(np.median(v)), "max": max(v)} for name, v in sorted(scores.items())}
    terms: dict[str, int] = {}
    for clip in store.clips:
        key = f"source {clip.source or '?'}, licence {clip.licence or '?'}, consent {clip.consent or '?'}"
        terms[key] = terms.get(key, 0) + 1
    faces = Counter(clip.extra.get("faces", "not recorded") for clip in store.clips)
    return {
        "path": os.fspath(root), "crop": list(store.crop_size), "splits": splits, "columns": columns, "scores": measured, "terms": terms,
        "faces": dict(sorted(faces.items())),
        "info": {name: dict(g.group.info) for name, g in store.groups.items()},
    }  # fmt: skip


def describe_clip(root: str | os.PathLike, clip_id: str) -> dict[str, Any]:
    """Everything the index says about a clip."""
    return {**vars(_find(FrameStore(root), clip_id))}


def draw_clip(root: str | os.PathLike, clip_id: str, output: str | os.PathLike, mask: MaskConfig | None = None) -> None:
    """Write a PNG strip of a clip: frames, the same with landmarks and the mask as it will be read, a latent channel, and the sound.

    The sound is the whole clip's waveform from the column "samples", scaled to its loudest sample; without that column it is left out.

    Args:
      clip_id: a clip's id, or the beginning of one that no other shares.
      output: PNG file.
      mask: kind of mask; the paper's box by default.

    Raises:
      KeySyncError: no such clip, or the dataset has neither pictures nor latents.
    """
    path = epath.Path(output)
    if path.suffix.lower() != ".png":
        raise KeySyncError(f"{path} must be a .png file")
    store = FrameStore(root)
    clip = _find(store, clip_id)
    numbers = np.unique(np.linspace(0, clip.num_frames - 1, _STRIP_FRAMES).round().astype(int)).tolist()
    frames = _pictures(store, clip, numbers)
    landmarks = np.stack(store.read(clip, numbers, [LANDMARKS])[LANDMARKS])
    latents = np.stack(store.read(clip, numbers, [LATENT])[LATENT]).astype(np.float32)
    from keysync_jax.data_pipeline.source.latent_masks import latent_masks
    from keysync_jax.media.landmarks import draw
    from keysync_jax.media.strip import draw_strip

    size = store.crop_size
    cells = latent_masks(landmarks, size, latents.shape[1:3], mask or MaskConfig())[..., 0]
    factor = (size[0] // cells.shape[1], size[1] // cells.shape[2])
    masks = cells.repeat(factor[0], 1).repeat(factor[1], 2)
    # Landmarks are drawn a few pixels wide: small crops are enlarged first, or the dots would hide the mouth.
    larger = max(1, -(-_DRAWN_SIDE // min(size)))
    drawn = [
        draw(f.repeat(larger, 0).repeat(larger, 1), p * larger, m.repeat(larger, 0).repeat(larger, 1))
        for f, p, m in zip(frames, landmarks, masks, strict=True)
    ]
    rows = [
        ("frames", frames),
        ("mask", drawn),
        ("latent", [_grey(z[..., 0], size) for z in latents]),
    ]
    times = [n / FRAME_RATE for n in numbers]
    picture = draw_strip(rows, times, _sound(store, clip), clip.num_frames / FRAME_RATE, sound_label="voice")
    out = io.BytesIO()
    picture.save(out, "png")
    path.write_bytes(out.getvalue())


def print_summary(root: str | os.PathLike, clip_id: str | None = None, as_json: bool = False) -> None:
    """Tables on stdout, or JSON."""
    values = describe_clip(root, clip_id) if clip_id else summary(root)
    if as_json:
        print(json.dumps(values, indent=1, sort_keys=True, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    # Names are printed as they are, also "talk [dQw4w9].mp4", and in a file or pipe a table is as wide as what is in it.
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else _WIDEST)
    if clip_id:
        for name, value in values.items():
            console.print(f"{name:<14} {value}".encode(errors="backslashreplace").decode(), soft_wrap=True)
        return
    console.print(f"{values['path']}: crops of {values['crop'][0]} x {values['crop'][1]} pixels", soft_wrap=True)
    tables = {
        "split": [{"split": k, **v} for k, v in values["splits"].items()],
        "column": values["columns"],
        "score": [{"score": k, **v} for k, v in values["scores"].items()],
        "terms": [{"terms": k, "clips": v} for k, v in values["terms"].items()],
        "faces": [{"landmarks by": k, "clips": v} for k, v in values["faces"].items()],
    }
    for rows in tables.values():
        if not rows:
            continue
        table = Table(box=None, pad_edge=False)
        for name in rows[0]:
            table.add_column(name.replace("_", " "), justify="left" if name == next(iter(rows[0])) else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        console.print(table)


def _find(store: FrameStore, clip_id: str) -> Clip:
    found = [c for c in store.clips if c.id == clip_id] or [c for c in store.clips if c.id.startswith(clip_id)]
    if len(found) != 1:
        first = ", ".join(c.id for c in (found or store.clips)[:3])
        problem = f"{len(found)} clips begin with {clip_id!r}" if found else f"no clip {clip_id!r}"
        raise KeySyncError(f"{store.root} has {problem}; there are {first}, ... (clips.jsonl lists all)")
    return found[0]


def _pictures(store: FrameStore, clip: Clip, numbers: list[int]) -> list[np.ndarray]:
    """Crops uint8 `[H, W, 3]`; grey latents where the dataset holds no pictures."""
    if JPEG in store.columns:
        pictures = []
        for data in store.read(clip, numbers, [JPEG])[JPEG]:
            with Image.open(io.BytesIO(data)) as image:
                pictures.append(np.asarray(image.convert("RGB")))
        return pictures
    return [_grey(np.asarray(z, np.float32)[..., 0], store.crop_size) for z in store.read(clip, numbers, [LATENT])[LATENT]]


def _grey(channel: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A latent channel `[h, w]` as a grey picture uint8 `[H, W, 3]`."""
    low, high = np.percentile(channel, (1, 99))
    scaled = (np.clip((channel - low) / max(high - low, 1e-6), 0, 1) * 255).astype(np.uint8)
    factor = (size[0] // channel.shape[0], size[1] // channel.shape[1])
    return scaled.repeat(factor[0], 0).repeat(factor[1], 1)[..., None].repeat(3, -1)


def _sound(store: FrameStore, clip: Clip) -> np.ndarray | None:
    """The clip's voice, 16 kHz samples in [-1, 1]; None where the dataset was made without the "sound" column."""
    if SOUND not in store.columns:
        return None
    return np.concatenate(store.read(clip, list(range(clip.num_frames)), [SOUND])[SOUND]).astype(np.float32) / 32768
