"""Parity runner of the window plan: rebuilds every index that the reference pipeline recorded from `inference.plan`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from keysync_jax.core.clock import FRAME_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference.window_plan import Segment, WindowPlan, make_plan
from keysync_jax.verify.harness import Case, runner

# The reference generates this many keyframe windows, then the segments they complete, then goes on.
WINDOWS_PER_CHUNK = 2
WINDOW = 14  # the reference rounds a requested duration with this whatever its window length is


@runner("pipeline_windows")
def pipeline_windows(case: Case) -> dict:
    recorded = case.json("windows.json")
    case.check_equal("number of runs", len(recorded), len(case.meta["runs"]))
    for number, run in enumerate(recorded):
        name = f"windows[{number}] video {run['n_video']} audio {run['n_audio']} zero {run['add_zero_flag']} until {run['compute_until']}"
        try:
            plan = make_plan(_usable(run), run["num_frames"], reference=True, identity_slot=run["add_zero_flag"])
        except KeySyncError as error:
            case.check(name, run["error"] is not None, f"the reference plans this clip, we refuse it: {error}")
            continue
        if run["error"] is not None:
            case.check(name, False, f"the reference refuses this clip ({run['error']}), we plan it")
            continue
        ours = describe(plan, run["num_frames"])
        for part in ("create_pipeline_inputs", "keyframe_calls", "interpolation_calls", "final"):
            case.check_equal(f"{name} {part}", ours[part], run[part])
    return {}


def _usable(run: dict[str, Any]) -> int:
    if run["overlap"] != 1:
        raise KeySyncError(f"segments overlap by one frame, not by {run['overlap']}")
    until = run["compute_until"]
    if until == "end":  # the reference takes ten times the video's length, which never cuts
        until = run["n_video"] * 10 // FRAME_RATE
    return num_usable_frames(run["n_video"], run["n_audio"], None if until is None else reference_max_frames(until))


def num_usable_frames(num_video: int, num_audio: int, max_frames: int | None = None) -> int:
    """N: the shorter of the two streams (longer audio is cut, the video is not looped), at most `max_frames`."""
    return min(num_video, num_audio, *([] if max_frames is None else [max_frames]))


def reference_max_frames(seconds: float) -> int:
    """Frames after which the reference stops for a requested duration: the next number that fills whole segments of 14."""
    step = WINDOW - 1
    frames = int(seconds * FRAME_RATE)
    return frames + (WINDOW - frames) % step


def output_frames(plan: WindowPlan) -> Iterator[tuple[int, int, int]]:
    """(output frame, segment, position in the segment) of every frame of the result, in order."""
    for number, segment in enumerate(plan.segments):
        for position, frame in enumerate(segment.outputs):
            yield frame, number, position


def describe(plan: WindowPlan, window: int) -> dict[str, Any]:
    """The plan in the words of the reference's records."""
    slots = [slot for keyframe_window in plan.keyframe_windows for slot in keyframe_window.slots]
    padding = _num_padding(plan)
    # The reference marks inserted slots with no index, and pads with copies of the last slot, index included.
    indices: list[int | None] = [slot.frame if slot.keep else None for slot in slots[: len(slots) - padding]]
    indices += indices[-1:] * padding
    spans = [[segment.frames[0], segment.frames[-1]] for segment in plan.segments]
    frames = [slot.frame for slot in slots]
    inputs = {
        "n_interp_windows": len(plan.segments),
        "interp_windows_[first,last]": spans,
        "keyframe_idx_padded": indices,
        "to_remove": [not slot.keep for slot in slots],
        "keyframe_audio_idx": frames,
        "keyframe_gt_idx": frames,
        "interp_audio_idx_first_last": spans,
        "reference_frame_idx": 0,
    }
    keyframe_calls, interpolation_calls = _calls(plan, window)
    return {
        "create_pipeline_inputs": inputs,
        "keyframe_calls": keyframe_calls,
        "interpolation_calls": interpolation_calls,
        "final": {
            "n_frames": plan.num_frames_out,
            "source_frame_idx": [frame for frame, _, _ in output_frames(plan)],
            "audio_samples": plan.num_frames_out * SAMPLES_PER_FRAME,
            "frame_rate": FRAME_RATE,
            "provenance": _provenance(plan, window),
        },
    }


def _num_padding(plan: WindowPlan) -> int:
    """Copies of the last slot that fill the row up: what follows the last kept keyframe, less a surplus identity slot."""
    slots = plan.keyframe_windows[-1].slots
    discarded = next((i for i, slot in enumerate(reversed(slots)) if slot.keep), len(slots))
    if discarded and slots[-1].frame == 0:  # a surplus identity slot comes first, and the padding copies it
        return discarded - 1
    return discarded


def _calls(plan: WindowPlan, window: int) -> tuple[list[dict], list[dict]]:
    """What the two stages are called with, chunk by chunk; a chunk that completes no segment is not run."""
    keyframe_calls, interpolation_calls = [], []
    done, carried = 0, []
    for first in range(0, len(plan.keyframe_windows), WINDOWS_PER_CHUNK):
        windows = plan.keyframe_windows[first : first + WINDOWS_PER_CHUNK]
        last = max((k for w in windows for _, k in w.kept), default=0)
        segments = plan.segments[done:last]
        if not segments:
            break
        keyframe_calls.append(
            {
                "windows": [
                    {"audio_idx": list(w.frames), "gt_idx": list(w.frames), "global_window": first + i} for i, w in enumerate(windows)
                ]
            }
        )
        # The last slot of the chunk before comes first: its keyframe starts this chunk's first segment.
        slots = carried + [slot for w in windows for slot in w.slots]
        carried = slots[-1:]
        interpolation_calls.append(
            {
                "windows": [_segment(done + i, segment, window) for i, segment in enumerate(segments)],
                "to_remove": [not slot.keep for slot in slots],
                "keyframes_in": [slot.frame for slot in slots],
                "n_interp_windows_passed": len(segments),
                "frames_out": len(segments) * (window - 1) + 1,
            }
        )
        done = last
    return keyframe_calls, interpolation_calls


def _segment(number: int, segment: Segment, window: int) -> dict[str, Any]:
    frames = list(segment.frames)
    ends = zip(("start_keyframe", "end_keyframe"), (frames[0], frames[-1]), (segment.start_slot, segment.end_slot), strict=True)
    keyframes = {name: {"frame": frame, "slot": 1000 * w + position} for name, frame, (w, position) in ends}
    return {"global_window": number, "audio_idx": frames, "gt_idx": frames, **keyframes}


def _provenance(plan: WindowPlan, window: int) -> list[str]:
    """Which generated frame every output frame shows: keyframes come from the keyframe stage, the others from their segment."""
    names = []
    for _, number, position in output_frames(plan):
        ends = {0: plan.segments[number].start_slot, window - 1: plan.segments[number].end_slot}
        names.append("K{}.{}".format(*ends[position]) if position in ends else f"I{number}.{position}")
    return names
