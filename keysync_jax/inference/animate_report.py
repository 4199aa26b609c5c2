"""What an animation did, as JSON that a person or a batch system can act on."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.memory import peak_bytes
from keysync_jax.core.version import __version__
from keysync_jax.diffusion import schedules
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.inference.emotion import EmotionCurve
from keysync_jax.inference.portrait import Portrait
from keysync_jax.media.audio import AudioClip
from keysync_jax.media.crop import View
from keysync_jax.media.pasting import VISIBLE

_FAST = 0.5  # a change of valence or arousal between two keyframes from which a person should know how far apart they stand


class Done(NamedTuple):
    """What a job did, for its report."""

    model: dict[str, Any]
    source: str | None
    portrait: Portrait
    frames: int
    keyframes: Sequence[int]  # frame numbers
    emotion: Mapping[str, np.ndarray]
    curve: EmotionCurve
    voice: AudioClip
    audio_note: str  # what became of the sound
    notes: Sequence[str]
    options: AnimateOptions
    steps: int
    stages: Mapping[str, StageConfig]  # with the guidance that was used
    seam: dict[str, float] | None
    seconds: dict[str, float]  # by phase
    marks: Mapping[str, str]  # what the output says of itself


def build(done: Done) -> dict[str, Any]:
    """The report; boxes are pixels of the picture, times are seconds."""
    sitter, voice, apart = done.portrait, done.voice, _apart(done.keyframes)
    height, width = sitter.rgb.shape[:2]
    notes = list(done.notes)
    if _fastest(done) > _FAST:
        notes.append(f"the emotion changes faster than keyframes follow one another (every {apart:.2f} s): what lies between is smoothed")
    if done.seam and done.seam["mean"] > VISIBLE:
        notes.append(
            f"the seam shows: the square and the picture differ by {done.seam['mean']} of 255 where they meet; leave --paste out and "
            "show the square alone"
        )
    return {
        "keysync_jax": __version__,
        "kind": "animate",
        "source": {
            "path": done.source,
            "size": [width, height],
            "face_box": None if sitter.face is None else [round(value, 2) for value in sitter.face],
            "square": [round(float(value), 2) for value in View.of(sitter.square).box],
            "angle": round(View.of(sitter.square).angle, 2),
        },
        "audio": {
            "seconds": voice.duration_s,
            "rate": voice.source_rate,
            "channels": voice.source_channels,
            "heard": voice.heard,
            "output": done.audio_note,
        },
        "marks": dict(done.marks),
        "emotion": {
            "asked": done.options.emotion,
            "strength": done.options.emotion_strength,
            "read_by_the_model": bool(done.stages["keyframe"].emotion_dim),
            "keyframes": [
                {"seconds": frame / FRAME_RATE, **{name: round(float(values[frame]), 4) for name, values in done.emotion.items()}}
                for frame in done.keyframes
            ],
        },
        "model": done.model,
        "settings": {
            **dataclasses.asdict(done.options),
            "steps": done.steps,
            "evaluations": len(schedules.ays_sigmas(done.steps)) - 1,  # ten steps are eleven
            "guidance": {name: {"kind": stage.guidance.kind, **stage.guidance_numbers} for name, stage in done.stages.items()},
        },
        "frames": done.frames,
        "seam": done.seam,
        "notes": notes,
        "seconds": done.seconds,
        "peak_memory_mib": round(peak_bytes() / 2**20),
        "devices": [str(device) for device in jax.local_devices()],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy", "av", "pillow")},
    }


def _apart(keyframes: Sequence[int]) -> float:
    """Seconds between keyframes."""
    return (keyframes[1] - keyframes[0]) / FRAME_RATE if len(keyframes) > 1 else 0.0


def _fastest(done: Done) -> float:
    """The largest change of valence or arousal from one keyframe to the next."""
    changes = [np.abs(np.diff(np.asarray(values)[list(done.keyframes)])).max(initial=0.0) for values in done.emotion.values()]
    return float(max(changes, default=0.0))


def summary(report: dict[str, Any], output: str) -> str:
    """One or two lines for the terminal."""
    seam = f"; seam {report['seam']['mean']} of 255" if report["seam"] else ""
    line = (
        f"{output}: {report['frames']} frames, emotion {report['emotion']['asked']}{seam}; audio {report['audio']['output']}; "
        f"the model heard {report['audio']['heard']}; {sum(report['seconds'].values()):.1f} s"
    )
    return "\n".join([line, *(f"  note: {note}" for note in report["notes"])])
