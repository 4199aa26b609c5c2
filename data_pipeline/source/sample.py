"""Training windows: what is drawn for a sample, and the arrays it consists of."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.config import MaskConfig, StageConfig, encoder_names
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.records import AUDIO_PREFIX, JPEG, LANDMARKS, LATENT
from keysync_jax.data_pipeline.source import order
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.latent_masks import jitter_landmarks, latent_masks, mirror_landmarks
from keysync_jax.data_pipeline.source.mixture import DatasetChoice, Selection, select
from keysync_jax.data_pipeline.source.order import Order
from keysync_jax.data_pipeline.source.windows import Windows, windows_for

OCCLUDER = "occluder"
EMOTION = ("valence", "arousal")
KNOWN_EMOTION = "emotion_known"
# Points of the classes that KeyFace's label ablation knows: neutral, happy, sad, surprised, fear, disgusted, angry, contempt.
EMOTION_CLASSES = (
    (0.0, 0.0), (0.85, 0.75), (-0.85, -0.35), (0.0, 0.85), (0.181, 0.949), (-0.8, 0.5), (-0.443, 0.908), (0.307, 0.535),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """What to read and how.

    Attributes:
      datasets: one or several datasets with weights and filters.
      windows: `KeyframeWindows` or `InterpolationWindows`.
      audio_encoder: whose tokens to read (column audio_ENCODER); "hubert+wavlm" for both columns side by side.
      mask: region to regenerate, drawn from the landmarks.
      seed: of order, starts and augmentations.
      sampling: "clip" (each clip once per pass) or "duration" (as often as windows fit into it).
      columns: further per-frame columns to deliver under their own names ("valence", "arousal", ...).
      pixel_frames: how many frames of each window to deliver in pixels; 0 for none, `num_frames` for all.
      use_occluder: take the cells of the "occluder" column out of the masks.
      flip: mirror half of the samples left to right. Latents are mirrored too, which the VAE follows only approximately: off by default.
      box_jitter: move and stretch the mask's landmarks by up to this fraction of the crop (0 for none).
      masked: deliver masks; without them landmarks are not read.
      emotion: deliver `valence` and `arousal`: "" for no, "continuous" as they are stored, "labels" as the nearest of eight classes. Frames
        whose emotion is not known (column `emotion_known`) are neutral.
      allow_mismatch: mix datasets whose latents or tokens were made with other weights.
    """

    datasets: tuple[DatasetChoice, ...]
    windows: Windows
    audio_encoder: str = "hubert"
    mask: MaskConfig = MaskConfig()
    seed: int = 0
    sampling: str = "clip"
    columns: tuple[str, ...] = ()
    pixel_frames: int = 0
    use_occluder: bool = False
    flip: bool = False
    box_jitter: float = 0.0
    masked: bool = True
    emotion: str = ""
    allow_mismatch: bool = False

    def __post_init__(self):
        if not self.datasets:
            raise KeySyncError("no dataset to read; name at least one directory")
        if not 0 <= self.pixel_frames <= self.windows.num_frames:
            raise KeySyncError(f"pixel_frames is {self.pixel_frames}; choose 0 to {self.windows.num_frames}, the frames of a window")
        if not 0 <= self.box_jitter < 1:
            raise KeySyncError(f"box_jitter is {self.box_jitter}; it is a fraction of the crop, at least 0 and below 1")


def labelled(felt: np.ndarray) -> np.ndarray:
    """Valence and arousal `[2, T]` as those of the nearest of eight classes: all that a label says of a face."""
    points = np.array(EMOTION_CLASSES, np.float32)  # [8, 2]
    nearest = np.argmin(np.square(felt[:, None] - points.T[:, :, None]).sum(axis=0), axis=0)
    return points[nearest].T


class Sample(NamedTuple):
    """Everything that is drawn for one sample; reading it involves no further chance.

    Attributes:
      dataset, clip: positions in `WindowReader.stores` and in that store's clip index.
      start, spacing: frames start, start + spacing, ... of the clip.
      identity: frame number of the identity condition.
      mirrored: whether left and right are swapped.
      shift, stretch: of the mask's landmarks, see `jitter_landmarks`.
      pixels: which frames of the window to decode, ascending; the same for all samples of a step.
    """

    dataset: int
    clip: int
    start: int
    spacing: int
    identity: int
    mirrored: bool
    shift: tuple[float, float]
    stretch: float
    pixels: tuple[int, ...]


class WindowReader:
    """Pure maps from (seed, step, batch size) to samples and from samples to arrays."""

    def __init__(self, config: SourceConfig):
        """Open the datasets and check that they hold what the config asks for.

        Raises:
          KeySyncError: a column (audio encoder, occluder, pixels) is missing, datasets do not fit each other, or no clip is left.
        """
        self.config = config
        self.stores = tuple(FrameStore(choice.path) for choice in config.datasets)
        self.selections: tuple[Selection, ...] = tuple(
            select(choice, store.clips, config.windows, config.sampling) for choice, store in zip(config.datasets, self.stores, strict=True)
        )
        self._audio = [AUDIO_PREFIX + name for name in encoder_names(config.audio_encoder)]
        drawn = [LANDMARKS, *([OCCLUDER] if config.use_occluder else [])] if config.masked else []
        self._names = [LATENT, *self._audio, *drawn, *(EMOTION if config.emotion else ()), *config.columns]
        for store in self.stores:
            self._check_columns(store)
        if not config.allow_mismatch:
            self._check_makers()
        self._positions = [{c.id: i for i, c in enumerate(store.clips)} for store in self.stores]
        self._order = Order([len(s.items) for s in self.selections], [c.weight for c in config.datasets], config.seed)
        self.latent_shape = self.stores[0].columns[LATENT].shape
        self.audio_dim = sum(self.stores[0].columns[name].shape[-1] for name in self._audio)
        self.crop_size = self.stores[0].crop_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which sample comes when. Equal fingerprints mean equal orders; store it beside the step."""
        chosen = [
            [choice.weight, [[s.clips[i].id for i in range(len(s.clips))], [c.num_frames for c in s.clips], len(s.items)]]
            for choice, s in zip(self.config.datasets, self.selections, strict=True)
        ]
        c = self.config
        drawn = [c.seed, c.sampling, c.windows.stage, dataclasses.asdict(c.windows), c.pixel_frames, c.flip, c.box_jitter]
        return hashlib.sha256(json.dumps([chosen, drawn]).encode()).hexdigest()

    def clip(self, sample: Sample) -> Clip:
        return self.stores[sample.dataset].clips[sample.clip]

    def sample(self, step: int, row: int, batch_size: int, shift: int = 0) -> Sample:
        """Row `row` of the global batch of `step`: a pure function of these numbers, the seed and the clip indices.

        `shift` is added to the number of the sample: a run whose batch size changed goes on with the sample that came next.
        """
        config, seed = self.config, self.config.seed
        index = step * batch_size + row + shift
        pick = self._order(index)
        selection = self.selections[pick.dataset]
        clip = selection.clips[selection.items[pick.item]]
        spacing, starts = config.windows.fit(clip.num_frames)
        start = order.integer(starts, seed, "start", index)
        identity = {"first": start, "clip_first": 0, "random": order.integer(clip.num_frames, seed, "identity", index)}
        jitter = [config.box_jitter * (2 * order.uniform(seed, "jitter", index, axis) - 1) for axis in range(3)]
        return Sample(
            dataset=pick.dataset,
            clip=self._positions[pick.dataset][clip.id],
            start=start,
            spacing=spacing,
            identity=identity[config.windows.identity],
            mirrored=config.flip and order.uniform(seed, "flip", index) < 0.5,
            shift=(jitter[0], jitter[1]),
            stretch=jitter[2],
            pixels=tuple(order.subset(config.windows.num_frames, config.pixel_frames, seed, "pixels", step).tolist()),
        )

    def read(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        """Arrays of some samples, stacked.

        Returns:
          known: float32 `[B, T, h, w, C]`, latents scaled as stored; they are both the target and the known region.
          audio: float32 `[B, T, 2, D]`.
          mask: float32 `[B, T, h, w, 1]`, 1 = regenerate; only with `masked`.
          valence, arousal: float32 `[B, T]`; only with `emotion`.
          identity `[B, h, w, C]` (keyframes) or endpoints `[B, 2, h, w, C]` (interpolation): float32, scaled like `known`.
          frames: int32 `[B, T]`, frame numbers within the clip.
          dataset, clip: int32 `[B]`, which clip (`WindowReader.clip`).
          original_frames: float32 `[B, n, H, W, 3]` in [-1, 1], and original_indices: int32 `[B, n]`, which of the T frames these are
            (equal in all rows); only with `pixel_frames`.
          And every column of `SourceConfig.columns` as `[B, T, ...]` in its own dtype.

        Raises:
          KeySyncError: a record cannot be read or is not finite; names clip, frame and file.
        """
        config, (h, w, c) = self.config, self.latent_shape
        count, frames = len(samples), config.windows.num_frames
        keyframes = config.windows.stage == "keyframe"
        ends = {"identity": (count, h, w, c)} if keyframes else {"endpoints": (count, 2, h, w, c)}
        out = {
            "known": np.empty((count, frames, h, w, c), np.float32),
            "audio": np.empty((count, frames, 2, self.audio_dim), np.float32),
            **({"mask": np.empty((count, frames, h, w, 1), np.float32)} if config.masked else {}),
            **({name: np.empty((count, frames), np.float32) for name in EMOTION} if config.emotion else {}),
            **{name: np.empty(shape, np.float32) for name, shape in ends.items()},
            "frames": np.empty((count, frames), np.int32),
            "dataset": np.array([s.dataset for s in samples], np.int32),
            "clip": np.array([s.clip for s in samples], np.int32),
        }
        for name in config.columns:
            column = self.stores[0].columns[name]
            out[name] = np.empty((count, frames, *column.shape), np.dtype(column.dtype))
        if config.pixel_frames:
            out["original_frames"] = np.empty((count, config.pixel_frames, *self.crop_size, 3), np.float32)
            out["original_indices"] = np.array([s.pixels for s in samples], np.int32)
        for row, sample in enumerate(samples):
            self._read_into({name: array[row] for name, array in out.items() if array.ndim > 1}, sample)
        return out

    def _read_into(self, out: dict[str, np.ndarray], sample: Sample) -> None:
        """Fill one row of every array."""
        config, store, clip = self.config, self.stores[sample.dataset], self.clip(sample)
        frames = config.windows.frames(sample.start, sample.spacing)
        numbers = frames.tolist()
        values = store.read(clip, numbers, self._names)
        out["frames"][:] = frames
        latents = out["known"]
        for i, value in enumerate(values[LATENT]):
            latents[i] = value[:, ::-1] if sample.mirrored else value
        for i, tokens in enumerate(zip(*(values[name] for name in self._audio), strict=True)):
            np.concatenate(tokens, axis=-1, out=out["audio"][i], casting="same_kind")
        for name in config.columns:
            for i, value in enumerate(values[name]):
                out[name][i] = value
        if config.windows.stage == "interpolation":
            out["endpoints"][:] = latents[[0, -1]]
        elif sample.identity in numbers:
            out["identity"][:] = latents[numbers.index(sample.identity)]
        else:
            identity = store.read(clip, [sample.identity], [LATENT])[LATENT][0]
            out["identity"][:] = identity[:, ::-1] if sample.mirrored else identity
        if config.masked:
            out["mask"][:] = self._masks(values, sample)
        if config.emotion:
            known = store.read(clip, numbers, [KNOWN_EMOTION])[KNOWN_EMOTION] if KNOWN_EMOTION in store.columns else 1
            felt = np.stack([np.asarray(values[name], np.float32) for name in EMOTION]) * np.asarray(known, np.float32)
            out["valence"][:], out["arousal"][:] = labelled(felt) if config.emotion == "labels" else felt
        if sample.pixels:
            pictures = store.read(clip, [numbers[i] for i in sample.pixels], [JPEG])[JPEG]
            for i, data in enumerate(pictures):
                picture = self._decode_jpeg(data, store, clip, numbers[sample.pixels[i]])
                out["original_frames"][i] = picture[:, ::-1] if sample.mirrored else picture
            out["original_frames"] *= 1 / 127.5
            out["original_frames"] -= 1

    def _masks(self, values: dict[str, list], sample: Sample) -> np.ndarray:
        landmarks = np.stack(values[LANDMARKS])
        occluder = np.stack(values[OCCLUDER]) if self.config.use_occluder else None
        if sample.mirrored:
            landmarks = mirror_landmarks(landmarks, self.crop_size[1])
            occluder = None if occluder is None else occluder[:, :, ::-1]
        if self.config.box_jitter:
            landmarks = jitter_landmarks(landmarks, self.crop_size, sample.shift, sample.stretch)
        height, width, _ = self.latent_shape
        return latent_masks(landmarks, self.crop_size, (height, width), self.config.mask, occluder)

    def _decode_jpeg(self, data: bytes, store: FrameStore, clip: Clip, frame: int) -> np.ndarray:
        """uint8 `[H, W, 3]`. Through Pillow: pod workers have no OpenCV."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as image:
                picture = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            where = f"{store.root}: clip {clip.id!r} frame {frame}"
            raise KeySyncError(f"{where}: the JPEG cannot be decoded ({error}); prepare it again") from None
        if picture.shape[:2] != self.crop_size:
            raise KeySyncError(f"{store.root}: clip {clip.id!r} frame {frame}: the JPEG is {picture.shape[:2]}, the crop {self.crop_size}")
        return picture

    def _check_makers(self) -> None:
        """Refuse a mixture whose latents or tokens were made with other weights of the same sizes: nothing else would show it."""
        for name, key, what in ((LATENT, "vae", "VAE"), *((audio, "weights", "speech encoder") for audio in self._audio)):
            made = {str(store.root): _made_with(store, name).get(key) for store in self.stores}
            known = {root: digest for root, digest in made.items() if digest}
            if len(set(known.values())) > 1:
                first, digest = next(iter(known.items()))
                other, theirs = next((root, found) for root, found in known.items() if found != digest)
                raise KeySyncError(
                    f"{other} was prepared with other weights of the {what} ({theirs[:12]}…) than {first} ({digest[:12]}…): {name!r} "
                    "means something else in each; prepare both with one model, or give --allow-mismatch if the two are the same weights "
                    "in another file"
                )

    def _check_columns(self, store: FrameStore) -> None:
        if lacking := [name for name in self._audio if name not in store.columns]:
            have = [name.removeprefix(AUDIO_PREFIX) for name in sorted(store.columns) if name.startswith(AUDIO_PREFIX)]
            encoder = lacking[0].removeprefix(AUDIO_PREFIX)
            raise KeySyncError(
                f"{store.root} holds no tokens of audio encoder {encoder!r}; it has {', '.join(have) or 'none'}. "
                f"Choose one of these or add the column with keysync prepare"
            )
        for name in (*self._names, *([JPEG] if self.config.pixel_frames else [])):
            column = store.require(name)
            if column.is_jpeg and name in self.config.columns:
                raise KeySyncError(f"{store.root}: column {name!r} holds encoded pictures; pixel_frames delivers them")
            first = self.stores[0].columns[name]
            if (column.dtype, column.shape) != (first.dtype, first.shape):
                raise KeySyncError(
                    f"{store.root}: column {name!r} is {column.dtype}{list(column.shape)} but {first.dtype}{list(first.shape)} in "
                    f"{self.stores[0].root}; datasets of one mixture must agree"
                )
        if store.crop_size != self.stores[0].crop_size:
            raise KeySyncError(f"{store.root} has crops of {store.crop_size}, {self.stores[0].root} of {self.stores[0].crop_size}")


def _made_with(store: FrameStore, column: str) -> Mapping[str, Any]:
    """What a dataset says of how a column was made; datasets from elsewhere may say nothing."""
    return next((made for group in store.groups.values() if isinstance(made := group.group.info.get(column), Mapping)), {})


def source_config(stage: StageConfig, datasets: Sequence[DatasetChoice], windows: dict | None = None, **options) -> SourceConfig:
    """The source that fits a stage: its windows, audio encoder and mask.

    Args:
      stage: stage to be trained.
      datasets: what to read.
      windows: options of its windows ("min_spacing", "identity").
      **options: other fields of `SourceConfig`.
    """
    chosen = windows_for(stage.stage, num_frames=stage.num_frames, **(windows or {}))
    options = {"masked": stage.system == "keysync", "emotion": "continuous" if stage.emotion_dim else "", **options}
    return SourceConfig(tuple(datasets), chosen, audio_encoder=stage.audio_encoder, mask=stage.mask, **options)


def check_stage(reader: WindowReader, stage: StageConfig) -> None:
    """Refuse data of another geometry than the stage's.

    Raises:
      KeySyncError: latent size, crop size or audio width differ; names both.
    """
    size, dim, crop = (stage.latent_size, stage.latent_size), stage.audio_feature_dim, (stage.resolution, stage.resolution)
    root = reader.stores[0].root
    if reader.latent_shape[:2] != size:
        raise KeySyncError(f"{root} has latents of {reader.latent_shape[:2]}, the stage is for {size}; prepare the data at its resolution")
    if reader.crop_size != crop:
        raise KeySyncError(f"{root} has crops of {reader.crop_size} pixels, the stage is for {crop}; prepare the data at its resolution")
    if reader.audio_dim != dim:
        raise KeySyncError(f"{root}: {reader.config.audio_encoder} tokens have {reader.audio_dim} numbers, the stage expects {dim}")
