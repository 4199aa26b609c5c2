"""The quality gate: which results of a batch a person should look at, and why. It has no weights and takes no sides between models.

The thresholds were set on drawn dubs, good ones and spoiled ones (`tests/scenarios/gate_drawn.py` prints how they are told apart).
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from keysync_jax.batch.gate_figures import PictureFigures, follow_figures, movement, open_in_silence
from keysync_jax.core.clock import FRAME_RATE, SAMPLES_PER_FRAME, model_frame
from keysync_jax.evaluation.lip_metrics import loudness_db
from keysync_jax.evaluation.video_metrics import mouth_ratio
from keysync_jax.inference.analysis import Analysis
from keysync_jax.inference.clip_io import VideoSource, open_video
from keysync_jax.inference.dub_report import ENDED, OUTSIDE
from keysync_jax.media import audio
from keysync_jax.media.faces import Face, FaceBackend, box_iou

# In one place: what is too little or too much.
OPEN_RATIO = 0.22  # mouth aspect ratio of an open mouth
LEAST_PAINTED = 0.8  # of the frames that the voice covers
MOST_SEAM = 4.0  # code values
MOST_FLICKER = 4.0  # code values
LEAST_SHARPNESS = 0.35  # of the source's
LEAST_MOVEMENT = 0.025  # mouth aspect ratio
LEAST_VOICE_R = 0.35
MOST_LAG = 2  # frames
LEAST_LAG_GAIN = 0.08  # by which another lag must be better to be believed
MOST_OPEN_IN_SILENCE = 0.4  # of the frames

_THUMBNAILS, _THUMBNAIL_PX = 6, 112
_SAME_FACE_IOU = 0.2


class Measured(NamedTuple):
    """Figures by name, and thumbnails of the result's face over time as a JPEG (None where no frame was painted)."""

    figures: dict[str, float]
    strip: bytes | None


def measure(
    source: VideoSource,
    result: str | os.PathLike,
    voice: str | os.PathLike,
    analysis: Analysis,
    report: Mapping[str, Any],
    region: Callable[[int], np.ndarray],
    backend: FaceBackend,
    start: Fraction = Fraction(0),
) -> Measured:
    """Compares a dub with its source and its voice: one pass over both videos, and a search for the face in each painted frame.

    Args:
      source: the clip that was dubbed.
      result, voice: files.
      analysis: of the source: shots, faces, times.
      report: of the dub: which frames were painted.
      region: opacity `[H, W]`, 0 to 1, of what was painted on a frame of the source.
      backend: an open landmark detector.
      start: seconds on the clip's clock at which the voice begins.

    Raises:
      KeySyncError: a file that cannot be read.
    """
    painted = _painted(report)
    pictures, openings = PictureFigures(), dict[int, float]()
    shown = set(painted[:: max(1, len(painted) // _THUMBNAILS)][:_THUMBNAILS])
    thumbnails: list[Image.Image] = []
    wanted = set(painted)
    backend.reset()
    for before, after in zip(source.read(), open_video(result).read(), strict=False):
        if before.index not in wanted:
            continue
        shot = analysis.shot_of(before.index)
        landmarks = shot.faces.landmarks[before.index - shot.start]
        if not np.isfinite(landmarks).all():
            continue
        had, has = before.rgb(), after.rgb()
        if had.shape != has.shape:
            continue
        pictures.add(before.index, had, has, region(before.index), landmarks)
        face = same_face(backend.detect(has), landmarks)
        openings[before.index] = math.nan if face is None else float(mouth_ratio(face.landmarks))
        if before.index in shown:
            thumbnails.append(_thumbnail(has, landmarks))
    figures = {"painted": painted_share(report)} | pictures.figures()
    figures |= voice_figures(openings, [time - start for time in analysis.times], audio.load_audio(voice).samples)
    return Measured(figures, _strip(thumbnails))


def voice_figures(openings: Mapping[int, float], times: list[Fraction], samples: np.ndarray) -> dict[str, float]:
    """How the mouth goes with the voice, on the model's clock.

    Args:
      openings: mouth aspect ratio by frame of the source, NaN where no mouth was seen.
      times: when each frame is shown, seconds on the voice's clock.
      samples: the voice `[S]`, 16 kHz.
    """
    count = len(samples) // SAMPLES_PER_FRAME
    if not openings or not count:
        return {}
    opening = np.full(count, np.nan)
    distance = np.full(count, np.inf)
    for frame, value in openings.items():
        place = model_frame(times[frame])
        away = abs(float(times[frame]) - place / FRAME_RATE)
        if place < count and away < distance[place]:
            opening[place], distance[place] = value, away
    _fill_single_gaps(opening)
    loudness = loudness_db(samples, count)
    heard = loudness.copy()
    heard[~np.isfinite(opening)] = loudness.min()  # what is said while nothing is painted asks nothing of the mouth
    found = follow_figures(opening, loudness) | {
        "movement": movement(opening, heard),
        "open_in_silence": open_in_silence(opening, loudness, OPEN_RATIO),
    }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def missed(figures: Mapping[str, float]) -> dict[str, str]:
    """What is below or above its threshold: by name of the figure, the reason in words."""
    found: dict[str, str] = {}

    def look(name: str, bad: Callable[[float], bool], words: str) -> None:
        value = figures.get(name)
        if value is not None and bad(value):
            found[name] = words.format(value)

    look("painted", lambda v: v < LEAST_PAINTED, "only {:.0%} of the frames that the voice covers are painted")
    look("seam", lambda v: v > MOST_SEAM, "an edge of {:.1f} code values runs around the painted region")
    look("flicker", lambda v: v > MOST_FLICKER, "the painted region flickers by {:.1f} code values")
    look("sharpness", lambda v: v < LEAST_SHARPNESS, "the mouth has {:.0%} of the source's sharpness")
    look("movement", lambda v: v < LEAST_MOVEMENT, "the mouth hardly moves while the voice speaks ({:.3f})")
    look("open_in_silence", lambda v: v > MOST_OPEN_IN_SILENCE, "the mouth is open in {:.0%} of the pauses")
    gain, lag = figures.get("voice_lag_gain", 0.0), figures.get("voice_lag", 0.0)
    if "movement" not in found:  # of a mouth that stands still nothing more can be said
        if abs(lag) > MOST_LAG and gain >= LEAST_LAG_GAIN:
            found["voice_lag"] = f"the mouth is {abs(lag):.0f} frames {'late' if lag > 0 else 'early'}"
        else:
            look("voice_r", lambda v: v < LEAST_VOICE_R, "the mouth does not follow the voice (correlation {:.2f})")
    return found


def _painted(report: Mapping[str, Any]) -> list[int]:
    frames: list[int] = []
    for shot in report["shots"]:
        skipped = {frame for part in shot["skipped"] for frame in range(*part["frames"])}
        frames += [frame for frame in range(*shot["frames"]) if frame not in skipped]
    return frames


def painted_share(report: Mapping[str, Any]) -> float:
    """Of the frames that the voice covers, those that were painted; 1 where there are none."""
    silent = sum(
        part["frames"][1] - part["frames"][0] for shot in report["shots"] for part in shot["skipped"] if part["reason"] in (ENDED, OUTSIDE)
    )
    covered = report["source"]["frames"] - silent
    return report["frames_dubbed"] / covered if covered > 0 else 1.0


def same_face(faces: list[Face], landmarks: np.ndarray) -> Face | None:
    """Of the faces found in a result, the one that has the place of the source's `landmarks` `[68, 2]`; None if none has."""
    own = Face.from_landmarks(landmarks, 1.0)
    best = max(faces, key=lambda face: box_iou(face.box, own.box), default=None)
    return best if best is not None and box_iou(best.box, own.box) >= _SAME_FACE_IOU else None


def _fill_single_gaps(series: np.ndarray) -> None:
    """A frame between two known ones takes their mean: a source of 24 frames a second leaves one model frame a second without its own."""
    gaps = np.flatnonzero(~np.isfinite(series[1:-1]) & np.isfinite(series[:-2]) & np.isfinite(series[2:])) + 1
    series[gaps] = (series[gaps - 1] + series[gaps + 1]) / 2


def _thumbnail(rgb: np.ndarray, landmarks: np.ndarray) -> Image.Image:
    low, high = landmarks.min(axis=0), landmarks.max(axis=0)
    middle, reach = (low + high) / 2, 0.75 * float((high - low).max())
    box = [int(value) for value in (*(middle - reach), *(middle + reach))]
    return Image.fromarray(rgb).crop((box[0], box[1], box[2], box[3])).resize((_THUMBNAIL_PX, _THUMBNAIL_PX))


def _strip(thumbnails: list[Image.Image]) -> bytes | None:
    if not thumbnails:
        return None
    picture = Image.new("RGB", (len(thumbnails) * _THUMBNAIL_PX, _THUMBNAIL_PX))
    for place, each in enumerate(thumbnails):
        picture.paste(each, (place * _THUMBNAIL_PX, 0))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=70)
    return data.getvalue()
