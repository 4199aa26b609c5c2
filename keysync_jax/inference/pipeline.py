"""`KeySyncPipeline`: the Python door to a model directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from keysync_jax import assets
from keysync_jax.converters import model_directory
from keysync_jax.core.errors import UsageError
from keysync_jax.core.files import check_target, write_text
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import dub as job
from keysync_jax.inference.engine import StageSampler
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import StageProgress
from keysync_jax.parallel.mesh import data_mesh


class KeySyncPipeline:
    """A loaded model that dubs clips.

        pipe = KeySyncPipeline.from_pretrained("model")
        result = pipe("talk.mp4", "voice.wav", "dubbed.mp4")
        print(result.summary)

    Parts are read from disk when they are first needed and stay for the next clip.
    """

    def __init__(
        self,
        directory: model_directory.ModelDirectory,
        *,
        dtype: str | None = None,
        microbatch: int = 1,
        devices: list[jax.Device] | None = None,
    ):
        self._directory = directory
        self.stages = {name: directory.stage(name) for name in ("keyframe", "interpolation")}
        self._mesh = data_mesh(devices)
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        self._dtype = jnp.dtype(dtype)
        if microbatch < 1:
            raise UsageError(f"microbatch is {microbatch}; it must be at least 1")
        self._microbatch = microbatch
        self._cache: dict[Any, Any] = {}

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
        video: str | os.PathLike,
        audio: str | os.PathLike,
        output: str | os.PathLike | None = None,
        *,
        options: DubOptions | None = None,
        report: str | os.PathLike | None = None,
        progress: bool = False,
    ) -> job.DubResult:
        """Dub `video` with the voice in `audio`.

        Args:
          video: source video file.
          audio: audio file, or a video whose track is used.
          output: file to write; default `<video>_dubbed.mp4` beside the video.
          options: settings; default the model's own.
          report: also write the report to this JSON file.
          progress: show progress bars on stderr.

        Raises:
          UsageError: the output or the report would replace an input or each other.
          KeySyncError: see `job.dub`.
        """
        video = os.fspath(video)
        output = os.fspath(output) if output is not None else str(Path(video).with_name(f"{Path(video).stem}_dubbed.mp4"))
        inputs = {Path(video).resolve(): "the video", Path(audio).resolve(): "the voice"}
        _keep(inputs, output, "output")
        if report is not None:
            check_target(report, "--report")
            _keep(inputs | {Path(output).resolve(): "the output"}, report, "report")
        result = job.dub(self, video, os.fspath(audio), output, options or DubOptions(), StageProgress(progress))
        if report is not None:
            write_text(report, json.dumps(result.report, indent=1) + "\n")
        return result

    # What a job asks for ----------------------------------------------------------------------------------------------------

    def sampler(self, stage: str, num_steps: int) -> StageSampler:
        """The sampler of "keyframe" or "interpolation" with so many steps."""
        return self._cached(
            (stage, num_steps),
            lambda: StageSampler(
                self.stages[stage],
                self._directory.params(stage),
                self._mesh,
                num_steps=num_steps,
                dtype=self._dtype,
                microbatch=self._microbatch,
            ),
        )

    def coder(self) -> LatentCoder:
        """The autoencoder."""
        # float32 always: the VAE is cheap beside the U-Net and bf16 shows in flat skin.
        return self._cached("vae", lambda: LatentCoder(self._directory.vae, self._directory.params("vae"), self._mesh, microbatch=2))

    def features(self, encoder: str) -> AudioFeatures:
        """The speech encoder of that name, one of `config.AUDIO_ENCODERS`."""
        return self._cached(
            ("audio", encoder), lambda: AudioFeatures(self._directory.audio(encoder), self._directory.params(f"audio/{encoder}"))
        )

    def describe(self) -> dict[str, Any]:
        """What the model is, for the report: path, parts, their configs and hashes."""
        return self._directory.describe()

    def _cached(self, key: Any, make: Any) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def _keep(taken: Mapping[Path, str], path: str | os.PathLike, what: str) -> None:
    """Refuses to write over a file that the same job reads or writes."""
    role = taken.get(Path(path).resolve())
    if role is not None:
        raise UsageError(f"the {what} {path} would replace {role}; name another file")
