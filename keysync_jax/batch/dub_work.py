"""The work of a batch of dubs: one loaded model, one compilation of each shape, and clips side by side on the devices."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.batch import gate
from keysync_jax.batch.faults import MachineFault, out_of_device_memory
from keysync_jax.batch.inputs import content_digest, seconds_of
from keysync_jax.batch.job_list import Job
from keysync_jax.batch.own_rows import OwnRows
from keysync_jax.batch.worker import Outcome, Task
from keysync_jax.converters import model_directory
from keysync_jax.core import assets
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.compile_cache import use_compile_cache
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.version import __version__
from keysync_jax.data_pipeline.prepare.work import digest
from keysync_jax.inference import two_stage
from keysync_jax.inference.analysis import Analysis
from keysync_jax.inference.animate import AnimateJob
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.inference.clip_io import VideoFile, VideoSource
from keysync_jax.inference.dub import DubJob, mask_of
from keysync_jax.inference.known_latents import KnownLatents
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.pipeline import KeySyncPipeline
from keysync_jax.media import faces
from keysync_jax.media.compositing import Compositor

log = logging.getLogger(__name__)

# How long an item may take, seconds: before anything is known, an hour and an hour a second of video (a CPU at full size); after that ten
# times as long as the slowest item so far, second for second.
_START_S, _UNKNOWN_PER_S, _SLACK = 3600.0, 3600.0, 10.0
# Options that decide what is found in a video; items that differ in others share it.
_LOOKED_AT = ("face", "faces", "face_weights", "no_face", "video_stream", "allow_damaged", "mismatch")
_LOOKS_KEPT = 4  # of videos, a few hundred bytes a frame
_KNOWN_KEPT = 1  # of videos on the disk, 64 kB a frame at full size
_MOST_TOGETHER = 8  # clips whose latents lie on the disk at once


@dataclasses.dataclass(frozen=True)
class DubSettings:
    """What every item of a batch has in common.

    Attributes:
      model: model directory.
      dtype: compute type; None: that of the backend.
      microbatch: windows per device and call.
      gated: measure the results.
    """

    model: str
    dtype: str | None = None
    microbatch: int = 1
    gated: bool = True

    def recipe(self) -> dict[str, Any]:
        """What results depend on beside inputs and options; the quality gate is not among it.

        Raises:
          KeySyncError: no model directory there.
        """
        parts = model_directory.load(assets.resolve(self.model)).describe()["parts"]
        return {"keysync_jax": __version__, "model": digest(parts), "dtype": self.dtype or "default", "microbatch": self.microbatch}


class DubWork:
    """Dubs items; opened in each worker.

    Attributes:
      together: as many clips as there are devices, so that short ones fill them; one device is filled by each clip alone.
    """

    def __init__(self, settings: DubSettings):
        use_compile_cache()
        self._settings = settings
        self._pipelines = {settings.microbatch: self._pipeline(settings.microbatch)}
        devices = self._pipelines[settings.microbatch].mesh.devices.size
        self.together = min(_MOST_TOGETHER, devices)
        self.check()
        self._slowest: float | None = None  # seconds for a second of video
        self._looks: OrderedDict[str, Analysis] = OrderedDict()
        # Beside the scratch of the items, which goes with the worker.
        self._known: OrderedDict[str, KnownLatents] = OrderedDict()
        self._folder: tempfile.TemporaryDirectory | None = None

    def limit_s(self, job: Job) -> float:
        """See `worker.Work`; a clip that cannot be probed fails soon by itself."""
        try:
            length = seconds_of(job)
        except KeySyncError:
            length = 0.0
        if self._slowest is None:
            return _START_S + _UNKNOWN_PER_S * length
        return _START_S / 4 + _SLACK * self._slowest * length

    def check(self) -> None:
        """The model directory still holds what it held.

        Raises:
          MachineFault: it does not.
        """
        try:
            directory = model_directory.load(assets.resolve(self._settings.model))
            for part in directory.parts:
                directory.tensors(part)
        except (KeySyncError, OSError) as error:
            raise MachineFault(f"the model cannot be read: {error}") from error

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome | Exception]:
        """See `worker.Work`."""
        results = self._attempt(tasks, self._settings.microbatch)
        for task, result in zip(tasks, results, strict=True):
            for size in self._smaller(len(tasks) > 1):
                if not (isinstance(result, Exception) and out_of_device_memory(result)):
                    break
                log.warning("%s: the device has not enough memory; again alone with a microbatch of %d", task.job.id, size)
                task.target.unlink(missing_ok=True)
                (result,) = self._attempt([task], size)
            if isinstance(result, Exception) and out_of_device_memory(result):
                result = KeySyncError("the device has not enough memory for it, even with a microbatch of 1")
            yield result

    def _smaller(self, together: bool) -> Iterator[int]:
        """Microbatches to try an item with, alone, that did not fit."""
        size = self._settings.microbatch
        if together:
            yield size
        while size > 1:
            size //= 2
            yield size

    def _attempt(self, tasks: Sequence[Task], microbatch: int) -> list[Outcome | Exception]:
        for size in [each for each in self._pipelines if each not in (microbatch, self._settings.microbatch)]:
            del self._pipelines[size]
        if microbatch not in self._pipelines:
            self._pipelines.clear()  # two sets of weights may be more than the device holds
            self._pipelines[microbatch] = self._pipeline(microbatch)
        pipeline = self._pipelines[microbatch]
        results: list[Outcome | Exception | None] = [None] * len(tasks)
        begun: dict[int, _Begun] = {}
        generated = PhaseProgress()
        with contextlib.ExitStack() as stack:
            for place, task in enumerate(tasks):
                try:
                    begun[place] = stack.enter_context(self._begin(pipeline, task))
                except Exception as error:  # of this item, which fails alone
                    results[place] = error
            try:
                stages: dict[str, Any] = {name: OwnRows(each, each.config, microbatch) for name, each in pipeline.samplers.items()}
                two_stage.generate(stages, [each.job.clip for each in begun.values()], generated)
            except Exception as error:  # of them all: a device that ran out of memory
                return [result or error for result in results]
            for place, each in begun.items():
                try:
                    results[place] = self._finish(tasks[place], each, microbatch, generated.seconds)
                except Exception as error:
                    results[place] = error
        self._forget()
        return [result or RuntimeError("the item was not worked on") for result in results]

    @contextlib.contextmanager
    def _begin(self, pipeline: KeySyncPipeline, task: Task) -> Iterator[_Begun]:
        """A job that has been through all phases before the networks."""
        job = task.job
        if job.kind == "animate":
            options = AnimateOptions(**job.options)
            with pipeline.open_animation(job.video, job.audio, str(task.target), options=options) as animation:
                animation.prepare()
                yield _Begun(animation, None)
            return
        with pipeline.open_job(job.video, job.audio, str(task.target), options=DubOptions(**job.options)) as dub:
            read = {name: value for name, value in job.options.items() if name in _LOOKED_AT}
            # Of a film that is made as long as the voice, its length is among what was looked at.
            made = None if isinstance(dub.source, VideoFile) else dub.source.info.frames
            key = digest(content_digest(job.video), os.path.abspath(job.video), read, made)
            analysis = dub.look(self._looks.get(key))
            self._looks[key] = analysis
            self._looks.move_to_end(key)
            while len(self._looks) > _LOOKS_KEPT:
                self._looks.popitem(last=False)
            dub.listen()
            same = (key, dub.options.seed, dub.options.mask)
            dub.encode(self._known_of(digest(same), dub.latent_shape, task.target))
            yield _Begun(dub, analysis)

    def _known_of(self, key: str, shape: tuple[int, int, int], target: Path) -> KnownLatents:
        """Latents that items with the same video, faces, seed and mask share."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="known-", dir=target.parent.parent)
        if key not in self._known:
            self._known[key] = KnownLatents(Path(self._folder.name) / key, shape)
        self._known.move_to_end(key)
        return self._known[key]

    def _forget(self) -> None:
        """Of the latents, those of the last videos are kept; not while items are in hand, which read them."""
        while len(self._known) > _KNOWN_KEPT:
            key, oldest = self._known.popitem(last=False)
            oldest.close()
            if self._folder is not None:
                (Path(self._folder.name) / key).unlink(missing_ok=True)

    def _finish(self, task: Task, begun: _Begun, microbatch: int, generated: Mapping[str, float]) -> Outcome:
        result = begun.job.compose()
        report = result.report
        if begun.analysis is None:  # an animation: every frame is made
            made = {"video_seconds": report["frames"] / FRAME_RATE, "frames": report["frames"], "frames_dubbed": report["frames"]}
            made |= {"skipped": {}, "emotion": report["emotion"]["asked"]}
        else:
            made = {
                "video_seconds": round(float(begun.analysis.times[-1]), 3),
                "frames": report["source"]["frames"],
                "frames_dubbed": report["frames_dubbed"],
                "skipped": _skipped(report),
            }
        values = {
            **made,
            "notes": report["notes"],
            "microbatch": microbatch,
            "devices": report["devices"],
            "inputs": {"video": content_digest(task.job.video), "audio": content_digest(task.job.audio)},
            "phases": {**report["seconds"], **generated},  # those of the networks are of all clips that went through them together
        }
        if microbatch != self._settings.microbatch:
            values["halved"] = f"from a microbatch of {self._settings.microbatch}, for want of device memory"
        review: list[str] = []
        strip = None
        if self._settings.gated and begun.analysis is not None and isinstance(begun.job, DubJob):  # an animation has nothing to compare
            figures, strip = self._measure(task, begun.job.source, begun.analysis, self._pipelines[microbatch], report)
            missed = gate.missed(figures)
            values["figures"] = {name: round(value, 4) for name, value in figures.items()}
            values["missed"] = list(missed)
            review = list(missed.values())
        took = sum(values["phases"].values()) / max(values["video_seconds"], 0.04)
        self._slowest = max(self._slowest or 0.0, took)
        return Outcome(review, values, report, strip)

    def _measure(
        self, task: Task, source: VideoSource, analysis: Analysis, pipeline: KeySyncPipeline, report: Mapping[str, Any]
    ) -> gate.Measured:
        job, options = task.job, DubOptions(**task.job.options)
        stages = pipeline.stages
        mask, compositor = mask_of(stages, options), Compositor(analysis.info)

        def region(frame: int) -> np.ndarray:
            shot = analysis.shot_of(frame)
            return compositor.alpha(shot.view(frame), shot.mask(frame, stages["keyframe"], mask))

        with faces.open_backend(options.faces, **({"weights": options.face_weights} if options.face_weights else {})) as backend:
            return gate.measure(source, task.target, job.audio, analysis, report, region, backend, options.part.start_s)

    def _pipeline(self, microbatch: int) -> KeySyncPipeline:
        settings = self._settings
        return KeySyncPipeline.from_pretrained(assets.resolve(settings.model), dtype=settings.dtype, microbatch=microbatch)


def open_dub_work(settings: DubSettings) -> DubWork:
    """`WorkerSpec.open` of a batch of dubs."""
    return DubWork(settings)


class _Begun(NamedTuple):
    job: DubJob | AnimateJob
    analysis: Analysis | None  # None: an animation


def _skipped(report: Mapping[str, Any]) -> dict[str, int]:
    """Frames that were left as they are, by reason."""
    counts: Counter[str] = Counter()
    for shot in report["shots"]:
        for part in shot["skipped"]:
            counts[part["reason"]] += part["frames"][1] - part["frames"][0]
    return dict(counts)
