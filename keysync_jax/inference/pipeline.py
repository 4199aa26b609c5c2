"""`KeySyncPipeline`: the Python door to a model directory."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import WEAK_PARTS, StageConfig
from keysync_jax.converters import model_directory
from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.core import assets
from keysync_jax.core.errors import UsageError
from keysync_jax.core.files import check_target, write_atomically, write_text
from keysync_jax.diffusion.guidance import WEAK
from keysync_jax.encoders.audio_features import AudioFeatures, Hearing
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import lengths, preview, two_stage
from keysync_jax.inference.analysis import look
from keysync_jax.inference.animate import AnimateJob, AnimateResult
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.inference.clip_io import open_video, open_voice
from keysync_jax.inference.dub import DubJob, DubResult, mask_of
from keysync_jax.inference.engine import StageSampler
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import CancelHandle, OnProgress, PhaseProgress
from keysync_jax.parallel.mesh import data_mesh


class KeySyncPipeline:
    """A loaded model that dubs clips, or, where it is KeyFace's, animates pictures.

        pipe = KeySyncPipeline.from_pretrained("model")
        result = pipe("talk.mp4", "voice.wav", "dubbed.mp4")
        print(result.summary)

    The parts are public and may be replaced by others that are called alike; they read their weights when they are first used.

    Attributes:
      keyframe: first stage, from `Window`s to scaled latents `[T, h, w, 4]` each; its `config` says what T, h and w are.
      interpolation: second stage, the same.
      vae: `encode` takes (number, frame `[H, W, 3]` in [-1, 1]) pairs to scaled latents `[h, w, 4]`, `decode` those to frames in [0, 1].
      encoders: by name (of `config.AUDIO_ENCODERS`) a speech encoder, from a waveform `[S]` at 16 kHz to features `[F, 2, D]`, two
        tokens for each frame of 40 ms. One that is not set is opened when it is asked for.
      mesh: the devices.
    """

    def __init__(
        self,
        directory: ModelDirectory,
        *,
        dtype: str | None = None,
        microbatch: int = 1,
        devices: Sequence[Any] | None = None,
    ):
        if microbatch < 1:
            raise UsageError(f"microbatch is {microbatch}; it must be at least 1")
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self.mesh = data_mesh(devices)
        self.encoders: dict[str, Hearing] = _Encoders(directory)
        # float32 always: the VAE is cheap beside the U-Net and bf16 shows in flat skin.
        self.vae = LatentCoder(directory.vae, lambda: directory.params("vae"), self.mesh, microbatch=2)
        self._directory = directory
        self._dtype = jnp.dtype(dtype)
        self._microbatch = microbatch

    @functools.cached_property
    def keyframe(self) -> StageSampler:
        """The first stage."""
        return self._stage("keyframe")

    @functools.cached_property
    def interpolation(self) -> StageSampler:
        """The second stage."""
        return self._stage("interpolation")

    @property
    def samplers(self) -> dict[str, StageSampler]:
        """Both stages by name."""
        return {"keyframe": self.keyframe, "interpolation": self.interpolation}

    @property
    def stages(self) -> dict[str, StageConfig]:
        """What each stage is and was trained for."""
        return {name: sampler.config for name, sampler in self.samplers.items()}

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **options: Any) -> KeySyncPipeline:
        """Open a model directory: local, `gs://…`, `hub:owner/name`, or "demo", the bundled one that draws cartoon mouths.

        Args:
          path: where it is.
          **options: `dtype` ("float32" or "bfloat16"), `microbatch` (windows per device and call), `devices`.

        Raises:
          KeySyncError: no model directory there, a part missing, or parts that do not belong together.
        """
        return cls(model_directory.load(assets.resolve(path)), **options)

    def save_pretrained(self, path: str | os.PathLike) -> None:
        """Write the model directory to `path`; it must not exist or be empty."""
        self._directory.save(path)

    def __call__(
        self,
        video: str | os.PathLike | np.ndarray,
        audio: str | os.PathLike | np.ndarray,
        output: str | os.PathLike | None = None,
        *,
        fps: float | Fraction | None = None,
        rate: int | None = None,
        options: DubOptions | None = None,
        report: str | os.PathLike | None = None,
        progress: bool = False,
        on_progress: OnProgress | None = None,
        cancel: CancelHandle | None = None,
    ) -> DubResult:
        """Dub `video` with the voice in `audio`.

        Files and arrays go the same way and may be mixed. `pipe(frames, samples, fps=25, rate=16000).frames` never touches a disk but for
        scratch files.

        Args:
          video: source video file, or frames uint8 `[N, H, W, 3]` RGB.
          audio: audio file or a video whose track is used, or samples `[S]`, floats with full scale 1.
          output: file to write. Default: `<video>_dubbed.mp4` beside a video file; of frames, none: the result holds the frames,
            uint8 `[N, H, W, 3]`.
          fps: of frames: how many a second.
          rate: of samples: how many a second.
          options: settings; default the model's own.
          report: also write the report to this JSON file.
          progress: show progress bars on stderr.
          on_progress: called with (phase, done, total) when a phase begins and after each frame or window of it; phases are look, listen,
            encode, keyframes, interpolate and compose, `total` is None where it is not known. What it raises ends the job.
          cancel: a `threading.Event` or the like; once it is set, the job ends at the next frame or window.

        However the job ends early, no file of it is left.

        Raises:
          UsageError: the output or the report would replace an input or each other, or arrays of another kind.
          CancelledError: `cancel` was set.
          KeySyncError: see the phases of `DubJob`.
        """
        given = ((video, "the video"), (audio, "the voice"))
        inputs = {Path(path).resolve(): what for path, what in given if not isinstance(path, np.ndarray)}
        if output is None and not isinstance(video, np.ndarray):
            output = Path(video).with_name(f"{Path(video).stem}_dubbed.mp4")
        if output is not None:
            output = os.fspath(output)
            _keep(inputs, output, "output")
            inputs[Path(output).resolve()] = "the output"
        if report is not None:
            check_target(report, "--report")
            _keep(inputs, report, "report")
        shown = PhaseProgress(progress, on_progress, cancel)
        with self.open_job(video, audio, output, fps=fps, rate=rate, options=options, progress=shown) as job:
            job.look()
            job.listen()
            job.encode()
            two_stage.generate(self.samplers, [job.clip], shown)
            result = job.compose()
        if report is not None:
            write_text(report, json.dumps(result.report, indent=1) + "\n")
        return result

    def animate(
        self,
        image: str | os.PathLike | np.ndarray,
        audio: str | os.PathLike | np.ndarray,
        output: str | os.PathLike | None = None,
        *,
        rate: int | None = None,
        options: AnimateOptions | None = None,
        report: str | os.PathLike | None = None,
        progress: bool = False,
        on_progress: OnProgress | None = None,
        cancel: CancelHandle | None = None,
    ) -> AnimateResult:
        """Make the person in `image` say the voice in `audio`; for KeyFace models.

        Args:
          image: a picture or a video file, or a picture as uint8 `[H, W, 3]` RGB.
          audio: audio file or a video whose track is used, or samples `[S]`, floats with full scale 1.
          output: file to write; None: the result holds the frames, uint8 `[N, H, W, 3]`, 25 a second.
          rate: of samples: how many a second.
          options: settings; default the model's own, neutral.
          report: also write the report to this JSON file, and the picture of the emotion beside it (`….emotion.png`).
          progress, on_progress, cancel: see `__call__`; phases are look, listen, encode, keyframes, interpolate and compose.

        However the job ends early, no file of it is left.

        Raises:
          UsageError: the output or the report would replace an input or each other, or arrays of another kind.
          CancelledError: `cancel` was set.
          KeySyncError: see `AnimateJob`.
        """
        given = ((image, "the picture"), (audio, "the voice"))
        inputs = {Path(path).resolve(): what for path, what in given if not isinstance(path, np.ndarray)}
        output = None if output is None else os.fspath(output)
        picture = None if report is None else Path(report).with_suffix(".emotion.png")
        for path, what in ((output, "output"), (report, "report"), (picture, "picture of the emotion")):
            if path is not None:
                _keep(inputs, path, what)
                inputs[Path(path).resolve()] = f"the {what}"
        if report is not None:
            check_target(report, "--report")
        shown = PhaseProgress(progress, on_progress, cancel)
        with self.open_animation(image, audio, output, rate=rate, options=options, progress=shown) as job:
            job.prepare()
            two_stage.generate(self.samplers, [job.clip], shown)
            result = job.compose()
        if report is not None and picture is not None:
            write_atomically(picture, lambda path: result.emotion.save(path, "png"))
            result.report["emotion"]["picture"] = picture.name
            write_text(report, json.dumps(result.report, indent=1) + "\n")
        return result

    def open_animation(
        self,
        image: str | os.PathLike | np.ndarray,
        audio: str | os.PathLike | np.ndarray,
        output: str | None = None,
        *,
        rate: int | None = None,
        options: AnimateOptions | None = None,
        progress: PhaseProgress | None = None,
    ) -> AnimateJob:
        """An animation to be led through its phases by the caller, who may take several through `two_stage.generate` together.

        Args:
          image, audio, output, rate, options: see `animate`.
          progress: told how far each phase is.

        Raises:
          KeySyncError: a voice that cannot be read, and what `AnimateJob` refuses.
        """
        options = options or AnimateOptions()
        voice = open_voice(audio, rate, options.audio_stream, options.voice_channel)
        return AnimateJob(self, image, voice, output, options, progress or PhaseProgress())

    def open_job(
        self,
        video: str | os.PathLike | np.ndarray,
        audio: str | os.PathLike | np.ndarray,
        output: str | None = None,
        *,
        fps: float | Fraction | None = None,
        rate: int | None = None,
        options: DubOptions | None = None,
        progress: PhaseProgress | None = None,
    ) -> DubJob:
        """A job to be led through its phases by the caller, who may take several through `two_stage.generate` together.

        Args:
          video, audio, output, fps, rate, options: see `__call__`; here no output means frames.
          progress: told how far each phase is.

        Raises:
          KeySyncError: files that cannot be read, and what `DubJob` refuses.
        """
        options = options or DubOptions()
        source = open_video(video, fps, options.video_stream, options.allow_damaged)
        voice = open_voice(audio, rate, options.audio_stream, options.voice_channel)
        source = lengths.fitted(source, voice.sound, options.mismatch, from_file=not isinstance(video, np.ndarray))
        return DubJob(self, source, voice, output, options, progress or PhaseProgress())

    def preview(
        self,
        video: str | os.PathLike | np.ndarray,
        *,
        fps: float | Fraction | None = None,
        options: DubOptions | None = None,
        progress: bool = False,
        on_progress: OnProgress | None = None,
        cancel: CancelHandle | None = None,
    ) -> np.ndarray:
        """A picture of what a dub would work on, uint8 `[h, w, 3]` RGB: one frame of each shot with the crop and the mask in it.

        Only faces are looked for; no network of the model runs and no weights are read.

        Args:
          video, fps, progress, on_progress, cancel: see `__call__`; the only phase is look.
          options: `face`, `faces` and `mask` count.

        Raises:
          KeySyncError: a video that cannot be read or shows no face, or stages of different masks and none chosen.
        """
        options = options or DubOptions()
        source = open_video(video, fps, options.video_stream, options.allow_damaged)
        mask = mask_of(self.stages, options)
        analysis = look(source, options, PhaseProgress(progress, on_progress, cancel))
        return preview.draw(source, analysis, self.keyframe.config, mask)

    def describe(self) -> dict[str, Any]:
        """What the model directory holds, for the report: path, parts, their configs and hashes."""
        return self._directory.describe()

    def _stage(self, name: str) -> StageSampler:
        directory = self._directory
        weak = next((part for part, stage in WEAK_PARTS.items() if stage == name and part in directory.parts), None)
        others = {WEAK: lambda: directory.params(weak)} if weak else None
        return StageSampler(
            directory.stage(name), lambda: directory.params(name), self.mesh, dtype=self._dtype, microbatch=self._microbatch, others=others
        )


class _Encoders(dict[str, Hearing]):
    """Speech encoders of a model directory, opened when they are asked for."""

    def __init__(self, directory: ModelDirectory):
        super().__init__()
        self._directory = directory

    def __missing__(self, name: str) -> AudioFeatures:
        self[name] = encoder = AudioFeatures(self._directory.audio(name), self._directory.params(f"audio/{name}"))
        return encoder


def _keep(taken: Mapping[Path, str], path: str | os.PathLike, what: str) -> None:
    """Refuses to write over a file that the same job reads or writes."""
    role = taken.get(Path(path).resolve())
    if role is not None:
        raise UsageError(f"the {what} {path} would replace {role}; name another file")
