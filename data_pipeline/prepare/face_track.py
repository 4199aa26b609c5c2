"""Stage 4: the faces of a shot on the model's time axis, from a detector or from a landmark sidecar."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from keysync_jax.data_pipeline.prepare import quality
from keysync_jax.data_pipeline.prepare.item import DropError, Item
from keysync_jax.data_pipeline.prepare.probe import Probed
from keysync_jax.inference.timeline import Run, make_run
from keysync_jax.media import tracking, video
from keysync_jax.media.faces import Face, FaceBackend

STAGE = "faces"
_SAMPLE_EVERY = 12  # model frames between two measurements of sharpness and brightness
GREY_SIZE = 112  # faces that the active-speaker and sync scorers see
_GREY_MARGIN = 1.4  # side of that square over the face's size


class ShotTrack(NamedTuple):
    """The followed face of a shot of N model frames.

    Attributes:
      run: model frames and the source frame of each.
      landmarks: float32 `[N, 68, 2]` in pixels of the upright picture, smoothed where detected; NaN where unknown.
      known: bool `[N]`, landmarks exist.
      alone: bool `[N]`, no second face of note.
      sharpness, brightness: float32 `[N]`, NaN where not measured.
      grey: uint8 `[N, 112, 112]` of the face, for the scorers; empty `[0, 112, 112]` when not asked for.
      picture: uint8 `[H, W, 3]`, a frame from the middle of the shot.
    """

    run: Run
    landmarks: np.ndarray
    known: np.ndarray
    alone: np.ndarray
    sharpness: np.ndarray
    brightness: np.ndarray
    grey: np.ndarray
    picture: np.ndarray


class _Seen(NamedTuple):
    sharpness: float
    brightness: float
    grey: np.ndarray | None


def load_sidecar(item: Item, num_source_frames: int) -> np.ndarray | None:
    """Landmarks `[N, 68, 2]` of the item's sidecar, one row per source frame, NaN where there is no face; None without a sidecar.

    Reads `.npy` (float `[N, 68, 2]`) and `.npz` (array "landmarks").

    Raises:
      DropError: it cannot be read, or does not fit the video.
    """
    if not item.landmarks:
        return None
    points = _read_sidecar(item)
    # Of a video that is used in part, only the frames up to that part's end were counted.
    rows = points.shape[0] if points.shape[1:] == (68, 2) else -1
    if rows < num_source_frames or (item.stop is None and rows != num_source_frames):
        name = os.path.basename(item.landmarks)
        raise DropError(STAGE, "bad_sidecar", f"{name} has shape {points.shape}; the video has {num_source_frames} frames, 68 points each")
    return points


def _read_sidecar(item: Item) -> np.ndarray:
    try:
        with open(item.landmarks, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            points = loaded["landmarks"] if isinstance(loaded, np.lib.npyio.NpzFile) else loaded
            return np.asarray(points, np.float32)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DropError(STAGE, "bad_sidecar", f"{os.path.basename(item.landmarks)} cannot be read ({error})") from error


class FacesInFrame:
    """The faces of single frames of an item, each for itself.

    Args:
      backend: landmark detector; None when the item has a sidecar, which is read when first needed.
    """

    def __init__(self, item: Item, backend: FaceBackend | None):
        self._item, self._backend = item, backend
        self._sidecar: np.ndarray | None = None

    def __call__(self, frame: video.Frame) -> list[Face]:
        if self._backend is not None:
            self._backend.reset()
            size = (frame.info.display_width, frame.info.display_height)
            return _detected(self._item, frame.rgb(), self._backend, size)
        if self._sidecar is None:
            self._sidecar = _read_sidecar(self._item)
        return _listed(self._sidecar, frame.index)


def _detected(item: Item, rgb: np.ndarray, backend: FaceBackend, size: tuple[int, int]) -> list[Face]:
    faces = backend.detect(rgb)
    return faces if item.box is None else [face for face in faces if _inside(face.center, item.box, size)]


def _listed(sidecar: np.ndarray, index: int) -> list[Face]:
    points = sidecar[index] if index < len(sidecar) and sidecar.shape[1:] == (68, 2) else np.full((68, 2), np.nan, np.float32)
    # Some tools write zeros instead of NaN where there is no face: no face is a single point.
    return [Face.from_landmarks(points, 1.0)] if np.isfinite(points).all() and np.ptp(points, axis=0).all() else []


def track_shots(
    item: Item, probed: Probed, backend: FaceBackend | None, *, max_gap: int, second_face: float, want_grey: bool
) -> Iterator[ShotTrack]:
    """Decode the item's range once and yield each shot's track.

    Args:
      backend: landmark detector; None when the item has a sidecar.
      max_gap: see `Curation`.
      second_face: see `Curation`.
      want_grey: keep small grey faces for the scorers.
    """
    sidecar = load_sidecar(item, len(probed.times))
    with video.read(item.path, probed.info, probed.shots[0][0], probed.keyframes) as reader:
        frames = iter(reader)
        frame = next(frames)
        for number, (start, stop) in enumerate(probed.shots):
            run = make_run(number, start, stop, probed.times, probed.audio_frames)
            if not run.sources:
                continue
            if backend is not None:
                backend.reset()
            collector = _Collector(item, probed, run, sidecar, second_face, want_grey)
            for position, source in enumerate(run.sources):
                while frame.index < source:
                    frame = next(frames)
                collector.add(position, frame, backend)
            yield collector.finish(max_gap)


class _Collector:
    """Gathers one shot frame by frame; holds landmarks, measures and small grey faces, never pictures but one."""

    def __init__(self, item: Item, probed: Probed, run: Run, sidecar: np.ndarray | None, second_face: float, want_grey: bool):
        self._item, self._run, self._sidecar = item, run, sidecar
        self._second_face, self._want_grey = second_face, want_grey
        self._size = (probed.info.display_width, probed.info.display_height)
        self._table = tracking.FaceTable(self._size)
        self._alone = np.ones(len(run.sources), bool)
        self._sharpness = np.full(len(run.sources), np.nan, np.float32)
        self._brightness = self._sharpness.copy()
        self._grey = np.zeros((len(run.sources) if want_grey else 0, GREY_SIZE, GREY_SIZE), np.uint8)
        self._picture = np.zeros((0, 0, 3), np.uint8)

    def add(self, position: int, frame: video.Frame, backend: FaceBackend | None) -> None:
        measure = position % _SAMPLE_EVERY == 0
        middle = position == len(self._run.sources) // 2
        rgb = frame.rgb() if backend is not None or measure or middle or self._want_grey else None
        if middle and rgb is not None:
            self._picture = rgb
        faces = self._faces(frame.index, rgb, backend)
        if len(faces) > 1:
            areas = sorted((face.area for face in faces), reverse=True)
            self._alone[position] = areas[1] < self._second_face * areas[0]
        self._table.add(faces)
        if not faces or rgb is None:
            return
        largest = max(faces, key=lambda face: face.area)
        if measure and (patch := quality.face_patch(rgb, largest.landmarks)) is not None:
            self._sharpness[position], self._brightness[position] = quality.sharpness(patch), quality.brightness(patch)
        if self._want_grey:
            self._grey[position] = grey_face(rgb, largest)

    def _faces(self, source: int, rgb: np.ndarray | None, backend: FaceBackend | None) -> list[Face]:
        if self._sidecar is not None:
            return _listed(self._sidecar, source)
        assert rgb is not None and backend is not None, "an item without a sidecar comes with a detector"
        return _detected(self._item, rgb, backend, self._size)

    def finish(self, max_gap: int) -> ShotTrack:
        # Sidecars are someone's measured or exact landmarks: they are taken as they are.
        found = self._table.finish("largest", max_gap=max_gap, smooth=self._sidecar is None)
        return ShotTrack(
            self._run, found.landmarks, found.usable, self._alone, self._sharpness, self._brightness, self._grey, self._picture
        )


def grey_face(rgb: np.ndarray, face: Face) -> np.ndarray:
    """uint8 `[112, 112]` square around a face."""
    import cv2

    from keysync_jax.media.crop import Crop, extract

    x0, y0, x1, y1 = face.box
    side = max(2, int(_GREY_MARGIN * max(x1 - x0, y1 - y0)))
    height, width = rgb.shape[:2]
    x = min(max(int((x0 + x1 - side) / 2), 1 - side), width - 1)
    y = min(max(int((y0 + y1 - side) / 2), 1 - side), height - 1)
    return cv2.cvtColor(extract(rgb, Crop(x, y, side), GREY_SIZE), cv2.COLOR_RGB2GRAY)


def _inside(center: tuple[float, float], box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    x, y = center[0] / size[0], center[1] / size[1]
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]
