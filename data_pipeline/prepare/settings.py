"""Everything that decides what a run of `keysync prepare` produces, apart from the inputs and the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from keysync_jax.config import OCCLUSION_BACKENDS, optional_columns
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.clip_index import check_split

# Raised when the meaning of stored work changes, so that work of older versions is not taken for current.
ANALYSIS_VERSION = 2
FEATURES_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Curation:
    """What a clip must be like. Changing any of it makes every item be looked at again.

    Attributes:
      crop_size: side of the square face crop in pixels.
      min_frames, max_frames: length of a clip at 25 fps; longer shots are cut into nearly equal pieces.
      min_rate: frames per second below which a video is dropped (frames would only be repeated).
      max_gap: frames without a face that are filled by interpolation; a longer gap splits a clip.
      min_face: smallest face (larger side of the landmarks' box, median) as a fraction of `crop_size`, before resizing.
      second_face: a second face of at least this part of the first one's area ends a clip.
      min_quality: smallest mean score of nine views (paper A.1: 0.4); needs the quality scorer.
      min_active_speaker: smallest active-speaker score (paper A.1: 0.75); needs that scorer.
      max_sync_offset: largest shift between voice and mouth in frames; needs the sync scorer.
      min_sharpness: smallest variance of the Laplacian over the face, 8-bit levels squared, on a face scaled to 128 pixels.
      min_brightness, max_brightness: mean luma of the face, 0 to 255.
      max_silence: largest share of 40 ms frames without sound; above 1 keeps silent clips (they teach a shut mouth).
      max_jitter: largest frame-to-frame noise of the landmarks as a fraction of the face's size.
      faces: landmark backend for videos without a landmark sidecar.
      scorers: (name, plug-in, weights) of each scorer that is on, see `scorers`.
      seed: of the random views.
    """

    crop_size: int = 512
    min_frames: int = 25
    max_frames: int = 500
    min_rate: float = 20.0
    max_gap: int = 5
    min_face: float = 0.3
    second_face: float = 0.25
    min_quality: float = 0.4
    min_active_speaker: float = 0.75
    max_sync_offset: float = 3.0
    min_sharpness: float = 15.0
    min_brightness: float = 25.0
    max_brightness: float = 235.0
    max_silence: float = 1.01
    max_jitter: float = 0.03
    faces: str = "mediapipe"
    face_weights: str = ""
    scorers: tuple[tuple[str, str, str], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop_size < 16 or self.crop_size % 2:
            raise UsageError(f"crop size is {self.crop_size}; it must be even and at least 16 pixels")
        if not 2 <= self.min_frames <= self.max_frames:
            raise UsageError(f"clip lengths {self.min_frames} to {self.max_frames} frames: need 2 <= shortest <= longest")
        if self.max_frames > 2500:
            raise UsageError(f"the longest clip is {self.max_frames} frames; at most 2500 (100 s), a clip's features are held in memory")
        if self.seed < 0:
            raise UsageError(f"seed must be a non-negative integer, not {self.seed}")


@dataclasses.dataclass(frozen=True)
class Output:
    """How the shards are written.

    Attributes:
      columns: optional column groups, of `optional_columns`.
      weights: local path of the weights of those columns that need some ("wav2vec2", "whisper", "occluder").
      occlusion_backend: what follows clicks for the column "occluder": "flax", or "sam2", the package.
      jpeg_quality: of the crop's pictures.
      shard_megabytes: target size of a shard.
      split_fractions: share of speakers per split.
      seed: of posterior samples and splits.
      discard_work: delete computed features once all shards are written.
    """

    columns: tuple[str, ...] = ("jpeg", "sound", "log_mel")
    weights: Mapping[str, str] = dataclasses.field(default_factory=dict)
    occlusion_backend: str = "flax"
    jpeg_quality: int = 95
    shard_megabytes: float = 256.0
    split_fractions: Mapping[str, float] | None = None
    seed: int = 0
    discard_work: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.columns) - set(optional_columns()))
        if unknown:
            raise UsageError(f"unknown column {unknown[0]!r}; choose among {', '.join(optional_columns())}")
        idle = sorted(set(self.weights) - set(self.columns))
        if idle:
            raise UsageError(f"weights are given for {idle[0]!r}, which is none of the columns ({', '.join(self.columns)}); add it to them")
        if self.occlusion_backend not in OCCLUSION_BACKENDS:
            raise UsageError(f"occlusion backend {self.occlusion_backend!r} is unknown; choose one of {', '.join(OCCLUSION_BACKENDS)}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UsageError(f"JPEG quality is {self.jpeg_quality}; choose 1 to 100")
        object.__setattr__(self, "columns", tuple(dict.fromkeys(self.columns)))  # one group each
        for split in self.split_fractions or ():
            try:
                check_split(split, "split shares")
            except KeySyncError as error:
                raise UsageError(str(error)) from None
        shares = self.split_fractions or {"": 1.0}
        if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise UsageError(f"split shares {dict(shares)} must not be negative and must sum to 1")
        if self.shard_megabytes <= 0:
            raise UsageError(f"shard size is {self.shard_megabytes} MB; it must be positive")
