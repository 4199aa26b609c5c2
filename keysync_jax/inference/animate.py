"""One animation: a picture and a voice in, the talking face and a report out.

The phases are those of a dub, less the passes over a video: look (the picture and its face), listen, encode (one latent, which stands for
the person in every window, so that nothing accumulates), the two rounds of the networks, and compose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from PIL import Image

from keysync_jax.config import StageConfig
from keysync_jax.core.clock import SAMPLE_RATE
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules
from keysync_jax.diffusion.guidance import WEAK, of_stage
from keysync_jax.diffusion.sampler import require_networks
from keysync_jax.encoders.audio_features import Hearing, encoders_of, hear
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import animate_report, emotion_picture, portrait, two_stage
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.inference.clip_io import FrameCollector, VideoSink, Voice, array_info, marks_of, picture_of
from keysync_jax.inference.engine import StageSampler
from keysync_jax.inference.latent_store import LatentStore
from keysync_jax.inference.options import mark_of, require_system
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.portrait import Portrait
from keysync_jax.inference.window_plan import WindowPlan, WindowSizes, make_plan
from keysync_jax.media import audio as audio_io
from keysync_jax.media.encoding import choose_encoding
from keysync_jax.media.pasting import Paster
from keysync_jax.media.writer import VideoWriter, check_output

# Frames decoded together. Fixed, so that a frame's place in a microbatch never depends on the devices.
_COMPOSE_CHUNK = 16


class Model(Protocol):
    """What an animation needs of a loaded model (`KeySyncPipeline` provides it)."""

    @property
    def samplers(self) -> Mapping[str, StageSampler]: ...

    @property
    def vae(self) -> LatentCoder: ...

    @property
    def encoders(self) -> Mapping[str, Hearing]: ...

    def describe(self) -> dict[str, Any]: ...


class AnimateResult(NamedTuple):
    """What an animation made.

    Attributes:
      output: the file, None where frames were asked for.
      report: what was done, settings, timings.
      summary: the same in a line or two.
      emotion: picture of the emotion over time.
      frames: uint8 `[N, H, W, 3]` RGB, None where a file was asked for.
    """

    output: Path | None
    report: dict[str, Any]
    summary: str
    emotion: Image.Image
    frames: np.ndarray | None = None


class _Work(NamedTuple):
    """What encode leaves for the phases after it."""

    portrait: Portrait
    plan: WindowPlan
    emotion: dict[str, np.ndarray]
    generated: LatentStore
    clip: two_stage.Clip


class AnimateJob:
    """One animation on its way through `prepare`, `two_stage.generate` (of its `clip`) and `compose`.

    Scratch files belong to the job and lie beside its output; leaving the job, or `close`, removes them. Nothing stands at the output
    before `compose` is over.

    Args:
      model: the loaded model.
      source: the picture: a file, or uint8 `[H, W, 3]` RGB.
      voice: the voice.
      output: file to write; None keeps the frames in memory.
      options: settings.
      progress: told how far each phase is.

    Raises:
      UsageError, KeySyncError: what can be refused before any work: stages of another system, an emotion for a model that reads none, an
        impossible number of steps, an output that cannot be written.
    """

    def __init__(
        self, model: Model, source: str | os.PathLike | np.ndarray, voice: Voice, output: str | None, options: AnimateOptions,
        progress: PhaseProgress,
    ):  # fmt: skip
        self._model, self._source, self._voice, self._output = model, source, voice, output
        self._options, self._progress = options, progress
        self._notes: list[str] = []
        require_system(model.samplers, "keyface")
        self._stages = {name: self._guided(name, sampler) for name, sampler in model.samplers.items()}
        keyframe = self._stages["keyframe"]
        self._curve = options.curve()
        if not keyframe.emotion_dim and any(valence or arousal for _, valence, arousal in self._curve.points):
            raise KeySyncError(f"--emotion {options.emotion}: the model's keyframe stage reads no emotion (its emotion_dim is 0)")
        self._steps = keyframe.num_steps if options.steps is None else options.steps
        schedules.ays_sigmas(self._steps)  # refuses an impossible number
        if output is not None:
            extension = check_output(output).suffix.lower()
            choose_encoding(array_info(16, 16), extension, options.crf, options.lossless, codec=options.codec, pix_fmt=options.pix_fmt)
        self._mark = mark_of("animate", None if isinstance(source, np.ndarray) else os.fspath(source), options)
        self._work: _Work | None = None
        self._paster: Paster | None = None
        self._scratch = contextlib.ExitStack()

    def __enter__(self) -> AnimateJob:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the scratch files."""
        self._scratch.close()

    @property
    def clip(self) -> two_stage.Clip:
        """The windows to generate, after `prepare`."""
        return self._prepared().clip

    def prepare(self) -> None:
        """Looks at the picture, listens to the voice and encodes the person.

        Raises:
          UsageError, KeySyncError: a picture that cannot be read or shows no face, latents that are not finite, no space for scratch files.
        """
        with self._progress.phase("look", 1) as advance:
            sitter = portrait.sit(self._source, self._options)
            advance()
        stages = self._stages.values()
        with self._progress.phase("listen", len(encoders_of(stages))) as advance:
            features = hear(stages, self._model.encoders, self._voice.sound.samples, advance)
        keyframe = self._stages["keyframe"]
        with self._progress.phase("encode", 1) as advance:
            (identity,) = self._model.vae.encode([(0, sitter.pixels(keyframe.resolution))], self._options.seed)
            advance()
        frames = min(map(len, features.values()))
        sizes = WindowSizes.of(keyframe, self._stages["interpolation"])
        plan = make_plan(frames, sizes.segment, keyframe_window=sizes.keyframes)
        shape = (keyframe.latent_size, keyframe.latent_size, keyframe.unet.out_channels)
        generated = LatentStore(self._new_scratch() / "generated", shape)
        self._scratch.callback(generated.close)
        emotion = self._curve.sampled(frames)
        stretch = two_stage.Stretch(
            plan, features, None, None, write=generated.__setitem__, identity=identity,
            emotion=emotion if keyframe.emotion_dim else {},
        )  # fmt: skip
        guidance = {name: of_stage(stage).needed() for name, stage in self._stages.items()}
        clip = two_stage.Clip([stretch], self._options.seed, self._steps, guidance)
        self._work = _Work(sitter, plan, emotion, generated, clip)

    def compose(self) -> AnimateResult:
        """Decodes the generated frames and writes the output.

        Raises:
          KeySyncError: the clip failed on the devices, non-finite pictures, or an output that cannot be written; nothing is left at it.
        """
        work = self._prepared()
        if work.clip.error is not None:
            raise work.clip.error
        if not work.clip.finished:
            raise RuntimeError("the job has not been through generate yet")
        frames = work.plan.num_frames_out
        with self._progress.phase("compose", frames) as advance, self._open_sink(work.portrait) as sink:
            for index, image in enumerate(self._decoded(work)):
                picture = picture_of(self._shown(image, work.portrait))
                picture.pts, picture.time_base = index, array_info(16, 16).time_base
                sink.write(picture)
                advance()
        return self._result(work, sink)

    def _guided(self, name: str, sampler: StageSampler) -> StageConfig:
        """A stage with its guidance; without the worse network that it asks, without autoguidance."""
        stage = self._options.guided(sampler.config)
        if isinstance(sampler, StageSampler):  # what a person put in its place says itself what it cannot do
            if stage.guidance.kind == "auto" and WEAK not in sampler.networks:
                if stage.guidance.scale != 1:
                    self._notes.append(f"the model has no {name}_bad, so the {name} stage goes without autoguidance (as with scale 1)")
                stage = dataclasses.replace(stage, guidance=dataclasses.replace(stage.guidance, kind="none"))
            require_networks(of_stage(stage).needed(), sampler.networks)
        return stage

    def _prepared(self) -> _Work:
        if self._work is None:
            raise RuntimeError("the job has not been prepared yet")
        return self._work

    def _new_scratch(self) -> Path:
        parent = None if self._output is None else Path(self._output).resolve().parent
        return Path(self._scratch.enter_context(tempfile.TemporaryDirectory(prefix=".keysync-", dir=parent)))

    def _decoded(self, work: _Work) -> Iterator[np.ndarray]:
        """Frames `[R, R, 3]` in [0, 1], in order."""
        numbers = iter(range(work.plan.num_frames_out))
        while chunk := list(itertools.islice(numbers, _COMPOSE_CHUNK)):
            yield from self._model.vae.decode([work.generated[number] for number in chunk])

    def _shown(self, image: np.ndarray, sitter: Portrait) -> np.ndarray:
        """A frame as it is written, uint8 `[H, W, 3]`."""
        if self._options.paste:
            if self._paster is None:
                self._paster = Paster(sitter.rgb, sitter.square, len(image))
            return self._paster(image)
        size = self._options.size or len(image)
        if size != len(image):
            image = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA if size < len(image) else cv2.INTER_CUBIC)
        return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)

    def _open_sink(self, sitter: Portrait) -> VideoSink:
        side = self._options.size or self._stages["keyframe"].resolution
        height, width = sitter.rgb.shape[:2] if self._options.paste else (side, side)
        info = array_info(width, height)
        if self._output is None:
            return FrameCollector(info)
        voice = self._voice.path
        if voice is None:  # what is played must be a file
            voice = str(self._new_scratch() / "voice.wav")
            audio_io.save_wav(voice, self._voice.sound.samples, SAMPLE_RATE)
        options = self._options
        return VideoWriter(
            self._output, info, audio=voice, audio_stream=options.audio_stream, crf=options.crf, lossless=options.lossless,
            codec=options.codec, pix_fmt=options.pix_fmt, language=options.language, mark=self._mark,
        )  # fmt: skip

    def _result(self, work: _Work, sink: VideoSink) -> AnimateResult:
        step = self._stages["interpolation"].num_frames - 1
        keyframes = [frame for frame in range(0, work.plan.num_frames_out, step)]
        done = animate_report.Done(
            model=self._model.describe(),
            source=None if isinstance(self._source, np.ndarray) else os.fspath(self._source),
            portrait=work.portrait,
            frames=work.plan.num_frames_out,
            keyframes=keyframes,
            emotion=work.emotion,
            curve=self._curve,
            voice=self._voice.sound,
            audio_note=sink.audio_note,
            notes=[*self._notes, *work.portrait.notes, *self._voice.sound.notes, *_said(sink)],
            options=self._options,
            steps=self._steps,
            stages=self._stages,
            seam=self._paster.figures() if self._paster else None,
            seconds=self._progress.seconds,
            marks=marks_of(self._mark, sink),
        )
        report = animate_report.build(done)
        frames = np.stack(sink.frames) if isinstance(sink, FrameCollector) else None
        where = None if self._output is None else Path(self._output)
        picture = emotion_picture.draw(work.emotion, keyframes, f"emotion: {self._options.emotion}")
        return AnimateResult(where, report, animate_report.summary(report, self._output or "frames"), picture, frames)


def _said(sink: VideoSink) -> list[str]:
    """What the writer has to say, but for how it was handed the frames: nobody chose that format."""
    return [note for note in sink.notes if not note.startswith(f"{array_info(16, 16).pix_fmt} ")]
