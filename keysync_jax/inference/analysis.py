"""First pass over a video: when each frame is shown, where the cuts are, and which face to follow in each shot."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

import cv2
import numpy as np

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.clip_io import VideoFile, VideoSource
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.media import appearance, crop, faces, masks, placing, tracking, video
from keysync_jax.media.cuts import find_cuts
from keysync_jax.media.dissolves import DissolveDetector, Transition
from keysync_jax.media.faces import FaceBackend
from keysync_jax.media.shots import ShotDetector

_MANY_FRAMES = 0.2  # a further face is worth a word where it is seen at least this part of the frames of the chosen one
_ODDEST_ASPECT = 4.0  # beyond it a pixel's shape is a slip in the file's header


class Shot(NamedTuple):
    """A stretch between two cuts with its face, and where the model's square lies; there is none where there is nothing to dub."""

    index: int
    start: int
    stop: int
    faces: tracking.ShotFaces
    places: placing.Placements

    @property
    def crop(self) -> crop.Crop | crop.View | None:
        """The first square; None: no face."""
        return self.places.parts[0].view if self.places.parts else None

    def view(self, frame: int) -> crop.Crop | crop.View:
        """The square of a source frame with a face."""
        if not self.places.parts:
            raise ValueError(f"shot {self.index} has no face, so no crop")
        return self.places.at(frame - self.start)

    def mask(self, frame: int, stage: StageConfig, config: MaskConfig) -> np.ndarray:
        """Regenerated cells bool `[h, w]` of a source frame on the stage's latent grid."""
        landmarks = crop.to_crop_space(self.faces.landmarks[frame - self.start], self.view(frame), stage.resolution)
        grid = (stage.latent_size, stage.latent_size)
        return masks.make_mask(landmarks[None].astype(int), stage.resolution, stage.resolution, config, target=grid)[0] > 0


class Analysis(NamedTuple):
    info: video.VideoInfo
    times: list[Fraction]  # when each frame is shown, seconds on the voice's clock (zero is the start of the file)
    shots: list[Shot]
    notes: list[str]
    dissolved: Sequence[range] = ()  # source frames that show two shots over one another

    @property
    def has_face(self) -> bool:
        """Whether there is anything to dub."""
        return any(shot.crop is not None for shot in self.shots)

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
        return analyse(source, backend, options.face, advance, options.no_face)


def analyse(
    source: VideoSource | str | os.PathLike,
    backend: FaceBackend,
    face: str = "largest",
    on_frame: Callable[[], None] = lambda: None,
    no_face: str = "fail",
) -> Analysis:
    """Decode once, keeping only landmarks and timestamps.

    Args:
      source: the source video, or its path.
      backend: face landmark detector.
      face: which face of several to follow.
      on_frame: called after each frame, for progress.
      no_face: "pass" takes a video without any face, too.

    Raises:
      UsageError: no such choice of a face, or a point outside the picture.
      KeySyncError: unreadable video, or no usable face anywhere in it and none need be.
    """
    source = VideoFile(source) if isinstance(source, (str, os.PathLike)) else source
    info = source.info
    size = (info.display_width, info.display_height)
    selection = tracking.Selection.parse(face)
    if selection.point is not None and not all(0 <= at <= side for at, side in zip(selection.point, size, strict=True)):
        raise UsageError(f"--face {face} lies outside the {size[0]}x{size[1]} picture of {info.path}")
    aspect = _shown_aspect(info)
    reader = source.read()
    cuts, blends = ShotDetector(), DissolveDetector()
    times, detections = [], []
    for frame in reader:
        times.append(frame.time - info.start_time)
        small = frame.thumbnail()
        cuts.update(small, frame.index, float(times[-1]))
        blends.update(small)
        detections.append(_faces_of(frame.rgb(), backend, aspect))
        on_frame()
    if not times:
        raise KeySyncError(f"{info.path}: no frame could be decoded; check the file with another player")
    transitions = blends.transitions()
    bounds = _bounds(find_cuts(cuts, detections), transitions, len(times))
    for transition in transitions:
        if not transition.fade:  # two faces over one another: neither is dubbed
            detections[transition.start : transition.stop] = [[]] * (transition.stop - transition.start)
    shots = []
    for index, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        table = tracking.FaceTable(size)
        for detected, time in zip(detections[start:stop], times[start:stop], strict=True):
            table.add(detected, float(time))
        found = table.finish(selection)
        places = placing.place(found.landmarks, found.runs, size, aspect=aspect, rate=_rate(times[start:stop], info))
        shots.append(Shot(index, start, stop, found, places))
    if not any(shot.crop for shot in shots) and no_face != "pass":
        raise KeySyncError(
            f"{info.path}: no face found in any of {len(times)} frames; the face must be visible, at least some 60 pixels wide; "
            "--no-face pass writes the video with the new voice all the same"
        )
    dissolved = [range(transition.start, transition.stop) for transition in transitions if not transition.fade]
    return Analysis(info, times, shots, [*reader.notes, *_notes(shots)], dissolved)


def _bounds(cuts: list[int], transitions: list[Transition], num_frames: int) -> list[int]:
    """First frames of all shots, and the number of frames. A cut inside a transition is the transition's own."""
    own = {transition.middle for transition in transitions}
    others = {cut for cut in cuts if not any(transition.start <= cut < transition.stop for transition in transitions)}
    return [0, *sorted((own | others) - {0, num_frames}), num_frames]


def _notes(shots: list[Shot]) -> list[str]:
    """What a person should know of the faces: which was taken of several, and heads that do not stand upright."""
    lines = []
    if all(shot.crop is None for shot in shots):
        lines.append("no face in any frame: the pictures stay as they were, under the new voice")
    for shot in shots:
        others = [other for other in shot.faces.others if other.frames >= _MANY_FRAMES * shot.faces.detected.sum()]
        if others and shot.faces.center is not None:
            x, y = shot.faces.center
            where = ", ".join(
                f"{other.center[0]:.0f},{other.center[1]:.0f}{' (a still picture)' if other.still else ''}" for other in others
            )
            lines.append(
                f"shot {shot.index}: {len(others) + 1} faces; the one around {x:.0f},{y:.0f} is dubbed, not the one at {where}: "
                "--face left, right, center or X,Y chooses another"
            )
        if angles := [part.view.angle for part in shot.places.parts if isinstance(part.view, crop.View) and abs(part.view.angle) > 1]:
            low, high = min(angles), max(angles)
            span = f"{low:.0f}" if high - low < 1 else f"{low:.0f} to {high:.0f}"
            lines.append(f"shot {shot.index}: the head is turned by {span} degrees and is dubbed upright in a turned crop")
    return lines


def _shown_aspect(info: video.VideoInfo) -> float:
    """Width over height of a pixel of the upright picture as players show it."""
    aspect = float(info.sample_aspect_ratio)
    if not 1 / _ODDEST_ASPECT <= aspect <= _ODDEST_ASPECT:
        return 1.0
    return 1 / aspect if info.orientation.transpose else aspect


def _faces_of(rgb: np.ndarray, backend: FaceBackend, aspect: float) -> list[faces.Face]:
    """Faces of a picture in its own pixels, looked for in the shape in which it is shown, with what they look like."""
    height, width = rgb.shape[:2]
    if aspect != 1.0:
        shown = (round(width * aspect), height) if aspect > 1 else (width, round(height / aspect))
        factor = np.array([shown[0] / width, shown[1] / height], np.float32)
        stretched = cv2.resize(rgb, shown, interpolation=cv2.INTER_CUBIC)
        found = [(face, faces.Face.from_landmarks(face.landmarks / factor, face.score)) for face in backend.detect(stretched)]
        return [own._replace(look=appearance.appearance_of(stretched, face.landmarks)) for face, own in found]
    return [face._replace(look=appearance.appearance_of(rgb, face.landmarks)) for face in backend.detect(rgb)]


def _rate(times: list[Fraction], info: video.VideoInfo) -> float:
    """Pictures a second of a shot: holds and gaps do not count."""
    if len(times) < 2:
        return float(info.average_rate)
    return 1 / float(np.median(np.diff(np.array(times, np.float64))))
