"""First pass over a video: when each frame is shown, where the cuts are, and which face to follow in each shot."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.clip_io import VideoFile, VideoSource
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.media import crop, faces, masks, tracking, video
from keysync_jax.media.faces import FaceBackend
from keysync_jax.media.shots import ShotDetector, same_view


class Shot(NamedTuple):
    """A stretch between two cuts with its face; `crop` is None where there is nothing to dub."""

    index: int
    start: int
    stop: int
    faces: tracking.ShotFaces
    crop: crop.Crop | None

    @property
    def box(self) -> crop.Crop:
        """The crop of a shot that has one: whatever is taken from a frame with a face."""
        if self.crop is None:
            raise ValueError(f"shot {self.index} has no face, so no crop")
        return self.crop

    def mask(self, frame: int, stage: StageConfig, config: MaskConfig) -> np.ndarray:
        """Regenerated cells bool `[h, w]` of a source frame on the stage's latent grid."""
        landmarks = crop.to_crop_space(self.faces.landmarks[frame - self.start], self.box, stage.resolution)
        grid = (stage.latent_size, stage.latent_size)
        return masks.make_mask(landmarks[None].astype(int), stage.resolution, stage.resolution, config, target=grid)[0] > 0


class Analysis(NamedTuple):
    info: video.VideoInfo
    times: list[Fraction]  # when each frame is shown, seconds on the voice's clock (zero is the start of the file)
    shots: list[Shot]
    notes: list[str]

    @property
    def num_frames(self) -> int:
        return len(self.times)

    def shot_of(self, frame: int) -> Shot:
        """The shot that a source frame belongs to."""
        return self.shots[bisect.bisect_right(self.shots, frame, key=lambda shot: shot.start) - 1]


def look(source: VideoSource, options: DubOptions, progress: PhaseProgress) -> Analysis:
    """`analyse` with the detector and the face that the options name.

    Raises:
      UsageError, KeySyncError: as `analyse`, or the detector is not there.
    """
    weights = {"weights": options.face_weights} if options.face_weights else {}
    # Opened before the progress bar starts: mediapipe's start-up chatter is silenced together with all of stderr.
    with faces.open_backend(options.faces, **weights) as backend, progress.phase("look", source.info.frames) as advance:
        return analyse(source, backend, options.face, advance)


def analyse(
    source: VideoSource | str | os.PathLike, backend: FaceBackend, face: str = "largest", on_frame: Callable[[], None] = lambda: None
) -> Analysis:
    """Decode once, keeping only landmarks and timestamps.

    Args:
      source: the source video, or its path.
      backend: face landmark detector.
      face: which face of several to follow.
      on_frame: called after each frame, for progress.

    Raises:
      UsageError: no such choice of a face, or a point outside the picture.
      KeySyncError: unreadable video, or no usable face anywhere in it.
    """
    source = VideoFile(source) if isinstance(source, (str, os.PathLike)) else source
    info = source.info
    size = (info.display_width, info.display_height)
    selection = tracking.Selection.parse(face)
    if selection.point is not None and not all(0 <= at <= side for at, side in zip(selection.point, size, strict=True)):
        raise UsageError(f"--face {face} lies outside the {size[0]}x{size[1]} picture of {info.path}")
    reader = source.read()
    cuts = ShotDetector()
    times, detections = [], []
    for frame in reader:
        rgb = frame.rgb()
        cuts.update(frame.thumbnail(), frame.index)
        detections.append(backend.detect(rgb))
        times.append(frame.time - info.start_time)
        on_frame()
    if not times:
        raise KeySyncError(f"{info.path}: no frame could be decoded; check the file with another player")
    shots = []
    bounds = [0, *(cut for cut in cuts.cuts if not same_view(cuts.change(cut), detections[cut - 1], detections[cut])), len(times)]
    for index, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        table = tracking.FaceTable(size)
        for detected in detections[start:stop]:
            table.add(detected)
        found = table.finish(selection)
        shots.append(Shot(index, start, stop, found, crop.fixed_crop(found.landmarks, size) if found.runs else None))
    if not any(shot.crop for shot in shots):
        raise KeySyncError(
            f"{info.path}: no face found in any of {len(times)} frames; the face must be visible, at least some 60 pixels wide"
        )
    return Analysis(info, times, shots, list(reader.notes))
