"""Shot detection on drawn talkers: cuts to the frame, nothing else."""

import cv2
import numpy as np
import pytest

from keysync_jax.media.shots import ShotDetector


def talker(index: int, view: int = 0, speed: float = 1.0) -> np.ndarray:
    """uint8 RGB `[90, 160, 3]`: a head that sways and talks before a textured wall; `view` is another camera."""
    rng = np.random.default_rng(view)
    wall = cv2.resize(rng.random((9, 16, 3)).astype(np.float32), (160, 90), interpolation=cv2.INTER_CUBIC) * 0.4 + 0.2
    image = np.ascontiguousarray((wall * 255).clip(0, 255).astype(np.uint8))
    x = int(80 + 14 * np.sin(speed * index / 6) + 12 * (view % 2))
    size = 20 + 8 * (view % 3)
    cv2.ellipse(image, (x, 45), (size, int(1.3 * size)), 0, 0, 360, (205, 150, 125), -1, cv2.LINE_AA)
    cv2.ellipse(image, (x, 55), (8, 2 + int(3 * abs(np.sin(index)))), 0, 0, 360, (90, 30, 40), -1, cv2.LINE_AA)
    grain = np.random.default_rng(1000 + index).integers(-6, 7, image.shape)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def detect(frames) -> ShotDetector:
    detector = ShotDetector()
    for index, frame in enumerate(frames):
        detector.update(np.ascontiguousarray(frame), index)
    return detector


def other_view(frame: np.ndarray) -> np.ndarray:
    """The same person from elsewhere: mirrored, closer, brighter."""
    closer = cv2.resize(frame[15:75, 30:130][:, ::-1], (160, 90))
    return np.clip(closer * 1.15 + 8, 0, 255).astype(np.uint8)


CLIP = [talker(i) for i in range(60)]


@pytest.mark.parametrize("speed", [0.0, 1.0, 3.0])
def test_one_shot_has_no_cut_however_fast_the_head_moves(speed):
    assert detect([talker(i, speed=speed) for i in range(60)]).cuts == []


def test_cuts_are_found_at_the_exact_frame():
    frames = CLIP[:17] + [talker(i, view=1) for i in range(17, 38)] + [other_view(f) for f in CLIP[38:]]
    detector = detect(frames)
    assert detector.cuts == [17, 38]
    assert detector.shots == [(0, 17), (17, 38), (38, 60)]


def test_cut_to_another_view_of_the_same_person():
    for at in (8, 30, 52):
        assert detect(CLIP[:at] + [other_view(f) for f in CLIP[at:]]).cuts == [at]


def test_a_jump_of_the_head_before_the_same_wall_is_a_cut():
    still = [talker(i, speed=0.05) for i in range(100)]
    assert detect(still[:20] + [np.roll(f, 35, axis=1) for f in still[20:40]]).cuts == [20]


def test_flashes_and_single_black_frames_are_no_cuts():
    for length in (1, 3, 5):
        for value in (0, 255):
            frames = list(CLIP)
            frames[25 : 25 + length] = [np.full_like(CLIP[0], value)] * length
            assert detect(frames).cuts == [], (length, value)
    fading = [f.astype(np.float32) for f in CLIP]
    for k, strength in enumerate((0.9, 0.5, 0.3, 0.15)):
        fading[25 + k] = fading[25 + k] * (1 - strength) + 255 * strength
    assert detect([f.astype(np.uint8) for f in fading]).cuts == []


def test_ten_black_frames_are_a_shot_of_their_own():
    frames = list(CLIP)
    frames[25:35] = [np.zeros_like(CLIP[0])] * 10
    assert detect(frames).shots == [(0, 25), (25, 35), (35, 60)]


def test_a_fade_through_black_is_no_cut():
    frames = [f.astype(np.float32) for f in CLIP]
    for k in range(10):
        frames[20 + k] *= 1 - (k + 1) / 10
        frames[30 + k] *= k / 10
    assert detect([f.astype(np.uint8) for f in frames]).cuts == []


def test_repeated_and_dropped_frames_are_no_cuts():
    assert detect([f for f in CLIP for _ in range(2)]).cuts == []
    assert detect(CLIP[::3]).cuts == []
    cut = CLIP[:30] + [other_view(f) for f in CLIP[30:]]
    assert detect([f for f in cut for _ in range(2)]).cuts == [60]


def test_very_short_clips():
    assert ShotDetector().shots == []
    assert detect(CLIP[:1]).shots == [(0, 1)]
    assert detect([CLIP[0], talker(1, view=1)]).shots == [(0, 1), (1, 2)]


def test_size_of_the_pictures_hardly_matters():
    frames = CLIP[:20] + [other_view(f) for f in CLIP[20:40]]
    for size in ((64, 36), (480, 270), (90, 160)):
        assert detect([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames]).cuts == [20]


def test_frames_out_of_order_are_refused():
    detector = detect(CLIP[:3])
    with pytest.raises(ValueError, match="frame 7 given, frame 3 expected"):
        detector.update(CLIP[7], 7)
