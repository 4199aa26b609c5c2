"""One dubbing job: a video and a voice in, the dubbed video and a report out.

Three passes over the source, none of which holds it in memory: look (faces, cuts, timestamps), encode (crops to latents on disk),
compose (decode, blend, write). Between the last two the network runs in two rounds over the whole clip.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion import schedules
from keysync_jax.encoders.audio_features import AudioFeatures, side_by_side
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.inference import dub_report as reporting
from keysync_jax.inference.analysis import Analysis, analyse
from keysync_jax.inference.engine import StageSampler, StageSettings, Window
from keysync_jax.inference.latent_store import LatentStore
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.phases import StageProgress
from keysync_jax.inference.timeline import Run, make_run
from keysync_jax.inference.window_plan import WindowPlan, WindowSizes, make_plan
from keysync_jax.media import audio as audio_io
from keysync_jax.media import crop as cropping
from keysync_jax.media import faces, masks, video
from keysync_jax.media.compositing import Compositor
from keysync_jax.media.writer import DEFAULT_CRF, VideoWriter, check_output

# Frames decoded and composited together. Fixed, so that a frame's place in a microbatch never depends on the devices.
_COMPOSE_CHUNK = 16


class Model(Protocol):
    """What a job needs of a loaded model (`KeySyncPipeline` provides it)."""

    stages: dict[str, StageConfig]

    def sampler(self, stage: str, num_steps: int) -> StageSampler: ...

    def coder(self) -> LatentCoder: ...

    def features(self, encoder: str) -> AudioFeatures: ...

    def describe(self) -> dict[str, Any]: ...


class DubResult(NamedTuple):
    output: Path
    report: dict[str, Any]
    summary: str


class _Piece(NamedTuple):
    """A run with its window plan and the place of its first frame in the output store."""

    run: Run
    plan: WindowPlan
    offset: int


def dub(model: Model, video_path: str, audio_path: str, output: str, options: DubOptions, progress: StageProgress) -> DubResult:
    """Dub one clip.

    Args:
      model: the loaded model.
      video_path: source video.
      audio_path: the new voice; what is muxed is this file's own audio.
      output: file to write; appears only when it is complete.
      options: settings.
      progress: where stages are shown and timed.

    Raises:
      KeySyncError: bad input, or non-finite values anywhere; nothing is left at `output`.
    """
    keyframe, interpolation = model.stages["keyframe"], model.stages["interpolation"]
    steps = keyframe.num_steps if options.steps is None else options.steps
    schedules.ays_sigmas(steps)  # refuses an impossible number before any work
    if options.mask is None and keyframe.mask != interpolation.mask:
        kinds = f"{keyframe.mask.kind} and {interpolation.mask.kind}"
        raise KeySyncError(f"the model's stages were trained with different masks ({kinds}); choose one with --mask")
    mask_config = keyframe.mask if options.mask is None else dataclasses.replace(keyframe.mask, kind=options.mask)
    check_output(output)
    info = video.probe(video_path)
    voice = audio_io.load_audio(audio_path)

    # Opened before the progress bar starts: while it opens, all of stderr is silenced.
    weights = {"weights": options.face_weights} if options.face_weights else {}
    with faces.open_backend(options.faces, **weights) as backend, progress.stage("look", info.frames) as advance:
        analysis = analyse(video_path, backend, options.face, advance)

    encoders = sorted({*keyframe.audio_encoders, *interpolation.audio_encoders})
    heard = {}
    with progress.stage("listen", len(encoders)) as advance:
        for name in encoders:
            heard[name] = model.features(name)(voice.samples)
            advance()
    features = {stage.audio_encoder: side_by_side(stage.audio_encoder, heard) for stage in (keyframe, interpolation)}
    num_audio_frames = min(len(f) for f in features.values())

    pieces = _plan(analysis, num_audio_frames, WindowSizes.of(keyframe, interpolation), options.reference_windows)
    guided = {name: options.guided(config) for name, config in model.stages.items()}
    settings = {name: StageSettings.of(options.seed, config) for name, config in guided.items()}

    with tempfile.TemporaryDirectory(prefix=".keysync-", dir=Path(output).resolve().parent) as scratch:
        generated = _generate(model, analysis, pieces, features, mask_config, settings, steps, options.seed, Path(scratch), progress)
        composited = _compose(model, analysis, pieces, generated, voice, output, audio_path, options, progress)

    details = reporting.build(
        model.describe(), analysis, [p.run for p in pieces], composited, voice, num_audio_frames, options, steps, guided, progress.seconds
    )
    return DubResult(Path(output), details, reporting.summary(details, output))


def _plan(analysis: Analysis, num_audio_frames: int, sizes: WindowSizes, reference: bool) -> list[_Piece]:
    pieces, offset = [], 0
    for shot in analysis.shots:
        for start, stop in shot.faces.runs:
            run = make_run(shot.index, shot.start + start, shot.start + stop, analysis.times, num_audio_frames)
            if reference and run.num_frames < sizes.segment:
                continue  # the reference cannot do less than one window; the report names the frames
            if run.num_frames:
                plan = make_plan(run.num_frames, sizes.segment, keyframe_window=sizes.keyframes, reference=reference)
                pieces.append(_Piece(run, plan, offset))
                offset += run.num_frames
    return pieces


class _Generated(NamedTuple):
    latents: LatentStore  # one row per model frame, pieces after one another
    masks: dict[int, np.ndarray]  # source frame -> bool [h, w]


def _generate(
    model: Model, analysis: Analysis, pieces: list[_Piece], features: dict[str, np.ndarray], mask_config: MaskConfig,
    settings: dict[str, StageSettings], steps: int, seed: int, scratch: Path, progress: StageProgress,
) -> _Generated:  # fmt: skip
    keyframe, interpolation = model.stages["keyframe"], model.stages["interpolation"]
    shape = (keyframe.latent_size, keyframe.latent_size, keyframe.unet.out_channels)
    sources = sorted({s for piece in pieces for s in piece.run.sources})
    row = {source: i for i, source in enumerate(sources)}
    region = {s: _mask(analysis, s, keyframe, mask_config) for s in sources}

    known = LatentStore(scratch / "known", shape)
    with progress.stage("encode", len(sources)) as advance:
        latents = model.coder().encode(_crops(analysis, set(sources), keyframe.resolution), seed)
        for source, latent in zip(sources, latents, strict=True):
            known[row[source]] = latent
            advance()

    def window(index: int, piece: _Piece, frames: tuple[int, ...], ends: np.ndarray, audio: np.ndarray) -> Window:
        shown = [piece.run.sources[f] for f in frames]
        return Window(
            np.int32(index),
            ends,
            audio[[piece.run.first + f for f in frames]],
            known.take([row[s] for s in shown]),
            np.stack([region[s] for s in shown])[..., None].astype(np.float32),
        )

    # Round one: every keyframe window of the clip. The identity is the first frame of the run, as in the reference.
    first_round = [(p, w) for p, piece in enumerate(pieces) for w in piece.plan.keyframe_windows if w.kept]
    keyframes: list[dict[int, np.ndarray]] = [{} for _ in pieces]
    windows = (
        window(i, pieces[p], w.frames, known[row[pieces[p].run.sources[0]]], features[keyframe.audio_encoder])
        for i, (p, w) in enumerate(first_round)
    )
    with progress.stage("keyframes", len(first_round)) as advance:
        results = model.sampler("keyframe", steps)(windows, settings["keyframe"])
        for (p, w), latents in zip(first_round, results, strict=True):
            keyframes[p].update({number: latents[position] for position, number in w.kept})
            advance()

    # Round two: every segment, given the keyframes at its ends (segment k lies between keyframes k and k + 1).
    second_round = [(p, k, s) for p, piece in enumerate(pieces) for k, s in enumerate(piece.plan.segments)]
    windows = (
        window(i, pieces[p], s.frames, np.stack([keyframes[p][k], keyframes[p][k + 1]]), features[interpolation.audio_encoder])
        for i, (p, k, s) in enumerate(second_round)
    )
    output = LatentStore(scratch / "generated", shape)
    with progress.stage("interpolate", len(second_round)) as advance:
        results = model.sampler("interpolation", steps)(windows, settings["interpolation"])
        for (p, k, s), latents in zip(second_round, results, strict=True):
            # The ends are the keyframes themselves; neighbouring segments agree on them.
            frames = [keyframes[p][k], *latents[1:-1], keyframes[p][k + 1]]
            for frame, latent in zip(s.outputs, frames, strict=False):
                output[pieces[p].offset + frame] = latent
            advance()
    known.close()
    return _Generated(output, region)


def _mask(analysis: Analysis, source: int, stage: StageConfig, config: MaskConfig) -> np.ndarray:
    """Regenerated cells `[h, w]` (bool) of a source frame on the latent grid."""
    shot = analysis.shot_of(source)
    landmarks = cropping.to_crop_space(shot.faces.landmarks[source - shot.start], shot.crop, stage.resolution)
    grid = (stage.latent_size, stage.latent_size)
    return masks.make_mask(landmarks[None].astype(int), stage.resolution, stage.resolution, config, target=grid)[0] > 0


def _crops(analysis: Analysis, wanted: set[int], size: int) -> Iterator[tuple[int, np.ndarray]]:
    for frame in video.read(analysis.info.path, analysis.info):
        if frame.index in wanted:
            image = cropping.extract(frame.rgb(), analysis.shot_of(frame.index).crop, size)
            yield frame.index, image.astype(np.float32) / 127.5 - 1


def _compose(
    model: Model, analysis: Analysis, pieces: list[_Piece], generated: _Generated, voice: audio_io.AudioClip, output: str, audio_path: str,
    options: DubOptions, progress: StageProgress,
) -> dict[str, Any]:  # fmt: skip
    """Write the output; returns which frames were blended and what became of the audio."""
    place = {}  # source frame -> (row of its latent, source frame whose mask it was generated under)
    for piece in pieces:
        faces_of_shot = analysis.shots[piece.run.shot]
        for frame in range(piece.run.start, piece.run.stop):
            position = piece.run.row(analysis.times[frame])
            # A frame whose own face was not seen is never touched, even if its neighbours filled it in for conditioning.
            if position < piece.plan.num_frames_out and faces_of_shot.faces.detected[frame - faces_of_shot.start]:
                place[frame] = (piece.offset + position, piece.run.sources[position])

    compositor = Compositor(analysis.info)
    coder = model.coder()
    reader = video.read(analysis.info.path, analysis.info)
    crf = DEFAULT_CRF if options.crf is None else options.crf
    with (
        progress.stage("compose", analysis.num_frames) as advance,
        VideoWriter(output, analysis.info, audio=audio_path, crf=crf, lossless=options.lossless) as writer,
    ):
        while chunk := list(itertools.islice(reader, _COMPOSE_CHUNK)):
            images = coder.decode([generated.latents[place[f.index][0]] for f in chunk if f.index in place])
            for frame in chunk:
                av_frame = frame.av_frame
                if frame.index in place:
                    shot = analysis.shot_of(frame.index)
                    mask = generated.masks[place[frame.index][1]]
                    av_frame = compositor.composite(av_frame, next(images), shot.crop, mask)
                writer.write(av_frame)
                advance()
    generated.latents.close()
    return {"frames": sorted(place), "audio": writer.audio_note, "notes": writer.notes}
