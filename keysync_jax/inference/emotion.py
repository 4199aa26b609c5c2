"""Emotions over time as two numbers, valence and arousal in [-1, 1]: named points, and curves of them for every frame of a clip."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, UsageError

# (valence, arousal) of the names that KeyFace's pipeline knows (commit 9226167), in its order.
NAMED: dict[str, tuple[float, float]] = {
    "happy": (0.85, 0.75),
    "angry": (-0.443, 0.908),
    "surprised": (0.0, 0.85),
    "sad": (-0.85, -0.35),
    "neutral": (0.0, 0.0),
    "fear": (0.181, 0.949),
    "disgusted": (-0.8, 0.5),
    "contempt": (0.307, 0.535),
    "calm": (0.65, -0.5),
    "excited": (0.9, 0.9),
    "bored": (-0.6, -0.9),
    "confused": (-0.3, 0.4),
    "anxious": (-0.85, 0.9),
    "confident": (0.7, 0.4),
    "frustrated": (-0.8, 0.6),
    "amused": (0.7, 0.5),
    "proud": (0.8, 0.4),
    "ashamed": (-0.8, -0.3),
    "grateful": (0.7, 0.2),
    "jealous": (-0.7, 0.5),
    "hopeful": (0.7, 0.3),
    "disappointed": (-0.7, -0.3),
    "curious": (0.5, 0.5),
    "overwhelmed": (-0.6, 0.8),
}
_FILES = (".csv", ".tsv", ".json")
NEUTRAL = "neutral"


@dataclasses.dataclass(frozen=True)
class EmotionCurve:
    """Valence and arousal over time, linear between points and held before the first and after the last.

    Attributes:
      text: as it was asked for.
      points: (seconds, valence, arousal), in order of time; seconds None where the points are spread evenly over the clip.
      strength: factor of both; the product is held within [-1, 1].
    """

    text: str
    points: tuple[tuple[float | None, float, float], ...]
    strength: float = 1.0

    @classmethod
    def parse(cls, text: str, strength: float = 1.0) -> Self:
        """A name, several names, two numbers, or a file of points.

        Args:
          text: `happy`; `neutral,happy,sad`, spread evenly over the clip; `0.5,-0.2`, valence and arousal; or a `.csv` or `.json` file of
            `seconds, valence, arousal` or `seconds, name` rows.
          strength: see `EmotionCurve`.

        Raises:
          UsageError: an unknown name, a number outside [-1, 1], or a negative strength.
          KeySyncError: a file that cannot be read, or a row of it that says something else.
        """
        if not 0 <= strength <= 10:
            raise UsageError(f"--emotion-strength {strength} is out of range; choose 0 (neutral) to 10")
        words = [word.strip() for word in text.split(",")]
        if text.lower().endswith(_FILES):
            return cls(text, tuple(_read(text)), strength)
        numbers = [number for number in map(_number, words) if number is not None]
        if len(numbers) == len(words) == 2:
            return cls(text, ((None, *_checked(numbers[0], numbers[1], f"--emotion {text}")),), strength)
        if numbers or not text.strip():
            raise UsageError(f"--emotion {text}: give a name, several, two numbers (valence,arousal), or a .csv or .json file")
        return cls(text, tuple((None, *named(word, f"--emotion {text}")) for word in words), strength)

    def sampled(self, frames: int) -> dict[str, np.ndarray]:
        """Values when each frame is shown, 25 a second: `valence` and `arousal`, float32 `[frames]`."""
        end = max(frames - 1, 1) / FRAME_RATE
        even = np.linspace(0.0, end, len(self.points))
        at = [place if seconds is None else seconds for place, (seconds, _, _) in zip(even, self.points, strict=True)]
        times = np.arange(frames) / FRAME_RATE
        out = {}
        for name, values in zip(("valence", "arousal"), list(zip(*self.points, strict=True))[1:], strict=True):
            out[name] = np.clip(self.strength * np.interp(times, at, values), -1, 1).astype(np.float32)
        return out


def named(word: str, where: str) -> tuple[float, float]:
    """A named point.

    Raises:
      UsageError: an unknown name; it lists all of them with their values.
    """
    if word.lower() in NAMED:
        return NAMED[word.lower()]
    near = difflib.get_close_matches(word.lower(), NAMED, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    known = ", ".join(f"{name} ({valence:g},{arousal:g})" for name, (valence, arousal) in NAMED.items())
    raise UsageError(f"{where}: there is no emotion {word!r}; {meant}the names, with valence and arousal, are {known}")


def _number(word: str | float) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _checked(valence: float, arousal: float, where: str) -> tuple[float, float]:
    for name, value in (("valence", valence), ("arousal", arousal)):
        if not -1 <= value <= 1:  # also for NaN
            raise UsageError(f"{where}: {name} {value:g} is out of range; choose -1 to 1")
    return valence, arousal


def _read(path: str) -> Iterator[tuple[float, float, float]]:
    """Points of a file, by time."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(_json_rows(file.read(), path) if path.lower().endswith(".json") else _table_rows(file.read()))
    except (OSError, UnicodeDecodeError) as error:
        raise KeySyncError(f"{path}: the emotion curve cannot be read ({getattr(error, 'strerror', None) or error})") from None
    points = [_point(values, f"{path}: point {number}") for number, values in enumerate(rows, 1)]
    if not points:
        raise KeySyncError(f"{path} holds no point; write rows of seconds, valence, arousal or of seconds, name")
    for (before, _, _), (after, _, _) in zip(points, points[1:], strict=False):
        if after <= before:
            raise KeySyncError(f"{path}: the seconds must rise from point to point; {after:g} comes after {before:g}")
    yield from points


def _table_rows(text: str) -> Iterator[list[str]]:
    head = text.split("\n", 1)[0]
    separator = max((",", ";", "\t"), key=head.count)
    for number, row in enumerate(csv.reader(text.splitlines(), delimiter=separator)):
        cells = [cell.strip() for cell in row if cell.strip()]
        if cells and not (number == 0 and _number(cells[0]) is None):  # titles of columns
            yield cells


def _json_rows(text: str, path: str) -> Iterator[list[Any]]:
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise KeySyncError(f"{path} is not JSON ({error})") from None
    if not isinstance(rows, list):
        raise KeySyncError(f'{path} must hold a list of points such as [0.0, 0.5, -0.2] or {{"seconds": 0, "name": "happy"}}')
    for row in rows:
        if isinstance(row, Mapping):
            row = [row.get("seconds"), *([row["name"]] if "name" in row else [row.get("valence"), row.get("arousal")])]
        yield list(row) if isinstance(row, (list, tuple)) else [row]


def _point(values: list[Any], where: str) -> tuple[float, float, float]:
    """`seconds, valence, arousal` or `seconds, name`."""
    numbers = [_number(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else None for value in values]
    seconds, *rest = numbers or [None]
    if seconds is not None and 0 <= seconds < float("inf"):
        if len(values) == 2 and isinstance(values[1], str) and rest == [None]:
            return (seconds, *named(values[1], where))
        known = [number for number in rest if number is not None]
        if len(known) == len(rest) == 2:
            return (seconds, *_checked(known[0], known[1], where))
    raise KeySyncError(f"{where} is {values}; write seconds, valence, arousal (from -1 to 1) or seconds, name")
