"""The measurer reads the mouth from pixels, and from nothing else."""

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.synthetic import make_clip, measure_mouth
from keysync_jax.data_pipeline.synthetic.talker_figures import measure_quality


def test_true_frames_of_held_out_identities():
    quality = measure_quality(24, frames=50)
    assert quality.opening_r > 0.98 and quality.width_r > 0.98
    assert quality.worst_opening_r > 0.96 and quality.worst_width_r > 0.95
    assert quality.opening_error < 0.025 and quality.width_error < 0.02


def test_degraded_frames():
    quality = measure_quality(8, frames=50, blur=1.2, noise=1.0)
    assert quality.opening_r > 0.97 and quality.width_r > 0.95


def test_larger_frames():
    quality = measure_quality(2, frames=30, size=256)
    assert quality.worst_opening_r > 0.98 and quality.worst_width_r > 0.97


def test_only_the_eye_corners_are_read():
    clip = make_clip(61_000, frames=30)
    blind = np.full_like(clip.landmarks, np.nan)
    blind[:, [36, 39, 42, 45]] = clip.landmarks[:, [36, 39, 42, 45]]
    one, other = measure_mouth(clip.frames, clip.landmarks), measure_mouth(clip.frames, blind)
    assert one.found.all()
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_closed_is_read_as_closed_and_a_copied_mouth_as_wrong():
    clip, voice = make_clip(61_001, frames=120), make_clip(61_001, frames=120, audio_seed=5)
    found = measure_mouth(clip.frames, clip.landmarks)
    shut = clip.opening == 0
    assert shut.any() and (found.opening[shut] < 0.2 * found.opening.max()).all()
    other = measure_mouth(voice.frames, voice.landmarks)
    assert abs(np.corrcoef(other.opening, clip.opening)[0, 1]) < 0.6
    assert np.corrcoef(other.opening, voice.opening)[0, 1] > 0.98


def test_a_shade_under_the_chin_as_red_as_lips_is_not_a_lip():
    clip = make_clip(61_003, frames=60)
    shaded = clip.frames.astype(np.float32)
    rows = np.arange(shaded.shape[1])[:, None]
    for frame, points in zip(shaded, clip.landmarks, strict=True):
        chin = np.interp(np.arange(shaded.shape[2]), points[3:14, 0], points[3:14, 1], left=1e9, right=1e9)
        below = (rows > chin - 2) & (rows < chin + 6)  # a band: what is under it need not be red
        frame[below] *= [0.75, 0.45, 0.5]
    found, plain = (measure_mouth(f.astype(np.uint8), clip.landmarks) for f in (shaded, clip.frames))
    assert np.corrcoef(found.opening, clip.opening)[0, 1] > 0.98
    assert np.abs(found.opening - plain.opening).max() < 0.05


def test_a_dark_gap_is_no_skin_however_tall_it_is():
    """A dark speaker's open mouth: the cavity is no redder than the skin, and only its darkness says that no chin begins there."""
    clip = make_clip(61_009, frames=60)
    found = measure_mouth(clip.frames, clip.landmarks)
    assert np.corrcoef(found.opening, clip.opening)[0, 1] > 0.97
    assert np.abs(found.opening - clip.opening).max() < 0.1


def test_a_frame_without_a_mouth_is_not_found():
    clip = make_clip(61_002, frames=4)
    found = measure_mouth(np.full_like(clip.frames, 128), clip.landmarks)
    assert not found.found.any() and not found.opening.any()


def test_shapes_that_do_not_fit():
    clip = make_clip(61_002, frames=4, size=64)
    with pytest.raises(KeySyncError, match="68, 2"):
        measure_mouth(clip.frames, clip.landmarks[:3])


def test_what_cannot_be_measured_is_refused():
    clip = make_clip(61_003, frames=5)
    with pytest.raises(KeySyncError, match="uint8 frames"):
        measure_mouth(clip.frames / np.float32(255), clip.landmarks)
    with pytest.raises(KeySyncError, match="measure_mouth needs frames"):
        measure_mouth(clip.frames[:0], clip.landmarks[:0])
    lost = clip.landmarks.copy()
    lost[2, 45] = np.nan
    with pytest.raises(KeySyncError, match="finite eye corners"):
        measure_mouth(clip.frames, lost)
