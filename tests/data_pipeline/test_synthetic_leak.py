"""What surrounds the dubbed region knows nothing of the mouth; chin and cheeks within it do, as in real faces."""

from keysync_jax.data_pipeline.synthetic import TalkerOptions, make_clip
from keysync_jax.data_pipeline.synthetic.talker_figures import box_mask, leakage


def test_another_voice_changes_no_pixel_outside_the_box():
    for seed in (2000, 2005, 2011):
        one, other = make_clip(seed), make_clip(seed, audio_seed=seed + 7777)
        changed = (one.frames != other.frames).any(-1)
        box = box_mask(one)
        assert not (changed & ~box).any()
        assert changed[box].mean() > 0.15


def test_r2_against_the_opening():
    table = leakage(24, size=64)
    assert table.still_landmarks < 0.02
    assert table.jaw_sides < 0.02
    assert table.head_motion < 0.02
    assert table.pixels_above < 0.02
    assert table.chin > 0.5


def test_cheeks_move_with_the_width():
    # Freeze the head; then everything that changes in the cheeks comes from the mouth.
    clip = make_clip(2003, frames=80, options=TalkerOptions(motion=0.0))
    x, y = clip.landmarks[0, 54]
    cheek = clip.frames[:, int(y) - 6 : int(y) + 8, int(x) + 4 : int(x) + 12].astype(float)
    assert cheek.std(0).mean() > 0.5
    forehead = clip.frames[:, 30:40, 55:75].astype(float)
    assert forehead.std(0).max() == 0
