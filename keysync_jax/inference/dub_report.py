"""What a dub did, per shot, as JSON that a person or a batch system can act on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax

from keysync_jax.config import GuidanceConfig, StageConfig
from keysync_jax.core.clock import FRAME_RATE, model_frame
from keysync_jax.core.memory import peak_bytes
from keysync_jax.core.version import __version__
from keysync_jax.diffusion import schedules
from keysync_jax.inference.analysis import Analysis, Shot
from keysync_jax.inference.options import DubOptions
from keysync_jax.inference.timeline import Part, Run
from keysync_jax.media.audio import AudioClip
from keysync_jax.media.completeness import Shortfall
from keysync_jax.media.crop import Crop, View
from keysync_jax.media.placing import Placement

# Why frames stay as they are that no voice covers.
ENDED, OUTSIDE = "the voice has ended", "outside the part that is dubbed"


class Done(NamedTuple):
    """What a job did, for its report."""

    model: dict[str, Any]
    analysis: Analysis
    runs: Sequence[Run]
    blended: Sequence[int]  # source frames
    voice: AudioClip
    covered: range  # model frames in which the voice sounds
    audio_note: str  # what became of the sound
    output_notes: Sequence[str]
    options: DubOptions
    steps: int
    stages: Mapping[str, StageConfig]  # with the guidance that was used
    seconds: dict[str, float]  # by phase
    marks: Mapping[str, str]  # what the output says of itself
    shortfall: Shortfall | None = None  # pictures that the source promises and does not hold


def build(done: Done) -> dict[str, Any]:
    """The report; frame numbers are those of the source, times are seconds, boxes are upright pixels."""
    analysis, voice, options = done.analysis, done.voice, done.options
    blended = set(done.blended)
    info = analysis.info
    part = options.part
    video_end = float(analysis.times[-1] if part.stop is None else min(analysis.times[-1], Fraction(part.stop, FRAME_RATE)))
    what = "video" if part.stop is None else "part"
    notes = [*analysis.notes, *voice.notes, *done.output_notes]
    voice_end = done.covered.stop / FRAME_RATE
    longer = float(part.start_s) + voice.duration_s - video_end
    if voice_end < video_end:
        notes.append(f"the voice ends at {voice_end:.2f} s, before the {what}: the source mouth stays from there on")
    elif longer > 1:
        notes.append(f"the voice is {longer:.2f} s longer than the {what} and is cut at its end")
    return {
        "keysync_jax": __version__,
        "source": {
            "path": str(info.path),
            "size": [info.display_width, info.display_height],
            "rotation": info.rotation,
            "pixel_format": info.pix_fmt,
            "rate": str(info.average_rate),
            "frames": analysis.num_frames,
            "frames_promised": analysis.num_frames if done.shortfall is None else done.shortfall.promised,
        },
        "audio": {
            "seconds": voice.duration_s,
            "rate": voice.source_rate,
            "channels": voice.source_channels,
            "heard": voice.heard,
            "output": done.audio_note,
        },
        "model": done.model,
        "settings": {
            **dataclasses.asdict(options),
            "steps": done.steps,
            "evaluations": len(schedules.ays_sigmas(done.steps)) - 1,  # ten steps are eleven
            "guidance": {name: _guidance(stage) for name, stage in done.stages.items()},
        },
        "marks": dict(done.marks),
        "frames_dubbed": len(blended),
        "shots": [_shot(shot, done.runs, blended, analysis, part, done.covered) for shot in analysis.shots],
        "notes": notes,
        "seconds": done.seconds,
        "peak_memory_mib": round(peak_bytes() / 2**20),
        "devices": [str(device) for device in jax.local_devices()],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "av")},
    }


def _shot(shot: Shot, runs: Sequence[Run], blended: set[int], analysis: Analysis, part: Part, covered: range) -> dict[str, Any]:
    frames = range(shot.start, shot.stop)
    planned = [run for run in runs if run.shot == shot.index]
    skipped = []
    for frame in frames:
        if frame in blended:
            continue
        at = model_frame(analysis.times[frame])
        if at < part.first or part.stop is not None and at >= part.stop:
            reason = OUTSIDE
        elif any(frame in frames for frames in analysis.dissolved):
            reason = "a dissolve shows two pictures over one another"
        elif not shot.faces.detected[frame - shot.start]:
            seen = shot.faces.seen is not None and shot.faces.seen[frame - shot.start]
            reason = "another face than the one that is dubbed" if seen else "no face detected"
        elif at >= covered.stop:
            reason = ENDED
        else:
            reason = "outside the window plan"
        if skipped and skipped[-1]["reason"] == reason and skipped[-1]["frames"][1] == frame:
            skipped[-1]["frames"][1] = frame + 1
        else:
            skipped.append({"frames": [frame, frame + 1], "reason": reason})
    crop = shot.crop
    return {
        "frames": [shot.start, shot.stop],
        "time": [float(analysis.times[shot.start]), float(analysis.times[shot.stop - 1])],
        "face_box": None if crop is None else _box(crop),
        "crops": [_crop(part, shot.start) for part in shot.places.parts],
        "dubbed": sum(f in blended for f in frames),
        "runs": [{"frames": [r.start, r.stop], "model_frames": r.num_frames} for r in planned],
        "skipped": skipped,
    }


def _box(view: Crop | View) -> list[float]:
    """x0, y0, x1, y1 in pixels of the upright picture; of a square that is turned, those that it has when it is not."""
    if isinstance(view, Crop):
        return [view.x0, view.y0, view.x0 + view.side, view.y0 + view.side]
    return [round(value, 2) for value in view.box]


def _crop(part: Placement, start: int) -> dict[str, Any]:
    angle = 0.0 if isinstance(part.view, Crop) else round(part.view.angle, 2)
    return {"frames": [start + part.start, start + part.stop], "face_box": _box(part.view), "angle": angle}


def _guidance(stage: StageConfig) -> dict[str, Any]:
    kind = {} if stage.guidance.kind == GuidanceConfig.kind else {"kind": stage.guidance.kind}
    return kind | stage.guidance_numbers


def summary(report: dict[str, Any], output: str) -> str:
    """One or two lines for the terminal."""
    lines = [
        f"{output}: {report['frames_dubbed']} of {report['source']['frames']} frames dubbed in {len(report['shots'])} shot(s); "
        f"audio {report['audio']['output']}; the model heard {report['audio']['heard']}; {sum(report['seconds'].values()):.1f} s"
    ]
    for number, shot in enumerate(report["shots"]):
        for part in shot["skipped"]:
            lines.append(f"  shot {number}: frames {part['frames'][0]}–{part['frames'][1] - 1} kept as they are: {part['reason']}")
    return "\n".join(lines + [f"  note: {note}" for note in report["notes"]])
