"""Drawn talkers that no training set holds, with the exact answer to "what should this mouth do".

A held-out clip pairs one person and one head motion with two voices: the person's own (the input video) and another (what it is dubbed
with). Drawing the same person and motion with the other voice gives the true target. Every number derives from a tag of this module,
a split and a seed, so held-out faces, motions and voices are disjoint from each other's splits and from `synth_dataset`'s.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic.clip import TalkerClip, TalkerOptions, make_clip
from keysync_jax.data_pipeline.synthetic.measure import MouthMeasure, measure_mouth
from keysync_jax.data_pipeline.synthetic.phonemes import articulate, at_frames, sample_phonemes
from keysync_jax.evaluation import lip_metrics
from keysync_jax.evaluation.lip_metrics import MouthTruth

SPLITS = {"test": 1, "validation": 2, "demo": 3}
_TAG = 0x7E57
_INPUT_OPEN = 0.48  # of frames, by the script: leaves the measured share above the mark of .40
_CANDIDATES = 64  # voices tried for such an input
# Level of the sound in dB full scale: nothing at all, a quiet room, a noisy one (rooms of speaking clips lie between -72 and -46).
SILENCES = {"digital silence": float("-inf"), "quiet room": -66.0, "noisy room": -48.0}


class HeldOut(NamedTuple):
    """One held-out clip: the same person and motion with two voices."""

    number: int
    source: TalkerClip  # the input video with its own voice
    target: TalkerClip  # what it must become; `target.samples` is the driving voice

    @property
    def num_frames(self) -> int:
        return len(self.source.frames)


def seeds_of(split: str, seed: int, number: int) -> list[int]:
    """Seeds of face, motion, driving voice, silence, and of the candidates for the input's voice.

    Raises:
      UsageError: no such split, or a negative seed.
    """
    if split not in SPLITS:
        raise UsageError(f"no split called {split!r}: choose {', '.join(SPLITS)}")
    if seed < 0:
        raise UsageError(f"seed must be a non-negative integer, not {seed}")
    state = np.random.SeedSequence([_TAG, SPLITS[split], seed, number]).generate_state(4 + _CANDIDATES, np.uint64)
    return [int(v) & (2**62 - 1) for v in state]


def held_out(split: str, seed: int, number: int, frames: int = 150, size: int = 128) -> HeldOut:
    """Clip `number` of a split; a pure function of its arguments.

    The input's voice is the first candidate that opens the mouth in enough frames for a leak to show under silence.

    Args:
      split: "test", "validation" or "demo".
      seed: another seed is another set of clips.
      frames: length at 25 fps.
      size: side in pixels.

    Raises:
      UsageError: no such split, or a bad seed, length or size.
    """
    face, motion, voice, _, *candidates = seeds_of(split, seed, number)
    own = next((candidate for candidate in candidates if _scripted_open(candidate, frames) >= _INPUT_OPEN), candidates[0])
    source = make_clip(0, frames, size, identity_seed=face, audio_seed=own, motion_seed=motion)
    target = make_clip(0, frames, size, identity_seed=face, audio_seed=voice, motion_seed=motion)
    return HeldOut(number, source, target)


def silent_target(split: str, seed: int, clip: HeldOut, kind: str) -> TalkerClip:
    """The same person and motion with a kind of silence (see `SILENCES`) and the mouth shut throughout.

    Raises:
      UsageError: no such kind.
    """
    if kind not in SILENCES:
        raise UsageError(f"no silence called {kind!r}: choose {', '.join(SILENCES)}")
    face, motion, _, noise, *_ = seeds_of(split, seed, clip.number)
    options = TalkerOptions(silent=True, room_db=SILENCES[kind])
    size = clip.source.frames.shape[1]
    return make_clip(0, clip.num_frames, size, identity_seed=face, audio_seed=noise, motion_seed=motion, options=options)


def silence_of(number: int) -> str:
    """The kind of silence of clip `number`: one after the other."""
    return list(SILENCES)[number % len(SILENCES)]


def mouth_truth(clip: HeldOut, source: MouthMeasure, target: MouthMeasure) -> MouthTruth:
    """What the dubbed mouth of a clip is held against: exact opening and width; closures and the maximum as measured in true frames.

    Args:
      source, target: measured in the frames of `clip.source` and `clip.target`.
    """
    maximum = float(max(source.opening.max(), target.opening.max()))
    closed = clip.target.is_closure & ~lip_metrics.is_open(target.opening, maximum)
    loudness = lip_metrics.loudness_db(clip.target.samples, clip.num_frames)
    return MouthTruth(clip.target.opening, clip.target.width, closed, loudness, maximum, source.opening)


def measure(clip: TalkerClip, frames: np.ndarray | None = None) -> MouthMeasure:
    """The mouth in `frames` (default: the clip's own) by colour; of the clip's landmarks only the eye corners are read.

    Raises:
      KeySyncError: frames of another number.
    """
    frames = clip.frames if frames is None else frames
    if len(frames) != len(clip.landmarks):
        raise KeySyncError(f"{len(frames)} generated frames for a clip of {len(clip.landmarks)}")
    return measure_mouth(frames, clip.landmarks)


def _scripted_open(audio_seed: int, frames: int) -> float:
    """Share of frames in which the script of a voice opens the mouth (without drawing it)."""
    seconds = frames / FRAME_RATE
    options = TalkerOptions()
    phonemes = sample_phonemes(audio_seed, seconds, pause_share=options.pause_share, long_silence=options.long_silence)
    opening = at_frames(articulate(phonemes, seconds, audio_seed).opening, frames)
    return float(lip_metrics.is_open(opening, float(opening.max())).mean())
