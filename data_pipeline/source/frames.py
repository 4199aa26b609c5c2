"""Single frames of videos, for training an autoencoder before any shard exists (shards hold its latents)."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.source import order

_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_ARRAYS = ".npy"  # frames as they are, see `data_pipeline.synthetic.write`; listed in manifests only
_MOUTH = slice(48, 68)  # iBUG landmarks of the lips
_MARGIN = 0.35  # around the lips' box, as a fraction of its width: chin and cheeks move along
_CROP_TOWARDS_MOUTH = 0.5  # share of random crops that hold the mouth


@dataclasses.dataclass(frozen=True)
class FrameConfig:
    """What to read.

    Attributes:
      videos: manifests (.csv with a column `path`, perhaps `split`), folders or files, of face crops.
      split: use only videos of this split, where a manifest states one.
      size: side of the frames; the central square of a video is resized to it.
      crop: side of random crops, 0 for whole frames.
      frames_per_clip: frames taken from one decoded video; neighbours in a batch.
      seed: of the order, the frames and the crops.
    """

    videos: tuple[str, ...]
    split: str = "train"
    size: int = 512
    crop: int = 0
    frames_per_clip: int = 4
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.crop <= self.size:
            raise KeySyncError(f"crop is {self.crop}; choose 0 for whole frames or up to their side, {self.size}")
        if self.frames_per_clip < 1:
            raise KeySyncError(f"frames_per_clip is {self.frames_per_clip}; it must be at least 1")


class FrameReader:
    """Pure map from (step, rows) to images; `Batches` iterates over it."""

    def __init__(self, config: FrameConfig):
        """Raises:
        KeySyncError: a path does not exist, a manifest lacks `path`, or there is no video.
        """
        self.config = config
        self.paths = [path for source in config.videos for path in _videos(Path(source), config.split)]
        if not self.paths:
            raise KeySyncError(f"no video of split {config.split!r} in {', '.join(config.videos) or 'data.datasets, which is empty'}")
        self._order = order.Order([len(self.paths)], [1.0], config.seed)

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the order."""
        import hashlib

        names = [path.name for path in self.paths]
        return hashlib.sha256(repr((names, dataclasses.astuple(self.config)[1:])).encode()).hexdigest()

    def sample(self, step: int, row: int, batch_size: int, shift: int = 0) -> tuple[int, int]:
        """(sample number, video) of a row of a step's global batch. `frames_per_clip` consecutive samples share a video; `shift` as for
        `WindowReader.sample`."""
        index = step * batch_size + row + shift
        return index, self._order(index // self.config.frames_per_clip).item

    def read(self, samples: Sequence[tuple[int, int]]) -> dict[str, np.ndarray]:
        """Images of samples.

        Returns:
          images: float32 `[B, S, S, 3]` in [-1, 1].
          mouth: float32 `[B, S, S, 1]`, 1 on the box around the lips, with soft edges; 0 where a video has no landmark file.
        """
        parts = [self._frames(video, [i for i, v in samples if v == video]) for video in dict.fromkeys(v for _, v in samples)]
        found = {i: item for part in parts for i, item in part.items()}
        images, mouths = zip(*(found[i] for i, _ in samples), strict=True)
        return {"images": np.stack(images), "mouth": np.stack(mouths)}

    def _frames(self, number: int, indices: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        path, seed = self.paths[number], self.config.seed
        if path.suffix == _ARRAYS:
            frames = np.load(path, mmap_mode="r")
        else:
            from keysync_jax.media import video

            frames = [frame.rgb() for frame in video.read(path)]
        sidecar = path.with_suffix(".landmarks.npy")
        landmarks = np.load(sidecar) if sidecar.exists() else None
        if not len(frames) or (landmarks is not None and landmarks.shape != (len(frames), 68, 2)):
            beside = "" if landmarks is None else f"; {sidecar.name} has shape {landmarks.shape}"
            raise KeySyncError(f"{path} has {len(frames)} frames{beside}; leave it out or give one row of 68 landmarks for each frame")
        out = {}
        for index in indices:
            frame = order.integer(len(frames), seed, "frame", index)
            out[index] = self._item(frames[frame], None if landmarks is None else landmarks[frame], index)
        return out

    def _item(self, image: np.ndarray, landmarks: np.ndarray | None, index: int) -> tuple[np.ndarray, np.ndarray]:
        import cv2

        size, crop, seed = self.config.size, self.config.crop, self.config.seed
        height, width = image.shape[:2]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        image = image[top : top + side, left : left + side]
        if side != size:
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_CUBIC)
        mouth, center = np.zeros((size, size, 1), np.float32), (size / 2, size / 2)
        if landmarks is not None and np.isfinite(landmarks[_MOUTH]).all():
            lips = (landmarks[_MOUTH] - (left, top)) * (size / side)
            mouth[..., 0], center = _soft_box(lips, size), tuple(lips.mean(axis=0))
        if crop:
            x, y = (order.integer(size - crop + 1, seed, "crop", index, axis) for axis in range(2))
            if order.uniform(seed, "crop at mouth", index) < _CROP_TOWARDS_MOUTH:
                # Anywhere, so long as the middle of the lips is inside the middle half of the crop.
                shift = [(0.25 + 0.5 * order.uniform(seed, "crop shift", index, axis)) * crop for axis in range(2)]
                x, y = (int(np.clip(c - s, 0, size - crop)) for c, s in zip(center, shift, strict=True))
            image, mouth = image[y : y + crop, x : x + crop], mouth[y : y + crop, x : x + crop]
        return image.astype(np.float32) / 127.5 - 1.0, mouth


def _soft_box(points: np.ndarray, size: int) -> np.ndarray:
    """`[size, size]`: 1 on the bounding box of the points and a margin, falling to 0 over as much again."""
    low, high = points.min(axis=0), points.max(axis=0)
    margin = _MARGIN * (high[0] - low[0])
    grid = np.arange(size) + 0.5
    edges = [np.clip(2 - np.maximum(low[i] - grid, grid - high[i]) / margin, 0, 1) for i in range(2)]
    return (edges[1][:, None] * edges[0][None]).astype(np.float32)


def _videos(source: Path, split: str) -> list[Path]:
    if not source.exists():
        raise KeySyncError(f"{source} does not exist; data.datasets names videos, folders or manifests for a VAE")
    if source.is_dir():
        return sorted(p for p in source.rglob("*") if p.suffix.lower() in _SUFFIXES)
    if source.suffix.lower() != ".csv":
        return [source]
    with source.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "path" not in rows[0]:
        raise KeySyncError(f"{source} has no column `path`; its first line must name the columns")
    return [source.parent / row["path"] for row in rows if row.get("split") in (None, "", split)]
