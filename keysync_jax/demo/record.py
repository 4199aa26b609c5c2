"""What a demo model is known to reach on single demo clips: `recorded.json` beside its weights.

One six-second clip scatters, so a demo is not held against the mean but against a floor that this model hardly ever falls below: three
standard deviations of single clips under their mean (correlations on Fisher's z scale, where they scatter evenly), and always below
the worst recorded clip. What falls below it is broken, not unlucky.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from keysync_jax.config import MaskConfig, from_dict
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.files import read_object, write_text
from keysync_jax.core.version import __version__

FILE = "recorded.json"
KEYS = ("opening_r", "width_r", "lag", "closed", "partial_r")
FEWEST = 8
_CORRELATIONS = ("opening_r", "width_r", "partial_r")
_DEVIATIONS = 3.0
_MARGIN = 0.02  # below the worst recorded clip: other processors round differently
_CLOSED_MARGIN = 0.15  # a clip has some fifteen closed frames: rounding moves the share by a frame or two, .07 each
_AGAIN = "record again with keysync demo --record N --model DIR"


@dataclasses.dataclass(frozen=True)
class _Recorded:
    """What recorded.json holds."""

    clips: int
    frames: int
    size: int
    mean: dict[str, float | None]
    deviation: dict[str, float | None]
    floors: dict[str, float | None]
    weights: dict[str, str]
    worst: dict[str, float | None] = dataclasses.field(default_factory=dict)
    floor_is: str = ""
    keysync_jax: str = ""


def floor(key: str, values: Sequence[float]) -> float | None:
    """The value that a single clip must reach (for "lag": the absolute value that it must not exceed); None where no clip has one.

    Args:
      key: one of `KEYS`.
      values: of the recorded clips; NaN where a clip has none.
    """
    known = np.array([v for v in values if math.isfinite(v)], np.float64)
    if not known.size:
        return None
    if key == "lag":
        return float(max(1.0, np.abs(known).max()))
    if key in _CORRELATIONS:
        z = np.arctanh(np.clip(known, -0.999, 0.999))
        bound = float(np.tanh(z.mean() - _DEVIATIONS * z.std(ddof=1 if known.size > 1 else 0)))
    else:
        bound = float(known.mean() - _DEVIATIONS * known.std(ddof=1 if known.size > 1 else 0))
    lowest = -1.0 if key in _CORRELATIONS else 0.0
    margin = _CLOSED_MARGIN if key == "closed" else _MARGIN
    return round(max(lowest, min(bound, float(known.min()) - margin)), 4)


def below(figures: Mapping[str, float], floors: Mapping[str, float | None]) -> list[str]:
    """Keys of the figures that miss their floor. A figure that could not be taken misses, save "closed": not every clip has closures."""
    missed = []
    for key, bound in floors.items():
        value = figures.get(key, math.nan)
        if bound is None or (key == "closed" and not math.isfinite(value)):
            continue
        fits = abs(value) <= bound if key == "lag" else value >= bound
        if not fits:  # also where the value is NaN
            missed.append(key)
    return missed


def write(model: Mapping[str, Any], rows: Sequence[Mapping[str, float]], *, frames: int, size: int) -> Path:
    """Summarize the clips of seeds 0, 1, … in recorded.json beside the model's weights.

    Args:
      model: the model directory's description (`ModelDirectory.describe`).
      rows: figures of each clip.
      frames, size: of the clips.

    Raises:
      KeySyncError: the folder cannot be written to.
    """
    columns = {key: [row[key] for row in rows] for key in KEYS}

    def over(function: Any) -> dict[str, float | None]:
        known = {key: [abs(v) if key == "lag" else v for v in values if math.isfinite(v)] for key, values in columns.items()}
        return {key: round(float(function(values)), 4) if values else None for key, values in known.items()}

    recorded = {
        "keysync_jax": __version__,
        "clips": len(rows),
        "frames": frames,
        "size": size,
        "mean": over(np.mean),
        "deviation": over(lambda values: np.std(values, ddof=1)),
        "worst": {**over(np.min), "lag": over(np.max)["lag"]},
        "floors": {key: floor(key, values) for key, values in columns.items()},
        "floor_is": f"mean - {_DEVIATIONS:g} standard deviations of single clips, and at least {_MARGIN:g} below the worst of them "
        f"({_CLOSED_MARGIN:g} for closed)",
        **hashes(model),
    }
    path = Path(model["path"]) / FILE
    write_text(path, json.dumps(recorded, indent=1) + "\n")
    return path


def read(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is recorded for a model; None where nothing is.

    Args:
      model: the model directory's description (`ModelDirectory.describe`).

    Raises:
      KeySyncError: a damaged file, one without floors, or one that was recorded for other weights.
    """
    path = Path(model["path"]) / FILE
    if not path.is_file():
        return None
    values = read_object(path, _AGAIN)
    try:
        recorded = from_dict(_Recorded, values, str(path))
    except KeySyncError as error:
        raise KeySyncError(f"{error}; {_AGAIN}") from None
    for name in ("mean", "deviation", "floors"):
        if set(values[name]) != set(KEYS):
            raise KeySyncError(f"{path}: {name} must hold a number or null for each of {', '.join(KEYS)}; {_AGAIN}")
    # A record that holds a model against nothing would let anything pass.
    if all(value is None for value in recorded.floors.values()):
        raise KeySyncError(f"{path} holds no floor; {_AGAIN}")
    own = hashes(model)["weights"]
    for part in sorted(own.keys() | recorded.weights.keys()):
        if own.get(part) != recorded.weights.get(part):
            raise KeySyncError(f"{path} was recorded for other weights of {part}; {_AGAIN}")
    return values


def hashes(model: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """SHA-256 of every weights file in a model's description."""
    return {"weights": {name: part["sha256"] for name, part in model["parts"].items() if part["sha256"]}}


def mask_config(stage: Mapping[str, Any]) -> MaskConfig:
    """The mask in a stage's described config."""
    return from_dict(MaskConfig, dict(stage["mask"]))
