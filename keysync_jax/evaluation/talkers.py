"""`keysync evaluate --talkers`: how well a model lip-syncs drawn people it has never seen to voices it has never heard.

Held-out faces and voices, the audio always from another clip (cross-sync), 25 fps. The mouth is read back from the pixels of the dubbed
frames and held against the exact truth. Every figure is taken per clip and averaged over clips (with the standard error of that mean);
the pooled ones, over all frames at once, stand beside them in the JSON.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.converters.model_directory import ModelDirectory
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip
from keysync_jax.data_pipeline.synthetic.measure import MouthMeasure, measure_mouth
from keysync_jax.encoders.latents import LatentCoder
from keysync_jax.evaluation import lip_metrics, marks, talkers_clips, talkers_model
from keysync_jax.evaluation.lip_metrics import MouthTruth, mean_and_error
from keysync_jax.evaluation.talkers_clips import HeldOut
from keysync_jax.evaluation.talkers_model import MODES, Scales, TalkerModel
from keysync_jax.media import crop as cropping
from keysync_jax.parallel.mesh import data_mesh


@dataclasses.dataclass(frozen=True)
class TalkerTest:
    """Which clips, and how many of them also under silence.

    Attributes:
      clips: number of held-out clips.
      silent_clips: of these, the first so many are dubbed with silence too; None is all, at most 24.
      seconds: length of a clip.
      size: side of the drawn frames, pixels.
      seed: of the clips and of the noise.
      split: "test"; guidance is chosen on "validation".
      mode: "dub", "keyframes" (figures where keyframes stand, nothing interpolated) or "one stage".
    """

    clips: int = 50
    silent_clips: int | None = None
    seconds: float = 6.0
    size: int = 128
    seed: int = 0
    split: str = "test"
    mode: str = "dub"

    def __post_init__(self):
        if self.clips < 1:
            raise UsageError(f"--clips is {self.clips}; it must be at least 1")
        if self.silent_clips is not None and not 0 <= self.silent_clips <= self.clips:
            raise UsageError(f"--silent-clips is {self.silent_clips}; it must lie between 0 and --clips ({self.clips})")
        if not 0.4 <= self.seconds <= 120:
            raise UsageError(f"--seconds is {self.seconds:g}; choose 0.4 to 120")
        if self.mode not in MODES:
            raise UsageError(f"no mode {self.mode!r}: choose {', '.join(MODES)}")

    @property
    def frames(self) -> int:
        return round(self.seconds * FRAME_RATE)

    @property
    def num_silent(self) -> int:
        return min(self.clips, marks.SILENT_CLIPS) if self.silent_clips is None else self.silent_clips

    @property
    def undecided(self) -> str | None:
        """Why this test cannot say that a model meets the marks; None where it can."""
        if self.clips < marks.CLIPS or self.seconds < marks.SECONDS:
            needed, given = f"{marks.CLIPS} clips of {marks.SECONDS:g} s", f"{self.clips} of {self.seconds:g} s"
            return f"the marks are for {needed} or more, this test of {given} decides nothing"
        if self.mode != "keyframes" and self.num_silent < marks.SILENT_CLIPS:
            return f"the marks under silence are for {marks.SILENT_CLIPS} clips or more, this test dubs {self.num_silent} with silence"
        return None


class _Series(NamedTuple):
    """One clip in one column of the table."""

    mouth: MouthMeasure
    truth: MouthTruth
    figures: dict[str, float]


def evaluate(
    directory: ModelDirectory, test: TalkerTest, model: TalkerModel, scales: Sequence[Scales], tick: Callable[[], None] = lambda: None
) -> list[dict[str, Any]]:
    """One report per guidance, all on the same clips.

    Args:
      directory: where the model came from, for the report.
      test: which clips.
      model: the loaded model, in `test.mode`.
      scales: guidances to run.
      tick: called after each of `total_windows` windows.

    Raises:
      KeySyncError: non-finite values anywhere.
    """
    start = time.perf_counter()
    runs = [_Run() for _ in scales]
    shared = _Run()
    for numbers in _groups(range(test.clips), model.group):
        clips = [talkers_clips.held_out(test.split, test.seed, number, test.frames, test.size) for number in numbers]
        silences = [(c, talkers_clips.silent_target(test.split, test.seed, c, talkers_clips.silence_of(c.number)))
                    for c in clips if c.number < test.num_silent]  # fmt: skip
        truths = {c.number: shared.add_baselines(c) for c in clips}
        for clip, target in silences:
            shared.add_silent_baselines(clip, target, truths[clip.number])
        prepared = model.prepare([(c.number, c.source) for c in clips], test.seed)
        for run, scale in zip(runs, scales, strict=True):
            latents = model.generate(prepared, [c.target.samples for c in clips], scale, test.seed, tick)
            for clip, own, table, frames in zip(clips, prepared, latents, model.compose(prepared, latents), strict=True):
                run.add_output(clip, truths[clip.number], frames, sorted(table), model.outside(own), model.seams(test.frames))
            quiet = prepared[: len(silences)]
            latents = model.generate(quiet, [target.samples for _, target in silences], scale, test.seed, tick)
            for (clip, target), table, frames in zip(silences, latents, model.compose(quiet, latents), strict=True):
                run.add_silence(clip, target, truths[clip.number], frames, sorted(table))
    about = {
        "kind": "talkers", "test": {**dataclasses.asdict(test), "silent_clips": test.num_silent, "frames": test.frames},
        "run": talkers_model.describe(model), "model": directory.describe(), "seconds": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    return [_report(about, scale, run, shared, test) for run, scale in zip(runs, scales, strict=True)]


def total_windows(test: TalkerTest, model: TalkerModel, passes: int = 1) -> int:
    """How often `evaluate` ticks."""
    return passes * (test.clips + test.num_silent) * model.num_windows(test.frames)


def evaluate_vae(
    directory: ModelDirectory, test: TalkerTest, microbatch: int = 8, tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """The gate before any diffusion training: true frames through encoder and decoder, the mouth measured in what comes out.

    Args:
      directory: only its part "vae" is needed.
      test: which clips (of each, the true target).
      microbatch: frames per call.
      tick: called after each clip.
    """
    start = time.perf_counter()
    side = _resolution(directory, test)
    coder = LatentCoder(directory.vae, directory.params("vae"), data_mesh(), microbatch=microbatch)
    decoded, true = _Column(), _Column()
    for number in range(test.clips):
        clip = talkers_clips.held_out(test.split, test.seed, number, test.frames, test.size)
        place = talkers_model.place(clip.target)
        crops = [cropping.extract(frame, place, side) for frame in clip.target.frames]
        points = cropping.to_crop_space(clip.target.landmarks, place, side)
        latents = coder.encode(((i, image.astype(np.float32) / 127.5 - 1) for i, image in enumerate(crops)), test.seed)
        images = np.stack([np.rint(image * 255).astype(np.uint8) for image in coder.decode(latents)])
        reference = measure_mouth(np.stack(crops), points)
        truth = talkers_clips.mouth_truth(clip, talkers_clips.measure(clip.source), reference)
        error = float(np.abs(images.astype(np.float64) - np.stack(crops)).mean())
        decoded.add(number, measure_mouth(images, points), truth, {"pixel_error": error})
        true.add(number, reference, truth)
        tick()
    columns = {"decoded": decoded.summary(), "true frames": true.summary()}
    columns["true frames"] |= _measurer(columns["true frames"])
    figures = {**columns["true frames"], **columns["decoded"]}
    return marks.clean(
        {
            "kind": "vae", "test": {**dataclasses.asdict(test), "frames": test.frames}, "model": directory.describe(),
            "seconds": round(time.perf_counter() - start, 1), "columns": columns, **_verdict(marks.VAE, figures, test),
            "pooled": decoded.pooled(), "per_clip": decoded.per_clip,
        }
    )  # fmt: skip


class _Column:
    """The clips of one column of the table."""

    def __init__(self):
        self._series: list[_Series] = []
        self.per_clip: list[dict[str, Any]] = []

    def add(self, number: int, mouth: MouthMeasure, truth: MouthTruth, more: dict[str, float] | None = None, lag: bool = True) -> None:
        figures = lip_metrics.follow_figures(*mouth, truth, lag=lag)
        figures |= {"found": float(mouth.found.mean()), **(more or {})}
        self._series.append(_Series(mouth, truth, figures))
        self.per_clip.append({"clip": number, **figures})

    def add_meter(self, number: int, truth: MouthTruth) -> None:
        """A mouth that opens with the loudness: what must not pass."""
        mouth = MouthMeasure(truth.loudness, truth.loudness, np.ones(len(truth.loudness), bool))
        figures = lip_metrics.follow_figures(*mouth, truth)
        figures = {key: figures[key] for key in ("opening_r", "width_r", "lag", "partial_r")}
        self._series.append(_Series(mouth, truth, figures))
        self.per_clip.append({"clip": number, **figures})

    def summary(self) -> dict[str, float]:
        return summarize([s.figures for s in self._series])

    def pooled(self) -> dict[str, float]:
        """The same over all frames of all clips at once (openings in eye-corner distances, not scaled per clip)."""
        if not self._series:
            return {}
        opening, width = (np.concatenate([getattr(s.mouth, name) for s in self._series]) for name in ("opening", "width"))
        true_opening, true_width, loudness = (
            np.concatenate([getattr(s.truth, name) for s in self._series]) for name in ("opening", "width", "loudness")
        )
        shut = np.concatenate(
            [(s.mouth.found & ~lip_metrics.is_open(s.mouth.opening, s.truth.maximum))[s.truth.closed] for s in self._series]
        )
        return {
            "opening_r": lip_metrics.correlation(opening, true_opening),
            "width_r": lip_metrics.correlation(width, true_width),
            "closed": float(shut.mean()) if shut.size else math.nan,
            "partial_r": lip_metrics.partial_correlation(opening, true_opening, loudness),
        }


def summarize(clips: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over clips and its standard error, by key and `key_error`; the lag by its absolute value.

    Args:
      clips: figures by key, the same keys in each; NaN where a clip has none.

    Returns:
      Of the lag also "lag_within_1" (share of all clips), "lag_signed" (mean of those that have one) and "lag_missing" (how many have
      none, which alone misses the mark).
    """
    out: dict[str, float] = {}
    for key in clips[0] if clips else ():
        values = [figures[key] for figures in clips]
        if key == "lag":
            out["lag_within_1"] = float(np.mean(np.abs(values) <= 1))
            out["lag_signed"] = mean_and_error(values)[0]
            out["lag_missing"] = int(np.isnan(values).sum())
            values = [abs(v) for v in values]
        out[key], out[f"{key}_error"] = mean_and_error(values)
    return out


class _Run:
    """What is gathered for one guidance, or for what all of them share."""

    def __init__(self):
        self.output, self.copy, self.truth, self.meter = _Column(), _Column(), _Column(), _Column()
        self.silence: list[dict[str, Any]] = []

    def add_output(
        self, clip: HeldOut, truth: MouthTruth, frames: np.ndarray, at: list[int], outside: np.ndarray, seams: Sequence[int]
    ) -> None:
        whole = len(at) == clip.num_frames
        changed = np.abs(frames.astype(np.int16) - clip.source.frames[at]).max(axis=-1)
        more = {"outside_change": float((changed * outside[at]).max())}
        if whole:
            more["flicker"] = _flicker(frames, clip.target.frames, outside)
            if seams:
                more["seam_flicker"] = _flicker(frames, clip.target.frames, outside, seams)
        self.output.add(clip.number, measure_mouth(frames, clip.target.landmarks[at]), _take(truth, at), more, lag=whole)

    def add_silence(self, clip: HeldOut, target: TalkerClip, truth: MouthTruth, frames: np.ndarray, at: list[int]) -> None:
        mouth = measure_mouth(frames, target.landmarks[at])
        leak = lip_metrics.input_leak(mouth.opening, np.zeros(len(at)), truth.source[at])
        share = _open_share(mouth, truth)
        self.silence.append({"clip": clip.number, "kind": talkers_clips.silence_of(clip.number), "open": share, "leak": leak})

    def add_baselines(self, clip: HeldOut) -> MouthTruth:
        source, target = talkers_clips.measure(clip.source), talkers_clips.measure(clip.target)
        truth = talkers_clips.mouth_truth(clip, source, target)
        self.copy.add(clip.number, source, truth, {"outside_change": 0.0})
        self.truth.add(clip.number, target, truth)
        self.meter.add_meter(clip.number, truth)
        return truth

    def add_silent_baselines(self, clip: HeldOut, target: TalkerClip, truth: MouthTruth) -> None:
        mouths = {"input": talkers_clips.measure(clip.source), "truth": talkers_clips.measure(target)}
        shares = {name: _open_share(mouth, truth) for name, mouth in mouths.items()}
        self.silence.append({"clip": clip.number, **shares})


def _report(about: dict[str, Any], scale: Scales, run: _Run, shared: _Run, test: TalkerTest) -> dict[str, Any]:
    columns = {name: column.summary() for name, column in (
        ("output", run.output), ("copied input", shared.copy), ("truth", shared.truth), ("loudness meter", shared.meter),
    )}  # fmt: skip
    kinds = {}
    if run.silence:
        inputs = [s["input"] for s in shared.silence]
        for name, values in (("output", [s["open"] for s in run.silence]), ("copied input", inputs),
                             ("truth", [s["truth"] for s in shared.silence])):  # fmt: skip
            columns[name]["silence_open"], columns[name]["silence_open_error"] = mean_and_error(values)
        columns["output"]["silence_leak"], columns["output"]["silence_leak_error"] = mean_and_error([s["leak"] for s in run.silence])
        columns["output"]["silence_input_open"] = columns["copied input"]["silence_input_open"] = mean_and_error(inputs)[0]
        for kind in talkers_clips.SILENCES:
            values = [s["open"] for s in run.silence if s["kind"] == kind]
            if values:
                kinds[kind] = {"clips": len(values), "open": mean_and_error(values)[0]}
    columns["truth"] |= _measurer(columns["truth"])
    # The worst pixel of any clip: a mean would hide it.
    columns["output"]["outside_change"] = max(row["outside_change"] for row in run.output.per_clip)
    columns["output"].pop("outside_change_error")
    wanted = marks.KEYFRAMES if test.mode == "keyframes" else marks.TALKERS
    figures = {**_measurer(columns["truth"]), **columns["output"]}
    return marks.clean(
        {
            **about, "guidance": scale.text, "columns": columns, **_verdict(wanted, figures, test),
            "pooled": {"output": run.output.pooled(), "copied input": shared.copy.pooled()},
            "silence": {"kinds": kinds, "per_clip": [a | b for a, b in zip(run.silence, shared.silence, strict=True)]},
            "per_clip": run.output.per_clip,
        }
    )  # fmt: skip


def _verdict(wanted: Sequence[marks.Mark], figures: Mapping[str, float], test: TalkerTest) -> dict[str, Any]:
    """Every mark's row, and the whole: `passed` is None where the test cannot decide, and `undecided` then says why."""
    rows = marks.judge(wanted, figures)
    passed = None if test.undecided else all(row["passed"] for row in rows)
    return {"marks": rows, "passed": passed, "undecided": test.undecided}


def marks_of(report: dict[str, Any]) -> Sequence[marks.Mark]:
    """The marks that a report was judged by, in order."""
    known = marks.VAE if report["kind"] == "vae" else marks.TALKERS
    keys = [row["key"] for row in report["marks"]]
    return [mark for mark in known if mark.key in keys]


def _measurer(truth: dict[str, float]) -> dict[str, float]:
    return {"measurer_opening_r": truth["opening_r"], "measurer_width_r": truth["width_r"]}


def _open_share(mouth: MouthMeasure, truth: MouthTruth) -> float:
    return lip_metrics.open_share(mouth.opening, mouth.found, truth.maximum)


def _take(truth: MouthTruth, at: list[int]) -> MouthTruth:
    return truth._replace(**{name: getattr(truth, name)[at] for name in ("opening", "width", "closed", "loudness", "source")})


def _flicker(frames: np.ndarray, target: np.ndarray, outside: np.ndarray, at: Sequence[int] | None = None) -> float:
    """Mean squared second difference of the pixels in the box around all masks, relative to the target's; `at` these frames or all."""
    rows, columns = (np.flatnonzero((~outside).any(axis=axes)) for axes in ((0, 2), (0, 1)))
    box = (slice(None), slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    return lip_metrics.roughness(frames[box], target[box], at)


def _resolution(directory: ModelDirectory, test: TalkerTest) -> int:
    """Side of the crop that the VAE was made for: the stages', or the drawn frames' where there are no stages yet."""
    for name in ("keyframe", "interpolation"):
        if name in directory.parts:
            return directory.stage(name).resolution
    if test.size % directory.vae.downsample_factor:
        raise KeySyncError(f"the VAE shrinks by {directory.vae.downsample_factor}, which does not divide frames of {test.size} pixels")
    return test.size


def _groups(numbers: range, size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]
