"""One dubbing job: a video and a voice in, the dubbed video and a report out.

A job goes through five phases. Three of them pass over the source, and none holds it in memory: look (faces, cuts, timestamps), encode
(crops to latents on disk) and compose (decode, blend, write). Listen hears the voice. Generate runs both rounds of the networks over the
whole clip; it is the one phase that jobs go through together, so that their windows share the devices, and one job is a batch of one:

    two_stage.generate(model.samplers, [job.clip for job in jobs], progress)

Look and listen need nothing of each other, but where silence is filled in until the pictures end; from encode on, each phase needs those
before it.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.core.clock import FRAME_RATE, SAMPLE_RATE, SAMPLES_PER_FRAME, model_frame
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules
from keysync_jax.diffusion.guidance import of_stage
from keysync_jax.diffusion.sampler import require_networks
from keysync_jax.encoders.audio_features import Hearing, encoders_of, hear
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import dub_report, lengths, two_stage
from keysync_jax.inference.analysis import Analysis, look
from keysync_jax.inference.clip_io import FrameCollector, VideoSink, VideoSource, Voice, marks_of
from keysync_jax.inference.engine import StageSampler
from keysync_jax.inference.known_latents import KnownLatents
from keysync_jax.inference.latent_store import LatentStore
from keysync_jax.inference.options import DubOptions, mark_of, require_system
from keysync_jax.inference.phases import PhaseProgress
from keysync_jax.inference.timeline import Run, make_run
from keysync_jax.inference.window_plan import WindowPlan, WindowSizes, make_plan
from keysync_jax.media import audio as audio_io
from keysync_jax.media import burned_text, inserted_sound
from keysync_jax.media import crop as cropping
from keysync_jax.media.compositing import Compositor
from keysync_jax.media.encoding import choose_encoding
from keysync_jax.media.writer import VideoWriter, check_output

# Frames decoded and composited together. Fixed, so that a frame's place in a microbatch never depends on the devices.
_COMPOSE_CHUNK = 16


T = TypeVar("T")


class Model(Protocol):
    """What a job needs of a loaded model (`KeySyncPipeline` provides it)."""

    @property
    def samplers(self) -> Mapping[str, StageSampler]: ...

    @property
    def vae(self) -> LatentCoder: ...

    @property
    def encoders(self) -> Mapping[str, Hearing]: ...

    def describe(self) -> dict[str, Any]: ...


class DubResult(NamedTuple):
    """What a job made.

    Attributes:
      output: the file, None where frames were asked for.
      report: what was done to each shot, settings, timings.
      summary: the same in a line or two.
      frames: uint8 `[N, H, W, 3]` RGB, None where a file was asked for.
    """

    output: Path | None
    report: dict[str, Any]
    summary: str
    frames: np.ndarray | None = None


class _Piece(NamedTuple):
    """A run with its window plan and the place of its first frame in the output store."""

    run: Run
    plan: WindowPlan
    offset: int


class _Work(NamedTuple):
    """What encode leaves for the phases after it."""

    pieces: list[_Piece]
    masks: dict[int, np.ndarray]  # source frame -> bool [h, w]
    generated: LatentStore  # one row per model frame, pieces after one another
    covered: range  # model frames in which the voice sounds
    clip: two_stage.Clip


class DubJob:
    """One clip on its way through `look`, `listen`, `encode`, `two_stage.generate` (of its `clip`) and `compose`.

    Scratch files belong to the job and lie beside its output (of frames: in the system's place for them); leaving the job, or `close`,
    removes them. Nothing stands at the output before `compose` is over.

    Args:
      model: the loaded model.
      source: the clip.
      voice: the new voice.
      output: file to write; None keeps the frames in memory.
      options: settings.
      progress: told how far each phase is.

    Raises:
      KeySyncError: what can be refused before any work: an impossible number of steps, stages of different masks, a guidance that asks
        a network the model has not, an output that cannot be written.
    """

    def __init__(self, model: Model, source: VideoSource, voice: Voice, output: str | None, options: DubOptions, progress: PhaseProgress):
        self._model, self._source, self._voice, self._output = model, source, voice, output
        self._options, self._progress = options, progress
        require_system(model.samplers, "keysync")
        self._stages = {name: options.guided(sampler.config) for name, sampler in model.samplers.items()}
        for name, sampler in model.samplers.items():
            if isinstance(sampler, StageSampler):  # what a person put in its place says itself what it cannot do
                require_networks(of_stage(self._stages[name]).needed(), sampler.networks)
        keyframe = self._stages["keyframe"]
        self._steps = keyframe.num_steps if options.steps is None else options.steps
        schedules.ays_sigmas(self._steps)  # refuses an impossible number
        self._mask = mask_of(self._stages, options)
        if output is not None:
            extension = check_output(output).suffix.lower()  # and what it cannot hold is refused, too
            choose_encoding(source.info, extension, options.crf, options.lossless, codec=options.codec, pix_fmt=options.pix_fmt)
        self._mark = mark_of("dub", source.info.path, options)
        self._analysis: Analysis | None = None
        self._features: dict[str, np.ndarray] | None = None
        self._work: _Work | None = None
        self._text: list[burned_text.TextRange] = []
        self._sound_note = ""
        self._scratch = contextlib.ExitStack()

    def __enter__(self) -> DubJob:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes the scratch files."""
        self._scratch.close()

    @property
    def options(self) -> DubOptions:
        """The settings."""
        return self._options

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one frame, `[h, w, C]`."""
        stage = self._stages["keyframe"]
        return (stage.latent_size, stage.latent_size, stage.unet.out_channels)

    @property
    def source(self) -> VideoSource:
        """The clip that is dubbed, as `lengths.fitted` made it."""
        return self._source

    @property
    def clip(self) -> two_stage.Clip:
        """The windows to generate, after `encode`."""
        return _after(self._work, "encode").clip

    def look(self, known: Analysis | None = None) -> Analysis:
        """Finds shots, faces and times: the first pass over the source.

        Args:
          known: what an earlier job found in the same source with the same options; it is taken, and nothing is looked for.

        Raises:
          KeySyncError: unreadable video, or no usable face anywhere in it.
        """
        analysis = look(self._source, self._options, self._progress) if known is None else known
        part, end = self._options.part, model_frame(analysis.times[-1])
        if part.first > end:
            raise KeySyncError(
                f"--range {self._options.range}: the part begins at {float(part.start_s):.2f} s, after the last picture of "
                f"{analysis.info.path} at {float(analysis.times[-1]):.2f} s"
            )
        self._analysis = analysis
        return analysis

    def listen(self) -> None:
        """Computes the features of the voice, of each speech encoder that a stage needs; none where no face will say it."""
        if self._analysis is not None and not self._analysis.has_face:
            self._features = {}
            return
        stages, samples = self._stages.values(), self._voice.sound.samples
        if self._options.mismatch == "silence":
            frames = self._left(_after(self._analysis, "look"))
            samples = np.pad(samples, (0, max(0, frames * SAMPLES_PER_FRAME - len(samples))))
        with self._progress.phase("listen", len(encoders_of(stages))) as advance:
            self._features = hear(stages, self._model.encoders, samples, advance)

    def encode(self, known: KnownLatents | None = None) -> None:
        """Plans the windows, draws the masks and encodes the crops: the second pass over the source.

        Args:
          known: what jobs with the same source, faces, seed and mask have encoded, and will; it stays the caller's. None: nothing.

        Raises:
          KeySyncError: non-finite latents, or no space for the scratch files.
        """
        analysis, features = _after(self._analysis, "look"), _after(self._features, "listen")
        keyframe = self._stages["keyframe"]
        sizes = WindowSizes.of(keyframe, self._stages["interpolation"])
        part = self._options.part
        covered = part.covered(min(map(len, features.values()), default=round(self._voice.sound.duration_s * FRAME_RATE)))
        pieces = list(_plan(analysis, covered, sizes, self._options.reference_windows))
        sources = sorted({source for piece in pieces for source in piece.run.sources})
        regions = {source: analysis.shot_of(source).mask(source, keyframe, self._mask) for source in sources}
        scratch = self._new_scratch()
        shape = self.latent_shape
        generated = LatentStore(scratch / "generated", shape)
        self._scratch.callback(generated.close)
        if known is None or not known.fits(sources):
            known = KnownLatents(scratch / "known", shape)
            self._scratch.callback(known.close)
        # What a person put in the coder's place may take frames as it likes: then each stands alone.
        missing = known.missing(sources, getattr(self._model.vae, "together", 1))
        with self._progress.phase("encode", len(missing)) as advance:
            if missing:
                crops = self._crops(analysis, regions, keyframe.resolution, known, set(missing))
                for _ in known.fill(missing, self._model.vae.encode(crops, self._options.seed)):
                    advance()
        self._text = known.text_until(sources[-1]) if sources else []

        def stretch(piece: _Piece) -> two_stage.Stretch:
            shown = piece.run.sources
            return two_stage.Stretch(
                plan=piece.plan,
                audio={name: values[piece.run.first - part.first :] for name, values in features.items()},
                known=lambda frames: known.take([shown[frame] for frame in frames]),
                masks=[regions[source] for source in shown],
                write=lambda frame, latent: generated.__setitem__(piece.offset + frame, latent),
            )

        guidance = {name: of_stage(stage).needed() for name, stage in self._stages.items()}
        clip = two_stage.Clip([stretch(piece) for piece in pieces], self._options.seed, self._steps, guidance)
        self._work = _Work(pieces, regions, generated, covered, clip)

    def compose(self) -> DubResult:
        """Decodes and blends the generated crops and writes the output: the third pass over the source.

        Raises:
          KeySyncError: the clip failed on the devices, non-finite pictures, or an output that cannot be written; nothing is left at it.
        """
        analysis, work = _after(self._analysis, "look"), _after(self._work, "encode")
        if work.clip.error is not None:
            raise work.clip.error
        _after(work.clip.finished or None, "generate")
        place = _places(analysis, work.pieces)
        compositor = Compositor(analysis.info)
        pictures = self._source.read()
        with self._progress.phase("compose", analysis.num_frames) as advance, self._open_sink(analysis) as sink:
            while chunk := list(itertools.islice(pictures, _COMPOSE_CHUNK)):
                images = self._model.vae.decode([work.generated[place[f.index][0]] for f in chunk if f.index in place])
                for frame in chunk:
                    picture = frame.av_frame
                    if frame.index in place:
                        shot = analysis.shot_of(frame.index)
                        mask = work.masks[place[frame.index][1]]
                        picture = compositor.composite(picture, next(images), shot.view(frame.index), mask)
                    sink.write(picture, frame.alpha)
                    advance()
        return self._result(analysis, work, sorted(place), sink)

    def _new_scratch(self) -> Path:
        parent = None if self._output is None else Path(self._output).resolve().parent
        return Path(self._scratch.enter_context(tempfile.TemporaryDirectory(prefix=".keysync-", dir=parent)))

    def _crops(
        self, analysis: Analysis, regions: Mapping[int, np.ndarray], size: int, known: KnownLatents, wanted: Collection[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        for frame in self._source.read():
            if frame.index in wanted:
                rgb, view = frame.rgb(), analysis.shot_of(frame.index).view(frame.index)
                if not known.holds(frame.index):  # one that is encoded again was watched before
                    known.text.update(frame.index, rgb, burned_text.around(regions[frame.index], view))
                yield frame.index, cropping.extract(rgb, view, size).astype(np.float32) / 127.5 - 1

    def _open_sink(self, analysis: Analysis) -> VideoSink:
        if self._output is None:
            return FrameCollector(analysis.info)
        voice = self._voice.path
        if voice is None:  # what is played must be a file
            voice = str(self._new_scratch() / "voice.wav")
            audio_io.save_wav(voice, self._voice.sound.samples, SAMPLE_RATE)
        options, stream, self._sound_note = self._options, self._options.audio_stream, ""
        if options.range is not None:
            voice, stream = self._inserted(analysis, voice), None
        return VideoWriter(
            self._output, self._source.info, audio=voice, audio_stream=stream, crf=options.crf, lossless=options.lossless,
            codec=options.codec, pix_fmt=options.pix_fmt, language=options.language, keep_audio=options.keep_audio,
            extras=lengths.file_of(self._source) is not None, mark=self._mark,
        )  # fmt: skip

    def _inserted(self, analysis: Analysis, voice: str) -> str:
        """The sound of a video of which a part is dubbed."""
        part, file = self._options.part, lengths.file_of(self._source)
        own = analysis.info.path if file is not None and analysis.info.has_audio else None
        frames = self._left(analysis)
        if self._options.mismatch != "silence":  # the mouth is the source's where the voice has ended, so its sound is, too
            frames = min(frames, math.ceil(self._voice.sound.duration_s * FRAME_RATE))
        target = self._new_scratch() / "sound.wav"
        self._sound_note = inserted_sound.insert(
            own, voice, target, start=part.start_s, seconds=Fraction(frames, FRAME_RATE), voice_stream=self._options.audio_stream
        )
        return str(target)

    def _left(self, analysis: Analysis) -> int:
        """Model frames from the beginning of the part to its end or the video's."""
        part, end = self._options.part, model_frame(analysis.times[-1]) + 1
        return (end if part.stop is None else min(end, part.stop)) - part.first

    def _result(self, analysis: Analysis, work: _Work, blended: list[int], sink: VideoSink) -> DubResult:
        done = dub_report.Done(
            model=self._model.describe(),
            analysis=analysis,
            runs=[piece.run for piece in work.pieces],
            blended=blended,
            voice=self._voice.sound,
            covered=work.covered,
            audio_note=f"{self._sound_note}, {sink.audio_note}" if self._sound_note else sink.audio_note,
            output_notes=[*sink.notes, *_text_notes(self._text, analysis)],
            options=self._options,
            steps=self._steps,
            stages=self._stages,
            seconds=self._progress.seconds,
            shortfall=lengths.shortfall_of(self._source),
            marks=marks_of(self._mark, sink),
        )
        report = dub_report.build(done)
        frames = np.stack(sink.frames) if isinstance(sink, FrameCollector) else None
        where = None if self._output is None else Path(self._output)
        return DubResult(where, report, dub_report.summary(report, self._output or "frames"), frames)


def _text_notes(found: Sequence[burned_text.TextRange], analysis: Analysis) -> list[str]:
    if not found:
        return []
    last = analysis.num_frames - 1
    spans = ", ".join(f"{float(analysis.times[start]):.1f}–{float(analysis.times[min(stop, last)]):.1f} s" for start, stop in found)
    return [f"text in the picture (subtitles?) crosses the mouth's region at {spans} and is painted over there; take a source without it"]


def mask_of(stages: Mapping[str, StageConfig], options: DubOptions) -> MaskConfig:
    """The region that a dub regenerates.

    Raises:
      KeySyncError: the stages were trained with different ones and none is chosen.
    """
    keyframe, interpolation = stages["keyframe"].mask, stages["interpolation"].mask
    if options.mask is not None:
        return dataclasses.replace(keyframe, kind=options.mask)
    if keyframe != interpolation:
        raise KeySyncError(
            f"the model's stages were trained with different masks ({keyframe.kind} and {interpolation.kind}); choose one with --mask"
        )
    return keyframe


def _plan(analysis: Analysis, covered: range, sizes: WindowSizes, reference: bool) -> Iterator[_Piece]:
    offset = 0
    for shot in analysis.shots:
        for start, stop in shot.faces.runs:
            first = max(shot.start + start, bisect.bisect_left(analysis.times, covered.start, key=model_frame))
            if first >= shot.start + stop:
                continue  # before the part that is dubbed
            run = make_run(shot.index, first, shot.start + stop, analysis.times, covered.stop)
            if reference and run.num_frames < sizes.segment:
                continue  # the reference cannot do less than one window; the report names the frames
            if run.num_frames:
                plan = make_plan(run.num_frames, sizes.segment, keyframe_window=sizes.keyframes, reference=reference)
                yield _Piece(run, plan, offset)
                offset += run.num_frames


def _places(analysis: Analysis, pieces: Sequence[_Piece]) -> dict[int, tuple[int, int]]:
    """Of each frame that is blended, the row of its latent and the source frame whose mask it was generated under."""
    place = {}
    for piece in pieces:
        shot = analysis.shots[piece.run.shot]
        for frame in range(piece.run.start, piece.run.stop):
            position = piece.run.row(analysis.times[frame])
            # A frame whose own face was not seen is never touched, even if its neighbours filled it in for conditioning.
            if position < piece.plan.num_frames_out and shot.faces.detected[frame - shot.start]:
                place[frame] = (piece.offset + position, piece.run.sources[position])
    return place


def _after(made: T | None, phase: str) -> T:
    """What an earlier phase has made."""
    if made is None:
        raise RuntimeError(f"the job has not been through {phase} yet")
    return made
