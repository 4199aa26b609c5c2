"""Stage 6: what the networks say about each frame of a clip, computed in one pass over the video and kept in work entries."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from keysync_jax.core import cpu
from keysync_jax.core.clock import SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.dataset_layout import BASE, Group
from keysync_jax.data_pipeline.prepare import sidecars
from keysync_jax.data_pipeline.prepare.groups import FeaturePlan, checked_float16
from keysync_jax.data_pipeline.prepare.item import ClipWork, Item, derived_seed
from keysync_jax.data_pipeline.prepare.sound import load_sound
from keysync_jax.data_pipeline.records import AUDIO_PREFIX, LANDMARKS, LATENT, SOUND
from keysync_jax.media import video
from keysync_jax.media.crop import Crop, extract
from keysync_jax.models.speech import registry
from keysync_jax.models.table import to_flax

# Frames the VAE sees at once. Part of what the same bytes mean: XLA may choose other kernels for another size.
MICROBATCH = 4
_CPU_THREADS = "4"  # likewise
_FAR = 50  # frames that are decoded on the way to the next clip rather than opening the file again


class EncoderError(KeySyncError):
    """A network cannot be opened: no clip's fault, and no clip would fare better."""


class Encoders:
    """The networks of a plan, read from disk when first needed and kept for the worker's life.

    All methods raise EncoderError where a network's weights or packages are missing or damaged.
    """

    def __init__(self, plan: FeaturePlan):
        self._plan = plan
        self._made: dict[str, Any] = {}

    def latents(self, frames: Iterator[tuple[int, np.ndarray]], seed: int) -> Iterator[np.ndarray]:
        """(frame number, `[H, W, 3]` in [-1, 1]) to scaled posterior samples `[h, w, 4]`."""
        return self._opened("vae", self._vae).encode(frames, seed)

    def tokens(self, name: str, samples: np.ndarray) -> np.ndarray:
        """16 kHz samples `[640 T]` to tokens `[T, 2, D]` of the encoder of that name."""
        return self._opened(name, lambda: self._speech(name))(samples)

    def occluder(self):
        """What follows clicks with SAM 2, or None without weights."""
        if "occluder" not in self._plan.weights:
            return None
        from keysync_jax.data_pipeline.prepare.occluder import ClickMasker

        return self._opened("occluder", lambda: ClickMasker(self._plan.weights["occluder"], self._plan.occlusion_backend))

    def _opened(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            try:
                self._made[name] = make()
            except KeySyncError as error:
                raise EncoderError(str(error)) from error
        return self._made[name]

    def _vae(self):
        from keysync_jax.core.compile_cache import use_compile_cache
        from keysync_jax.encoders.latents import LatentCoder
        from keysync_jax.parallel.mesh import data_mesh

        use_compile_cache()
        return LatentCoder(self._plan.vae, self._directory().params("vae"), data_mesh(), microbatch=MICROBATCH)

    def _speech(self, name: str):
        if name in registry.COLUMNS:
            return registry.COLUMNS[name].open(self._plan.weights[name])
        from keysync_jax.converters import assemble_audio
        from keysync_jax.encoders.audio_features import AudioFeatures

        config = self._plan.encoders[name]
        if name in self._plan.weights:
            part, _ = assemble_audio.open_encoder(name, self._plan.weights[name])
            return AudioFeatures(config, to_flax(registry.audio_table(config), part.tensors, self._plan.weights[name]))
        return AudioFeatures(config, self._directory().params(f"audio/{name}") if registry.has_weights(name) else {})

    def _directory(self):
        from keysync_jax.converters import model_directory

        return self._opened("directory", lambda: model_directory.load(self._plan.model, complete=False))


def compute(
    item: Item, work: Sequence[ClipWork], plan: FeaturePlan, encoders: Encoders, seconds: dict[str, float]
) -> Iterator[tuple[ClipWork, dict[str, dict[str, np.ndarray]] | KeySyncError]]:
    """Values of an item's clips, one clip after the other, decoding the video at most once.

    Args:
      work: in time order.
      seconds: seconds of work per kind of feature are added here.

    Yields:
      The clip's work and, per group name, the columns' arrays: `[n, *shape]`; for "jpeg" the pictures' bytes behind one another as
      uint8 and their ends as int64 (`jpeg`, `jpeg_ends`). Or, instead, the error that speaks against the clip: values that are not
      finite or do not fit float16, sidecars that do not fit, a file that is not as it was.
    """
    samples = load_sound(item).samples
    crops = _Crops(item, plan.crop_size, work[0].keyframes)
    try:
        for entry in work:
            try:
                values = _clip(item, entry, plan, encoders, samples, crops, seconds)
            except EncoderError:
                raise
            except KeySyncError as error:
                yield entry, error
            else:
                yield entry, values
    finally:
        crops.close()


def _clip(item: Item, entry: ClipWork, plan: FeaturePlan, encoders: Encoders, samples: np.ndarray, crops: _Crops, seconds: dict) -> dict:
    clip = entry.clip
    names = {column.name for group in entry.groups for column in group.columns}
    values: dict[str, np.ndarray] = {}
    if names & {LATENT, "jpeg"}:
        values |= _pictures(entry, plan, encoders, crops, names, seconds)
    span = slice(clip.first * SAMPLES_PER_FRAME, (clip.first + clip.num_frames) * SAMPLES_PER_FRAME)
    heard = samples[span]
    heard = np.pad(heard, (0, clip.num_frames * SAMPLES_PER_FRAME - len(heard)))
    for name in sorted(names):
        start = time.perf_counter()
        if name.startswith(AUDIO_PREFIX):
            values[name] = checked_float16(encoders.tokens(name.removeprefix(AUDIO_PREFIX), heard), f"clip {clip.id!r}: {name}")
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
    if SOUND in names:
        values[SOUND] = int16_sound(heard).reshape(-1, SAMPLES_PER_FRAME)
    if LANDMARKS in names:
        values[LANDMARKS] = entry.landmarks
    if "valence" in names:
        values |= sidecars.emotion(item, entry.sources)
    if "occluder" in names:
        start = time.perf_counter()
        rows, cols = next(c.shape for g in entry.groups for c in g.columns if c.name == "occluder")
        values["occluder"] = sidecars.occluder(item, entry, (rows, cols), plan.crop_size, encoders.occluder())
        seconds["occluder"] = seconds.get("occluder", 0.0) + time.perf_counter() - start
    for name, array in values.items():
        if name not in ("jpeg", "jpeg_ends") and len(array) != clip.num_frames:
            raise KeySyncError(f"clip {clip.id!r}: {name} has {len(array)} frames, not {clip.num_frames}")
    return {
        group.name: {c.name: values[c.name] for c in group.columns} | ({"jpeg_ends": values["jpeg_ends"]} if group.name == "jpeg" else {})
        for group in entry.groups
    }


def _pictures(
    entry: ClipWork, plan: FeaturePlan, encoders: Encoders, crops: _Crops, names: set[str], seconds: dict[str, float]
) -> dict[str, np.ndarray]:
    """Latents and JPEGs of a clip; at most a few microbatches of pixels are in memory."""
    pictures: list[bytes] = []
    spent = {"decode": 0.0, "jpeg": 0.0}

    def frames() -> Iterator[tuple[int, np.ndarray]]:
        for number, source in enumerate(entry.sources.tolist()):
            start = time.perf_counter()
            crop = crops.at(source, Crop(*entry.clip.crop))
            spent["decode"] += time.perf_counter() - start
            if "jpeg" in names:
                start = time.perf_counter()
                pictures.append(encode_jpeg(crop, plan.jpeg_quality))
                spent["jpeg"] += time.perf_counter() - start
            yield number, crop.astype(np.float32) / 127.5 - 1

    start = time.perf_counter()
    values: dict[str, np.ndarray] = {}
    if LATENT in names:
        # The posterior sample of a frame depends on the run's seed, the clip and the frame's number, on nothing else.
        seed = derived_seed(plan.seed, "posterior", entry.clip.id)
        latents = [checked_float16(z, f"clip {entry.clip.id!r}: latent") for z in encoders.latents(frames(), seed)]
        values[LATENT] = np.stack(latents)
    else:
        for _ in frames():
            pass
    total = time.perf_counter() - start
    for name, value in (*spent.items(), ("latent", total - sum(spent.values()))):
        seconds[name] = seconds.get(name, 0.0) + value
    if "jpeg" in names:
        values["jpeg"] = np.frombuffer(b"".join(pictures), np.uint8)
        values["jpeg_ends"] = np.cumsum([len(p) for p in pictures], dtype=np.int64)
    return values


class _Crops:
    """Crops of ascending source frames from one pass over a video, which skips what lies between clips where that is quicker."""

    def __init__(self, item: Item, size: int, keyframes: Sequence[video.Keyframe]):
        self._path, self._size, self._keyframes = item.path, size, keyframes
        self._reader: video.VideoReader | None = None
        self._frame: video.Frame | None = None

    def at(self, source: int, crop: Crop) -> np.ndarray:
        """uint8 `[size, size, 3]`; asking for a frame before the last one starts again."""
        if self._reader is None or (self._frame is not None and not self._near(self._frame.index, source)):
            self.close()
            self._reader, self._frame = video.read(self._path, start=source, keyframes=self._keyframes), None
        while self._frame is None or self._frame.index < source:
            self._frame = next(self._reader, None)
            if self._frame is None:
                raise KeySyncError(f"{self._path} ends before frame {source}, which was there before; was the file changed?")
        return extract(self._frame.rgb(), crop, self._size)

    def _near(self, here: int, source: int) -> bool:
        """Whether going on from a frame is the way to another: it is not behind, nor does a keyframe far ahead lead to it."""
        return here <= source and all(k.index <= here + _FAR for k in self._keyframes if k.index <= source)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def int16_sound(samples: np.ndarray) -> np.ndarray:
    """float32 samples in [-1, 1] as int16. Readers divide by 32768, so that 16-bit sources come back as they were."""
    return np.clip(np.rint(samples * 32768), -32768, 32767).astype(np.int16)


def encode_jpeg(crop: np.ndarray, quality: int) -> bytes:
    """A crop uint8 `[H, W, 3]` as JPEG with full chroma resolution (lips are small and red)."""
    out = io.BytesIO()
    Image.fromarray(crop).save(out, "jpeg", quality=quality, subsampling=0)
    return out.getvalue()


def rows(arrays: Mapping[str, np.ndarray], group: Group, start: int, stop: int) -> dict[str, Any]:
    """Frames start..stop-1 of a stored entry, as `records.encode_clip` wants them."""
    out: dict[str, Any] = {}
    for column in group.columns:
        if column.is_jpeg:
            ends = [0, *arrays["jpeg_ends"].tolist()]
            data = arrays["jpeg"].tobytes()
            out[column.name] = [data[ends[i] : ends[i + 1]] for i in range(start, stop)]
        else:
            out[column.name] = arrays[column.name][start:stop]
    return out


def entry_name(group: Group, clip: str) -> str:
    """Name of the work entry of a clip's values in a group."""
    return clip if group.name == BASE else f"{clip}.{group.name}"


def settle_jax() -> None:
    """What a worker wants of JAX; to be called before it starts.

    Several workers share an accelerator: none may take all of its memory at once. And on a CPU, XLA splits sums over as many threads as
    there are cores, which changes their last bits: with a fixed number, machines of different size write the same bytes.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["NPROC"] = _CPU_THREADS
    cpu.prepare()


@contextlib.contextmanager
def as_it_was() -> Iterator[None]:
    """Takes back what `settle_jax` sets, where the worker is this process: what it starts later, a batch of dubs say, computes as ever."""
    before = {name: os.environ.get(name) for name in ("XLA_PYTHON_CLIENT_PREALLOCATE", "NPROC")}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
