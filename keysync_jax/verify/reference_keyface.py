"""KeyFace's own bookkeeping at commit 9226167, its mistakes included, for comparison with what it recorded; nothing here makes a video.

Its plan is KeySync's with a tail: where audio is left after the last full segment, one more segment begins there, a frame late, and the
first slot that was to be discarded in the last chunk becomes its end keyframe. That is meant to be padding, but is the identity slot of the
second window where there is one: from there on every keyframe stands 13 frames late. `inference.window_plan` does none of this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from keysync_jax.core.clock import FRAME_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference.emotion import NAMED

# Keyframe windows that are generated together with the segments that they complete.
CHUNK = 2
ACCENT = 1.5


def emotion_curves(states: Sequence[str], frames: int, accentuate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Valence and arousal, float64: one state for `frames + 2` frames, or straight legs of equal length with both ends in each.

    Raises:
      KeySyncError: an unknown name.
    """
    if unknown := [state for state in states if state not in NAMED]:
        raise KeySyncError(f"emotion {unknown[0]!r} is not known")
    points = [NAMED[state] for state in states]
    if accentuate:
        points = [tuple(accented(np.array(point))) for point in points]
    if len(points) == 1:
        constant = np.repeat(np.array(points), frames + 2, axis=0)
        return constant[:, 0], constant[:, 1]
    each = frames // (len(points) - 1)
    legs = [np.linspace(start, end, each) for start, end in zip(points, points[1:], strict=False)]
    curve = np.concatenate(legs)[:frames]
    return curve[:, 0], curve[:, 1]


def accented(values: np.ndarray) -> np.ndarray:
    """Half as much again, within [-1, 1]."""
    return np.clip(values * ACCENT, -1, 1)


class Slot(NamedTuple):
    """A place of a keyframe window: what frame it is said to be (None: the identity), whose audio it has, whether it is discarded."""

    said: int | None
    audio: int
    removed: bool


class Audio(NamedTuple):
    """Frames of a run: for keyframes, for interpolation, of the video's sound, and the most that are asked for."""

    keyframes: int
    interpolation: int
    sound: int
    most: int


def audio_of(run: dict[str, Any]) -> Audio:
    """How long each stream of a recorded run is."""
    until, pictures = run["compute_until"], run["n_video"] or 1
    if until == "end":  # ten times the video's frames, which for a photo is none
        until = pictures * 10 // FRAME_RATE
    most = int(until * FRAME_RATE)
    wavlm, wav2vec2, beats = (min(run[f"n_{name}"], most) for name in ("wavlm", "wav2vec2", "beats"))
    interpolation = min(wav2vec2, beats)
    sound = min(run["n_raw_audio"], most) if pictures > most else run["n_raw_audio"]
    return Audio(min(wavlm, interpolation), interpolation, sound, most)


class Plan(NamedTuple):
    """Segments of audio frames, the span that each is said to have, and slots in whole windows."""

    segments: list[list[int]]
    spans: list[list[int]]
    slots: list[Slot]


def plan(audio: Audio, window: int, identity_slots: bool) -> Plan:
    """Raises:
    KeySyncError: audio shorter than a window."""
    step = window - 1
    starts = list(range(0, audio.keyframes - window + 1, step))
    if not starts:
        raise KeySyncError("the audio is shorter than a window")
    segments = [list(range(start, start + window)) for start in starts]
    spans = [[segment[0], segment[-1]] for segment in segments]
    end = starts[-1] + window
    if audio.interpolation > end:
        segments.append([min(frame, audio.interpolation - 1) for frame in range(end, end + window)])
        spans.append([end, end + step])
    slots = [Slot(k * step, k * step, False) for k in range(len(starts) + 1)]
    if identity_slots:
        room = len(slots) + (len(slots) + 1) % window
        for place in range(0, room, window):
            slots.insert(place, Slot(None, 0, True))
    slots += [slots[-1]._replace(removed=True)] * (-len(slots) % window)
    return Plan(segments, spans, slots)


class Chunk(NamedTuple):
    """What a call of the interpolation stage is given: slots by place, kept ones being its keyframes, and segments of audio."""

    keyframes: list[tuple[int, int, int]]  # (window, position, audio frame) of those that are kept
    segments: list[list[int]]

    @property
    def pairs(self) -> list[list[list[int]]]:
        return [[list(start), list(end)] for start, end in zip(self.keyframes, self.keyframes[1:], strict=False)]

    @property
    def outcome(self) -> str:
        """What the real networks do: counts may differ as long as whole batches come out."""
        surplus = len(self.pairs) - len(self.segments)
        if surplus == 0 or len(self.segments) % 2 == 0:
            return "the last pair is ignored" if surplus > 0 else "runs"
        return "RuntimeError (indicator of two videos for one)" if surplus > 0 else "ZeroDivisionError"


def chunks(made: Plan, window: int) -> Iterator[Chunk]:
    """Chunk by chunk, the last keyframe carried into the next.

    Raises:
      KeySyncError: no segment ends where a chunk does, at which the reference stops with an error.
    """
    places = [(number // window, number % window, slot) for number, slot in enumerate(made.slots)]
    size, carried = CHUNK * window, []
    for first in range(0, len(places), size):
        last = first + size >= len(places)
        given = carried + places[first : first + size]
        carried = given[-1:]
        said = [slot.said for _, _, slot in given if slot.said is not None]
        begins = [number for number, span in enumerate(made.spans) if said and span[0] == said[0]]
        ends = [number for number, span in enumerate(made.spans) if said and span[1] == said[-1]]
        if not ends:
            raise KeySyncError("no segment ends at the last keyframe of a chunk")
        if not begins:
            return
        start, stop = begins[0], ends[-1] + 1
        if stop < start:
            stop = len(made.segments)
        if last:
            stop += 1
            discarded = [n for n, (_, _, slot) in enumerate(given) if slot.removed and n > 0]
            if discarded:
                window_, position, slot = given[discarded[0]]
                given[discarded[0]] = (window_, position, slot._replace(removed=False))
        kept = [(w, position, slot.audio) for w, position, slot in given if not slot.removed]
        yield Chunk(kept, made.segments[start:stop])


def merge_weights(count: int, window: int) -> list[list[tuple[int, int, float]]]:
    """Of each frame of the merged segments the (segment, position, weight) that it is a mean of: neighbours share a frame."""
    frames: list[list[tuple[int, int]]] = [[] for _ in range(count * (window - 1) + 1)]
    for segment in range(count):
        for position in range(window):
            frames[segment * (window - 1) + position].append((segment, position))
    return [[(*entry, 1.0 / len(entries)) for entry in entries] for entries in frames]


def describe(run: dict[str, Any]) -> dict[str, Any]:
    """A recorded run computed anew, in the words of the record.

    Raises:
      KeySyncError: what the reference has no plan for.
    """
    window, audio = run["num_frames"], audio_of(run)
    made = plan(audio, window, run["add_zero_flag"])
    valence, arousal = emotion_curves(run["emotion_states"], audio.keyframes, run["accentuate"])
    if run["accentuate"]:
        valence, arousal = accented(valence), accented(arousal)
    frames = [slot.audio for slot in made.slots]
    if max(frames) >= len(valence):
        raise KeySyncError("the emotion curve is shorter than the audio")
    felt = {"valence": [float(valence[f]) for f in frames], "arousal": [float(arousal[f]) for f in frames]}
    given = list(chunks(made, window))
    windows = [
        {
            "audio": frames[i : i + window],
            **{name: values[i : i + window] for name, values in felt.items()},
            "beats": frames[i : i + window],
        }
        for i in range(0, len(frames), window)
    ]
    weights = [merge_weights(len(chunk.segments), window) for chunk in given]
    shown: list[tuple[int, int]] = []
    for number, merged in enumerate(weights):
        shown = shown[:-1] + [(number, index) for index in range(len(merged))]
    shown = shown[: audio.sound]
    return {
        "create_pipeline_inputs": {
            "interp_windows_[first,last]": made.spans,
            "keyframe_idx_padded": [slot.said for slot in made.slots],
            "to_remove": [slot.removed for slot in made.slots],
            "keyframe_audio_idx": frames,
            "interp_audio_idx": made.segments,
            **felt,
        },
        "keyframe_windows": windows[: CHUNK * len(given)],
        "interpolation_chunks": [
            {
                "num_pairs": len(chunk.pairs), "num_audio_windows": len(chunk.segments), "noise_frames": window * len(chunk.segments),
                "pairs": chunk.pairs, "audio": chunk.segments, "beats": chunk.segments, "real_networks": chunk.outcome,
            }
            for chunk in given
        ],
        "merge_weights": weights,
        "final": {
            "n_frames": len(shown), "frame_rate": FRAME_RATE, "audio_samples": min(audio.sound, audio.most) * SAMPLES_PER_FRAME,
            "source_[chunk,index]": [list(place) for place in shown],
            "audio_frame_[index,weight]": [
                [[given[number].segments[segment][position], weight] for segment, position, weight in weights[number][index]]
                for number, index in shown
            ],
        },
    }  # fmt: skip
