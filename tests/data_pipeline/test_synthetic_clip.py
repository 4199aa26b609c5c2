"""A drawn talker is reproducible, its seeds separate, its truth agrees with its pixels."""

import cv2
import numpy as np
import pytest
from bounds import close

from keysync_jax.core.errors import UsageError
from keysync_jax.data_pipeline.synthetic import TalkerOptions, make_clip
from keysync_jax.data_pipeline.synthetic.geometry import MAX_OPENING


@pytest.fixture(scope="module")
def clip():
    return make_clip(11, frames=60)


def test_shapes_and_types(clip):
    assert clip.frames.shape == (60, 128, 128, 3) and clip.frames.dtype == np.uint8
    assert clip.samples.shape == (60 * 640,) and clip.samples.dtype == np.float32 and np.abs(clip.samples).max() < 1
    assert clip.landmarks.shape == (60, 68, 2) and clip.landmarks.dtype == np.float32
    for name in ("opening", "width", "valence", "arousal"):
        assert getattr(clip, name).shape == (60,) and getattr(clip, name).dtype == np.float32
    assert clip.is_closure.dtype == bool and clip.occluder_mask is None


def test_same_seed_gives_the_same_bytes_whatever_came_before(clip):
    make_clip(12, frames=5, size=64, options=TalkerOptions(emotion=True, occluder="hand"))
    again = make_clip(11, frames=60)
    for name in ("frames", "samples", "landmarks", "opening", "width", "is_closure"):
        assert getattr(clip, name).tobytes() == getattr(again, name).tobytes(), name
    assert clip.identity == again.identity and clip.phonemes == again.phonemes


def test_other_seeds_give_other_people_and_voices(clip):
    other = make_clip(12, frames=60)
    assert other.identity != clip.identity
    assert np.abs(other.samples - clip.samples).max() > 0.01
    assert np.abs(other.frames.astype(int) - clip.frames).mean() > 10


def test_identity_with_the_voice_of_another_clip(clip):
    voice = make_clip(99, frames=60)
    target = make_clip(11, frames=60, audio_seed=99)
    assert target.samples.tobytes() == voice.samples.tobytes()
    assert target.identity == clip.identity
    # Same relative articulation, on this face: openings are proportional.
    scale = target.identity["mouth_opening"] / voice.identity["mouth_opening"]
    close(target.opening, voice.opening * scale, 4)
    still = [*range(0, 3), *range(14, 48)]
    np.testing.assert_array_equal(target.landmarks[:, still], clip.landmarks[:, still])
    moved = make_clip(11, frames=60, motion_seed=5)
    assert moved.samples.tobytes() == clip.samples.tobytes() and moved.identity == clip.identity
    assert np.abs(moved.landmarks[:, 27] - clip.landmarks[:, 27]).max() > 0.5


def test_landmarks_agree_with_opening_and_width(clip):
    eyes = np.linalg.norm(clip.landmarks[:, 45] - clip.landmarks[:, 36], axis=1)
    gap = np.linalg.norm(clip.landmarks[:, 66] - clip.landmarks[:, 62], axis=1) / eyes
    across = np.linalg.norm(clip.landmarks[:, 54] - clip.landmarks[:, 48], axis=1) / eyes
    # Yaw and pitch change a length by their parallax only: some per cent of a mouth that opens by .4 and is .9 wide.
    np.testing.assert_allclose(gap, clip.opening, atol=0.012)
    np.testing.assert_allclose(across, clip.width, atol=0.03)
    assert clip.opening.max() > 0.5 * MAX_OPENING and clip.opening.min() == 0


def test_landmarks_lie_on_the_drawn_features():
    clip = make_clip(21, frames=50, size=256)
    gray = clip.frames.astype(np.float32).mean(-1)
    for t in range(0, 50, 7):
        points = clip.landmarks[t]
        if clip.opening[t] > 0.1:  # below the teeth the gap is darker than the lip around it
            x, y = points[[62, 66]].mean(0)
            lip = gray[t, int(points[[66, 57], 1].mean()), int(points[57, 0])]
            assert gray[t, int(0.35 * points[62, 1] + 0.65 * points[66, 1]), int(x)] < 0.75 * lip
        # The nose tip and the chin are skin: redder than green, and the outline separates chin from what is below.
        r, g, _ = clip.frames[t, int(points[30, 1]), int(points[30, 0])].astype(int)
        assert r > g
        above = gray[t, int(points[8, 1]) - 4, int(points[8, 0])]
        below = gray[t, int(points[8, 1]) + 4, int(points[8, 0])]
        assert above > below + 5


def test_size_is_only_resolution():
    small, large = make_clip(11, frames=6, size=128), make_clip(11, frames=6, size=256)
    close(large.landmarks, 2 * small.landmarks, 4)
    shrunk = np.stack([cv2.resize(f, (128, 128), interpolation=cv2.INTER_AREA) for f in large.frames])
    assert np.abs(shrunk.astype(int) - small.frames).mean() < 2.0


def test_silent_clip_keeps_the_mouth_shut():
    clip = make_clip(4, frames=40, size=64, options=TalkerOptions(silent=True))
    assert clip.opening.max() == 0 and not clip.phonemes and not clip.is_closure.any()
    assert 0 < np.abs(clip.samples).max() < 0.1
    digital = make_clip(4, frames=5, size=64, options=TalkerOptions(silent=True, room_db=float("-inf")))
    assert not digital.samples.any()


@pytest.mark.parametrize("kind", ["hand", "microphone"])
def test_occluder_mask_is_exact(kind):
    plain = make_clip(8, frames=50)
    clip = make_clip(8, frames=50, options=TalkerOptions(occluder=kind))
    changed = (clip.frames != plain.frames).any(-1)
    mask = clip.occluder_mask
    assert mask.shape == (50, 128, 128) and 0.005 < mask.mean() < 0.4 and not mask[0].any()
    grown = np.stack([cv2.dilate(m.astype(np.uint8), np.ones((3, 3), np.uint8)) for m in mask]).astype(bool)
    # Only the anti-aliased rim outside it is touched; a fingertip may cover less than half of a pixel with no masked neighbour.
    assert (changed & ~grown).sum() < 0.002 * mask.sum()
    assert changed[mask].mean() > 0.97
    mouth = clip.landmarks[:, [48, 54, 62, 66]].mean(1).astype(int)
    assert mask[np.arange(50), mouth[:, 1], mouth[:, 0]].any() or kind == "hand"  # a microphone comes to the mouth


def test_emotion_moves_brows_and_corners_but_no_measure():
    plain, felt = make_clip(8, frames=50), make_clip(8, frames=50, options=TalkerOptions(emotion=True))
    assert not plain.valence.any() and np.abs(felt.valence).max() > 0.2 and np.abs(felt.valence).max() <= 1
    np.testing.assert_array_equal(plain.opening, felt.opening)
    np.testing.assert_array_equal(plain.width, felt.width)
    lifted = plain.landmarks[:, 48, 1] - felt.landmarks[:, 48, 1]
    assert np.corrcoef(lifted, felt.valence)[0, 1] > 0.95
    raised = plain.landmarks[:, 19, 1] - felt.landmarks[:, 19, 1]
    assert np.corrcoef(raised, felt.arousal)[0, 1] > 0.7


@pytest.mark.parametrize(
    "arguments, word",
    [({"seed": -1}, "seed"), ({"seed": 0, "frames": 0}, "frame"), ({"seed": 0, "size": 65}, "even"), ({"seed": 0, "size": 16}, "48")],
)
def test_impossible_arguments_are_named(arguments, word):
    with pytest.raises(UsageError, match=word):
        make_clip(**arguments)


def test_impossible_options_are_named():
    with pytest.raises(UsageError, match="scarf"):
        TalkerOptions(occluder="scarf")
    with pytest.raises(UsageError, match="laughter"):
        TalkerOptions(laughter=2)
