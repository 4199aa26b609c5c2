"""What every kind of manifest has in common: which files are videos, the sidecars beside them, numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".mov",
    ".avi",
    ".webm",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".3gp",
    ".m2ts",
    ".m2t",
    ".mxf",
    ".ogv",
    ".vob",
    ".asf",
    ".3g2",
    ".divx",
    ".mpe",
    ".m2v",
)
# Sidecars found beside a video when the manifest names none, in this order.
SIDECARS = {
    "landmarks": (".landmarks.npy", ".landmarks.npz"),
    "emotion": (".emotion.npz", ".emotion.json"),
    "occluder": (".occluder.npz", ".occluder.json"),
}


def find_sidecar(video: Path, kind: str) -> str:
    """Path of a video's sidecar of a kind, "" when it has none. Drawn talkers carry their emotion in `.truth.json`."""
    for suffix in SIDECARS[kind]:
        path = video.with_name(video.stem + suffix)
        if path.exists():
            return str(path)
    truth = video.with_name(video.stem + ".truth.json")
    return str(truth) if kind == "emotion" and truth.exists() else ""


def finite_number(value: Any) -> float:
    """A finite number. Raises ValueError or TypeError for anything else."""
    if not math.isfinite(out := float(value)):
        raise ValueError(value)
    return out
