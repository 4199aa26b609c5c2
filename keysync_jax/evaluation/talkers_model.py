"""A model on drawn talkers, straight from arrays: exact landmarks, no files, windows of several clips in one stream.

Crop, masks, window plan, samplers, VAE and compositing are the dub's own, so what is judged here is what a dub would show.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip
from keysync_jax.diffusion.guidance import of_stage
from keysync_jax.encoders.audio_features import encoders_of, hear
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import two_stage
from keysync_jax.inference.clip_io import array_info, picture_of
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.pipeline import KeySyncPipeline
from keysync_jax.inference.window_plan import KeyframeWindow, Slot, WindowPlan, WindowSizes, make_plan
from keysync_jax.media import crop as cropping
from keysync_jax.media import masks
from keysync_jax.media.compositing import Compositor
from keysync_jax.media.crop import Crop

MODES = ("dub", "keyframes", "one stage")
# Room for the windows of one clip among the indices that key the noise.
_WINDOWS_PER_CLIP = 4096


@dataclasses.dataclass(frozen=True)
class Scales:
    """Guidance (audio, identity) of each stage."""

    keyframe: tuple[float, float]
    interpolation: tuple[float, float]

    @property
    def text(self) -> str:
        first, second = (f"{audio:g}/{identity:g}" for audio, identity in (self.keyframe, self.interpolation))
        return first if first == second else f"{first}:{second}"


def parse_grid(text: str) -> list[Scales]:
    """ "5/2,2.5/1.5:1/1" to guidance scales: audio/identity, for both stages or keyframe:interpolation.

    Raises:
      UsageError: it does not read like that.
    """
    out = []
    for item in text.split(","):
        try:
            pairs = [(float(audio), float(identity)) for audio, identity in (pair.split("/") for pair in item.strip().split(":"))]
        except ValueError:
            pairs = []
        if len(pairs) not in (1, 2) or not all(0 <= scale < 100 for pair in pairs for scale in pair):
            raise UsageError(f"--guidance-grid {item.strip()!r} must read like 5/2 or 5/2:2.5/1.5 (audio/identity, keyframe:interpolation)")
        out.append(Scales(pairs[0], pairs[-1]))
    return out


class Prepared(NamedTuple):
    """A source clip as the network sees it."""

    number: int
    frames: np.ndarray  # uint8 [T, H, W, 3]
    crop: Crop
    known: np.ndarray  # [T, h, w, 4] scaled latents
    masks: np.ndarray  # bool [T, h, w]


class TalkerModel:
    """The parts of a model directory that an evaluation needs, compiled once.

    Args:
      directory: the opened model directory.
      mode: "dub" needs both stages, "keyframes" and "one stage" the keyframe stage alone.
      steps: sampler steps; None is the model's own number.
      microbatch: windows per device and call; None is 4 on a CPU and 16 elsewhere.
      dtype: compute type; None is float32 on a CPU and bfloat16 elsewhere.

    Raises:
      KeySyncError: the directory lacks a part, its stages were trained with different masks, or one stage is asked of a network that
        makes single frames.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        mode: str = "dub",
        *,
        steps: int | None = None,
        microbatch: int | None = None,
        dtype: str | None = None,
    ):
        on_cpu = jax.default_backend() == "cpu"
        self.mode = mode
        self.microbatch = microbatch or (4 if on_cpu else 16)
        self.dtype = dtype or ("float32" if on_cpu else "bfloat16")
        pipe = KeySyncPipeline(directory, dtype=self.dtype, microbatch=self.microbatch)
        self._samplers = {"keyframe": pipe.keyframe} | ({"interpolation": pipe.interpolation} if mode == "dub" else {})
        self.stages = {name: sampler.config for name, sampler in self._samplers.items()}
        self.keyframe = self.stages["keyframe"]
        regions = [config.mask for config in self.stages.values()]
        if regions[0] != regions[-1]:  # a dub refuses such a model too
            kinds = " and ".join(f"{region.kind} at landmark {region.nose_index}" for region in regions)
            raise KeySyncError(
                f"{directory.path}: its stages were trained with different masks ({kinds}); --keyframes-only judges the first"
            )
        self._sizes = WindowSizes.of(self.keyframe, self.stages.get("interpolation"))
        if mode == "one stage" and self._sizes.keyframes == 1:
            raise KeySyncError("the keyframe stage makes every frame on its own (num_frames is 1); --one-stage needs windows of frames")
        self.steps = self.keyframe.num_steps if steps is None else steps
        self.group = max(8, self.microbatch * pipe.mesh.devices.size)  # clips whose windows are streamed together
        # Frames at a time in proportion to the windows, which are many here.
        self._coder = LatentCoder(directory.vae, lambda: directory.params("vae"), pipe.mesh, microbatch=2 * self.microbatch)
        self._encoders = {name: pipe.encoders[name] for name in encoders_of(self.stages.values())}

    def own_scales(self) -> Scales:
        """The guidance written in the model's config."""
        last = self.stages.get("interpolation", self.keyframe)
        return Scales((self.keyframe.audio_scale, self.keyframe.identity_scale), (last.audio_scale, last.identity_scale))

    def num_windows(self, frames: int) -> int:
        """Windows that one dub of that many frames takes, for progress."""
        plan = self._plan(frames)
        return len(plan.keyframe_windows) + (len(plan.segments) if self.mode == "dub" else 0)

    def seams(self, frames: int) -> tuple[int, ...]:
        """The frames that, with the one before and the one after, come from two windows: where windows meet. None of keyframes alone."""
        if self.mode == "keyframes":
            return ()
        if self.mode == "one stage":  # windows that share no frame: the last of one and the first of the next
            starts = [window.frames[1] for window in one_stage_windows(frames, self.keyframe.num_frames)[1:]]
            found = {frame for start in starts for frame in (start - 1, start)}
        else:  # segments that share a keyframe
            found = {segment.frames[0] for segment in self._plan(frames).segments}
        return tuple(sorted(frame for frame in found if 0 < frame < frames - 1))

    def prepare(self, clips: Sequence[tuple[int, TalkerClip]], seed: int) -> list[Prepared]:
        """Crops, masks and latents of source clips, as the dub makes them but with the exact landmarks."""
        stage = self.keyframe
        grid = (stage.latent_size, stage.latent_size)
        crops = [place(clip) for _, clip in clips]
        images = (
            (number * _WINDOWS_PER_CLIP + i, image.astype(np.float32) / 127.5 - 1)
            for (number, clip), crop in zip(clips, crops, strict=True)
            for i, image in enumerate(cropping.extract(frame, crop, stage.resolution) for frame in clip.frames)
        )
        latents = self._coder.encode(images, seed)
        out = []
        for (number, clip), crop in zip(clips, crops, strict=True):
            points = cropping.to_crop_space(clip.landmarks, crop, stage.resolution).astype(int)
            region = masks.make_mask(points, stage.resolution, stage.resolution, stage.mask, target=grid) > 0
            known = np.stack([next(latents) for _ in clip.frames])
            out.append(Prepared(number, clip.frames, crop, known, region))
        return out

    def generate(
        self, clips: Sequence[Prepared], voices: Sequence[np.ndarray], scales: Scales, seed: int, tick: Callable[[], None] = lambda: None
    ) -> list[dict[int, np.ndarray]]:
        """Latents `[h, w, 4]` by frame number, for each clip with its new voice.

        Args:
          clips: the sources.
          voices: 16 kHz mono samples, one per clip.
          scales: guidance.
          seed: of the noise.
          tick: called after each window.

        Returns:
          Every frame ("dub", "one stage"), or the frames where keyframes stand ("keyframes").
        """
        tables: list[dict[int, np.ndarray]] = [{} for _ in clips]
        work = [self._clip(*each, scales, seed) for each in zip(clips, voices, tables, strict=True)]
        two_stage.generate(self._samplers, work, PhaseProgress(on_progress=lambda phase, done, total: done and tick()))
        for clip in work:
            if clip.error is not None:
                raise clip.error
        if self.mode == "dub":
            return tables
        found = [clip.stretches[0].keyframes for clip in work]
        if self.mode == "one stage":
            return found
        step = self._sizes.segment - 1
        # The last keyframe may stand for a place past the end of the clip, where it repeats the last frame.
        return [{min(k * step, len(c.frames) - 1): z for k, z in keys.items()} for c, keys in zip(clips, found, strict=True)]

    def compose(self, clips: Sequence[Prepared], latents: Sequence[dict[int, np.ndarray]]) -> Iterator[np.ndarray]:
        """Per clip the dubbed frames uint8 `[K, H, W, 3]`, in order of frame number: the source outside the mask."""
        images = self._coder.decode(table[frame] for table in latents for frame in sorted(table))
        for clip, table in zip(clips, latents, strict=True):
            height, width = clip.frames.shape[1:3]
            compositor = Compositor(array_info(width, height))
            frames = []
            for number in sorted(table):
                picture = picture_of(clip.frames[number])
                frames.append(compositor.composite(picture, next(images), clip.crop, clip.masks[number]).to_ndarray(format="gbrp"))
            yield np.stack(frames)

    def outside(self, clip: Prepared) -> np.ndarray:
        """bool `[T, H, W]`: pixels of the source that no masked cell covers; they must not change."""
        height, width = clip.frames.shape[1:3]
        cells = clip.masks.shape[1]
        rows = np.floor((np.arange(height) + 0.5 - clip.crop.y0) / clip.crop.side * cells).astype(int)
        columns = np.floor((np.arange(width) + 0.5 - clip.crop.x0) / clip.crop.side * cells).astype(int)
        padded = np.pad(clip.masks, ((0, 0), (1, 1), (1, 1)))  # what lies outside the crop is outside the mask
        rows, columns = (np.clip(index, -1, cells) + 1 for index in (rows, columns))
        return ~padded[:, rows[:, None], columns[None, :]]

    def _plan(self, frames: int) -> WindowPlan:
        if self.mode == "one stage":
            return WindowPlan(frames, one_stage_windows(frames, self.keyframe.num_frames), ())
        return make_plan(frames, self._sizes.segment, keyframe_window=self._sizes.keyframes)

    def _clip(self, clip: Prepared, voice: np.ndarray, table: dict[int, np.ndarray], scales: Scales, seed: int) -> two_stage.Clip:
        """What the rounds need of a clip; `table` receives the latents by frame."""
        features = hear(self.stages.values(), self._encoders, voice)
        shortest = min(map(len, features.values()))
        if shortest < len(clip.frames):
            raise KeySyncError(f"the voice gives {shortest} frames of features for a clip of {len(clip.frames)}")
        stretch = two_stage.Stretch(
            self._plan(len(clip.frames)), features, lambda frames: clip.known[frames], clip.masks, lambda f, z: table.update({f: z})
        )
        guidance = {
            name: of_stage(dataclasses.replace(config, audio_scale=audio, identity_scale=identity)).needed()
            for name, config in self.stages.items()
            for audio, identity in [getattr(scales, name)]
        }
        return two_stage.Clip([stretch], seed, self.steps, guidance, first_index=clip.number * _WINDOWS_PER_CLIP)


def one_stage_windows(frames: int, window: int) -> tuple[KeyframeWindow, ...]:
    """Consecutive frames in windows of the keyframe stage, each behind its identity slot: the ablation without interpolation.

    The `keyframe` of a slot is the frame itself. The last window is filled up with its last frame.
    """
    out = []
    for start in range(0, frames, window - 1):
        slots = [Slot(frame, frame) for frame in range(start, min(start + window - 1, frames))]
        out.append(KeyframeWindow(tuple([Slot(0, None), *slots] + [Slot(slots[-1].frame, None)] * (window - 1 - len(slots)))))
    return tuple(out)


def place(clip: TalkerClip) -> Crop:
    """The crop that a dub of this clip would choose, given its exact landmarks."""
    size = clip.frames.shape[1]
    return cropping.fixed_crop(clip.landmarks, (size, size))


def describe(model: TalkerModel) -> dict[str, Any]:
    """How the model was run, for the report."""
    return {"mode": model.mode, "steps": model.steps, "dtype": model.dtype, "microbatch": model.microbatch, "device": str(jax.devices()[0])}
