"""Curation of one item, from file to clips: stages 1 to 5 as one pure function of the item, the settings and the tools."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from keysync_jax.core.clock import FRAME_RATE, SAMPLES_PER_FRAME, model_frame
from keysync_jax.core.memory import peak_bytes
from keysync_jax.data_pipeline.prepare import quality
from keysync_jax.data_pipeline.prepare.face_track import FacesInFrame, ShotTrack, track_shots
from keysync_jax.data_pipeline.prepare.frame_table import FrameTables, pack_keyframes
from keysync_jax.data_pipeline.prepare.item import Candidate, Drop, DropError, Item
from keysync_jax.data_pipeline.prepare.probe import Probed, probe
from keysync_jax.data_pipeline.prepare.settings import ANALYSIS_VERSION, Curation
from keysync_jax.data_pipeline.prepare.spans import Span, cut_long, usable_spans
from keysync_jax.data_pipeline.prepare.work import digest, file_digest
from keysync_jax.media.crop import extract, fixed_crop, to_crop_space
from keysync_jax.media.faces import FaceBackend
from keysync_jax.media.tracking import jitter

_THUMBNAIL = 96  # pixels, for the report's contact sheet
_FEWEST_SEEN = 0.02  # of a shot's frames with a face; fewer are chance finds


class Tools(NamedTuple):
    """What a worker keeps open: the landmark detector (None for items with a landmark sidecar), the scorers by kind, frame tables."""

    faces: FaceBackend | None
    scorers: dict[str, Any]
    tables: FrameTables


class Analysis(NamedTuple):
    """What curation says about one item.

    Attributes:
      candidates: clips to keep, in time order.
      drops: what was left out and why.
      arrays: `keyframes` int64 `[K, 3]`, where passes over the video may begin; per kept clip `sources.ID` int32 `[n]` and
        `landmarks.ID` float32 `[n, 68, 2]` (crop pixels); per clip, kept or dropped, `thumbnail.ID` (JPEG bytes as uint8); the same
        under the item's id for a video that its picture quality dropped.
      facts: figures for the report: seconds and frames of the video, size, rate, rotation, seconds of work per stage.
    """

    candidates: list[Candidate]
    drops: list[Drop]
    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def item_key(item: Item, curation: Curation) -> str:
    """Hash of everything that the analysis depends on: the content of the files, not where they lie or when they were written."""
    files = [file_digest(path) if path else "" for path in (item.path, item.landmarks, *([item.audio] if item.audio else []))]
    weights = [file_digest(path) for _, _, path in curation.scorers]
    described = {k: v for k, v in item.to_json().items() if k in ("name", "source", "start", "stop", "box")}
    settings = {k: v for k, v in dataclasses.asdict(curation).items() if k not in ("scorers", "face_weights")}
    plugins = [list(s[:2]) for s in curation.scorers]
    return digest(ANALYSIS_VERSION, described, files, settings, plugins, weights)


def analyse(item: Item, curation: Curation, tools: Tools) -> Analysis:
    """Curate one item. What is wrong with the item ends up in `drops`; only programming and system errors are raised."""
    result = Analysis([], [], {}, {"seconds_per_stage": {}})
    try:
        _stages(item, curation, tools, result)
    except DropError as drop:
        result.candidates.clear()
        result.drops.append(Drop(item.path, item.id, "", drop.stage, drop.reason, drop.detail, drop.seconds))
    result.facts["peak_memory_mb"] = round(peak_bytes() / 2**20, 1)
    return result


def _stages(item: Item, curation: Curation, tools: Tools, result: Analysis) -> None:
    clock = _Clock(result.facts["seconds_per_stage"])
    backend = None if item.landmarks else tools.faces
    with clock("probe"):
        probed = probe(item, curation.min_rate, tools.tables, FacesInFrame(item, backend))
    info = probed.info
    content = digest(file_digest(item.path), file_digest(item.audio)) if item.audio else file_digest(item.path)
    result.facts.update(
        seconds=round(probed.seconds, 3), frames=sum(b - a for a, b in probed.shots), width=info.display_width, height=info.display_height,
        rate=round(float(info.average_rate), 3), rotation=info.rotation, codec=info.codec, pixel_format=info.source_pix_fmt,
        shots=len(probed.shots),
    )  # fmt: skip
    result.arrays["keyframes"] = pack_keyframes(probed.keyframes)
    # The paper's order: quality of the whole video first, then cutting.
    with clock("quality"):
        try:
            scores = _quality(item, curation, tools, probed)
        except DropError:
            result.arrays[f"thumbnail.{item.id}"] = _thumbnail(probed.pictures[1])
            raise
    result.facts["scores"] = scores
    for start, stop in probed.shots:
        if model_frame(probed.times[start]) >= probed.audio_frames:
            span = Span(model_frame(probed.times[start]), model_frame(probed.times[stop - 1]) + 1)
            _drop(item, result, _clip_id(item, span.start), "probe", "no_audio", "the sound ends before this shot begins", span)
    want_grey = any(kind in tools.scorers for kind in ("active_speaker", "sync"))
    tracks = track_shots(item, probed, backend, max_gap=curation.max_gap, second_face=curation.second_face, want_grey=want_grey)
    while True:
        with clock("faces"):
            track = next(tracks, None)
        if track is None:
            break
        with clock("checks"):
            _shot(item, content, curation, tools, probed, track, scores, result)


def _quality(item: Item, curation: Curation, tools: Tools, probed: Probed) -> dict[str, float]:
    if "quality" not in tools.scorers:
        return {}
    views = quality.quality_views(probed.pictures, item.seed(curation.seed, "views"))
    score = float(np.mean(tools.scorers["quality"](views)))
    if not score >= curation.min_quality:  # also for NaN
        words = f"mean score of {len(views)} views is {score:.3f}, below {curation.min_quality:g}"
        raise DropError("quality", "low_quality", words, probed.seconds)
    return {"quality": score}


def _shot(
    item: Item, content: str, curation: Curation, tools: Tools, probed: Probed, track: ShotTrack, scores: dict, result: Analysis
) -> None:
    """Cut a shot into clips and check each."""
    run = track.run
    if run.num_frames < curation.min_frames:
        spans = [Span(0, run.num_frames, "too_short")]
    elif track.known.mean() < _FEWEST_SEEN:
        spans = [Span(0, run.num_frames, "no_face")]
    else:
        spans = usable_spans(track.known, track.alone, curation.min_frames)
    words = {
        "too_short": f"shot of {run.num_frames} frames, fewer than {curation.min_frames}",
        "no_face": "no face found",
        "several_faces": "more than one face of note",
        "gaps": f"the face is lost so often that fewer than {curation.min_frames} frames are left in a row",
    }
    for span in spans:
        if span.reason:
            stage = "shots" if span.reason == "too_short" else "faces"
            _drop(item, result, _clip_id(item, run.first + span.start), stage, span.reason, words[span.reason], span)
            result.arrays[f"thumbnail.{_clip_id(item, run.first + span.start)}"] = _thumbnail(track.picture)
            continue
        for piece in cut_long(span, curation.max_frames):
            _clip(item, content, curation, tools, probed, track, piece, scores, result)


def _clip(
    item: Item, content: str, curation: Curation, tools: Tools, probed: Probed, track: ShotTrack, span: Span, scores: dict, result: Analysis
) -> None:
    """Checks of one clip; appends it to the result, kept or dropped."""
    first = track.run.first + span.start
    clip = _clip_id(item, first)
    landmarks = track.landmarks[span.start : span.stop]
    size = (probed.info.display_width, probed.info.display_height)
    crop = fixed_crop(landmarks, size)
    result.arrays[f"thumbnail.{clip}"] = _thumbnail(extract(track.picture, crop, _THUMBNAIL))
    face_pixels = float(np.median((landmarks.max(axis=1) - landmarks.min(axis=1)).max(axis=1)))
    samples = probed.samples[first * SAMPLES_PER_FRAME : (first + span.num_frames) * SAMPLES_PER_FRAME]
    measures = dict(scores)
    measures["face_size"] = face_pixels / curation.crop_size
    measures["jitter"] = jitter(landmarks) / face_pixels
    measures["silence"] = quality.silence_share(samples, span.num_frames)
    for name, values in (("sharpness", track.sharpness), ("brightness", track.brightness)):
        known = values[span.start : span.stop]
        if np.isfinite(known).any():
            measures[name] = float(np.nanmean(known))
    reason = _check(curation, measures)
    if reason is None:
        for kind in ("active_speaker", "sync"):
            if kind in tools.scorers and reason is None:
                measures |= {k: float(v) for k, v in tools.scorers[kind](track.grey[span.start : span.stop], samples).items()}
                reason = _check(curation, measures)
    if reason is not None:
        stage, word, detail = reason
        _drop(item, result, clip, stage, word, detail, span)
        return
    points = to_crop_space(landmarks, crop, curation.crop_size).astype(np.float32)
    sources = np.asarray(track.run.sources[span.start : span.stop], np.int32)
    result.arrays[f"sources.{clip}"] = sources
    result.arrays[f"landmarks.{clip}"] = points
    placed = repr((content, first, tuple(crop), curation.crop_size)).encode()
    fingerprint = hashlib.sha256(placed + sources.tobytes() + points.tobytes()).hexdigest()
    rounded = {name: round(value, 6) for name, value in sorted(measures.items())}
    result.candidates.append(Candidate(clip, first, span.num_frames, (crop.x0, crop.y0, crop.side), rounded, fingerprint))


def _check(curation: Curation, m: dict[str, float]) -> tuple[str, str, str] | None:
    """(stage, reason, sentence) of the first bound that a clip misses; a measure that it does not have is not checked."""
    bounds = (
        ("faces", "small_face", "face_size", ">=", curation.min_face, "the face spans {v:.2f} of the crop, less than {b:g}"),
        ("checks", "blurred", "sharpness", ">=", curation.min_sharpness, "sharpness {v:.1f} is below {b:g}"),
        ("checks", "dark", "brightness", ">=", curation.min_brightness, "mean brightness {v:.0f} is below {b:g}"),
        ("checks", "bright", "brightness", "<=", curation.max_brightness, "mean brightness {v:.0f} is above {b:g}"),
        ("checks", "silent", "silence", "<=", curation.max_silence, "{v:.0%} of the clip is silent, more than {b:.0%}"),
        ("checks", "jitter", "jitter", "<=", curation.max_jitter, "landmarks jitter by {v:.4f} of the face, more than {b:g}"),
        ("active_speaker", "not_speaking", "active_speaker", ">=", curation.min_active_speaker, "score {v:.3f} is below {b:g}"),
        ("sync", "out_of_sync", "sync_offset", "abs", curation.max_sync_offset, "voice and mouth are {v:+.0f} frames apart"),
    )
    for stage, reason, name, how, bound, words in bounds:
        if name not in m:
            continue
        value = m[name]
        good = value >= bound if how == ">=" else (abs(value) if how == "abs" else value) <= bound
        if not good:  # also for NaN
            return stage, reason, words.format(v=value, b=bound)
    for name, value in m.items():  # a plug-in may give measures that have no bound
        if not np.isfinite(value):
            return "checks", "bad_score", f"{name} is {value}"
    return None


def _drop(item: Item, result: Analysis, clip: str, stage: str, reason: str, detail: str, span: Span) -> None:
    result.drops.append(Drop(item.path, item.id, clip, stage, reason, detail, span.num_frames / FRAME_RATE))


def _clip_id(item: Item, first: int) -> str:
    return f"{item.id}-{first:06d}"


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    """JPEG of a picture shrunk to the contact sheet's size, as uint8 `[n]`."""
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "jpeg", quality=80)
    return np.frombuffer(out.getvalue(), np.uint8)


class _Clock:
    """Adds up seconds of work per stage."""

    def __init__(self, seconds: dict[str, float]):
        self._seconds = seconds

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start
