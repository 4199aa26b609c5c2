"""The window plan: every output frame exactly once, regular windows, and the reference's plan by its closed form.

The reference's own records are compared in tests/parity.
"""

import math

import pytest

from keysync_jax.config import StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.inference.window_plan import KeyframeWindow, Slot, WindowSizes, make_plan
from keysync_jax.verify.plan_cases import num_usable_frames, output_frames, reference_max_frames


def check_regular(n: int, window: int) -> None:
    plan = make_plan(n, window)
    step = window - 1
    assert plan.num_frames_out == n
    produced = [frame for frame, _, _ in output_frames(plan)]
    assert produced == list(range(n))
    last = n - 1
    timeline = [*range(n), *[last] * window]
    for k, segment in enumerate(plan.segments):
        assert segment.start == k * step
        assert list(segment.frames) == timeline[k * step : k * step + window]
        assert 1 <= segment.num_outputs <= window
        # A frame is shown with the conditions it was generated under.
        assert segment.frames[: segment.num_outputs] == tuple(segment.outputs)
    kept = []
    for w, keyframe_window in enumerate(plan.keyframe_windows):
        assert len(keyframe_window.slots) == window
        assert keyframe_window.slots[0] == Slot(0, None)
        assert keyframe_window.kept
        positions = [position for position, _ in keyframe_window.kept]
        assert positions == list(range(1, 1 + len(positions)))  # padding only at the end
        if w < len(plan.keyframe_windows) - 1:
            assert len(positions) == step
        for position, k in keyframe_window.kept:
            kept.append(k)
            assert keyframe_window.frames[position] == min(k * step, last)
            if k > 0:
                assert plan.segments[k - 1].end_slot == (w, position)
            if k < len(plan.segments):
                assert plan.segments[k].start_slot == (w, position)
        padding = keyframe_window.slots[1 + len(positions) :]
        assert all(slot == Slot(keyframe_window.frames[positions[-1]], None) for slot in padding)
    assert kept == list(range(plan.num_keyframes))
    assert plan.num_keyframes == len(plan.segments) + 1


def test_every_length_comes_out_at_its_own_length():
    for n in range(1, 3001):
        check_regular(n, 14)


@pytest.mark.parametrize("window", [2, 3, 5, 25])
def test_other_window_lengths(window):
    for n in range(1, 260):
        check_regular(n, window)


def test_one_frame_is_generated_from_its_own_conditions():
    plan = make_plan(1)
    assert plan.num_frames_out == 1
    assert plan.segments[0].num_outputs == 1
    assert set(plan.segments[0].frames) == {0}
    assert set(plan.keyframe_windows[0].frames) == {0}
    assert plan.keyframe_windows[0].kept == ((1, 0), (2, 1))


def test_a_segment_is_never_generated_for_nothing():
    # 14 frames are one whole segment; the 15th needs a second one.
    assert [len(make_plan(n).segments) for n in (13, 14, 15, 27, 28)] == [1, 1, 2, 2, 3]


def check_reference(n_frames: int, window: int) -> None:
    """Against closed forms of the reference's bookkeeping, found by running it."""
    plan = make_plan(n_frames, window, reference=True)
    step = window - 1
    segments = (n_frames - window) // step + 1
    n = segments + 1
    assert len(plan.segments) == segments
    assert plan.num_frames_out == segments * step + 1
    assert [frame for frame, _, _ in output_frames(plan)] == list(range(plan.num_frames_out))
    identity_slots = math.ceil((n + (n + 1) % window) / window)
    where = [divmod(k + min(k // step + 1, identity_slots), window) for k in range(n)]
    assert [segment.start_slot for segment in plan.segments] == where[:-1]
    assert [segment.end_slot for segment in plan.segments] == where[1:]
    assert len(plan.keyframe_windows) == math.ceil((n + identity_slots) / window)
    slots = [slot for w in plan.keyframe_windows for slot in w.slots]
    assert [slot for slot in slots if slot.keep] == [Slot(k * step, k) for k in range(n)]
    assert all(segment.frames == tuple(range(segment.start, segment.start + window)) for segment in plan.segments)


def test_reference_plan_matches_its_closed_form():
    for n in [*range(14, 800), *range(800, 6000, 29)]:
        check_reference(n, 14)
    for window in (3, 4, 7, 25):
        for n in range(window, 300):
            check_reference(n, window)


@pytest.mark.parametrize(
    ("frames", "windows", "without_identity", "frames_out"),
    [(250, 2, 0, 248), (1125, 7, 0, 1119), (1500, 9, 0, 1496), (2250, 14, 1, 2250), (7500, 45, 3, 7489)],
)
def test_reference_plan_loses_identity_slots_in_long_clips(frames, windows, without_identity, frames_out):
    reference, ours = make_plan(frames, reference=True), make_plan(frames)
    assert len(reference.keyframe_windows) == windows
    assert sum(w.slots[0].keep for w in reference.keyframe_windows) == without_identity
    assert reference.num_frames_out == frames_out
    assert not any(w.slots[0].keep for w in ours.keyframe_windows)
    assert ours.num_frames_out == frames


def test_without_identity_slot_every_slot_holds_a_keyframe():
    plan = make_plan(60, identity_slot=False)
    assert plan.keyframe_windows[0].kept == tuple((k, k) for k in range(plan.num_keyframes))


@pytest.mark.parametrize("n", [1, 2, 13, 14, 15, 27, 250])
@pytest.mark.parametrize("reference", [False, True])
def test_an_image_network_makes_the_same_keyframes_one_by_one(n, reference):
    if reference and n < 14:
        pytest.raises(KeySyncError, make_plan, n, keyframe_window=1, reference=True)
        return
    images, together = make_plan(n, keyframe_window=1, reference=reference), make_plan(n, reference=reference)
    assert images.num_frames_out == together.num_frames_out
    assert [s[:2] + s[4:] for s in images.segments] == [s[:2] + s[4:] for s in together.segments]
    kept = [slot for w in together.keyframe_windows for slot in w.slots if slot.keep]
    assert images.keyframe_windows == tuple(KeyframeWindow((slot,)) for slot in kept)
    assert [(s.start_slot, s.end_slot) for s in images.segments] == [((k, 0), (k + 1, 0)) for k in range(len(images.segments))]


def test_window_sizes_of_a_model():
    image, keyframe, interpolation = StageConfig(num_frames=1), StageConfig(num_frames=6), StageConfig(stage="interpolation", num_frames=6)
    assert WindowSizes.of(keyframe) == WindowSizes.of(keyframe, interpolation) == (6, 6)
    assert WindowSizes.of(image, interpolation) == (1, 6)
    assert WindowSizes.of(image) == (1, 14)
    with pytest.raises(KeySyncError, match="keyframe window of 1 has no place"):
        make_plan(30, keyframe_window=1, identity_slot=True)


@pytest.mark.parametrize(("arguments", "word"), [((0,), "no frames"), ((5, 1), "cannot hold two"), ((13, 14), "at least 14")])
def test_impossible_clips_are_refused(arguments, word):
    with pytest.raises(KeySyncError, match=word):
        make_plan(*arguments, reference=True)


def test_requested_duration_fills_whole_segments():
    assert reference_max_frames(45) == 1132
    for seconds in range(1, 200):
        frames = reference_max_frames(seconds)
        assert (frames - 14) % 13 == 0
        assert 25 * seconds <= frames < 25 * seconds + 13
    assert num_usable_frames(100, 87) == 87
    assert num_usable_frames(100, 187, 60) == 60


def covers(frames: int) -> None:
    """Every frame once, every segment's audio its own, and every keyframe under the audio of the place where it stands."""
    plan = make_plan(frames)
    assert [f for segment in plan.segments for f in segment.outputs] == list(range(frames))
    placed = {k: window.slots[p].frame for window in plan.keyframe_windows for p, k in window.kept}
    assert placed == {k: min(13 * k, frames - 1) for k in range(plan.num_keyframes)}
    assert all(segment.frames == tuple(min(segment.start + i, frames - 1) for i in range(14)) for segment in plan.segments)
    assert all(window.slots[0] == Slot(0, None) for window in plan.keyframe_windows)


def test_keyframes_have_their_own_audio_at_any_length():
    """KeyFace's reference gives most lengths over 169 frames keyframes that stand 13 frames late."""
    for frames in (*range(1, 400), *range(401, 6001, 97), 5999, 6000):
        covers(frames)


@pytest.mark.slow
def test_keyframes_have_their_own_audio_at_every_length():
    for frames in range(1, 6001):
        covers(frames)
