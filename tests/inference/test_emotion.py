"""Emotions over time: names, points, numbers and files, and what is refused."""

import json

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.animate_options import AnimateOptions
from keysync_jax.inference.emotion import NAMED, EmotionCurve
from keysync_jax.inference.emotion_picture import draw


def values(text, frames=26, strength=1.0):
    sampled = EmotionCurve.parse(text, strength).sampled(frames)
    return sampled["valence"], sampled["arousal"]


def test_names_points_and_numbers():
    valence, arousal = values("happy")
    assert (valence == np.float32(0.85)).all() and (arousal == np.float32(0.75)).all() and len(valence) == 26
    valence, arousal = values("neutral, Happy,sad", frames=101)
    assert [valence[0], valence[50], valence[100]] == pytest.approx([0, 0.85, -0.85]) and valence[25] == pytest.approx(0.425)
    assert arousal[100] == pytest.approx(-0.35)
    assert [array[7] for array in values("-0.5,0.2")] == pytest.approx([-0.5, 0.2])
    assert [array[0] for array in values("0.8,-0.6", strength=1.5)] == pytest.approx([1, -0.9])
    assert values("surprised", frames=1)[1] == pytest.approx(0.85)


def test_curves_are_linear_between_points_and_held_at_the_ends(tmp_path):
    table = tmp_path / "curve.csv"
    table.write_text("seconds;valence;arousal\n0.2;-1;0\n0.6;1;0,5\n".replace("0,5", "0.5"))
    valence, arousal = values(str(table))
    assert valence[:6].tolist() == pytest.approx([-1] * 6) and valence[15:].tolist() == pytest.approx([1] * 11)
    assert valence[10] == pytest.approx(0) and arousal[10] == pytest.approx(0.25)
    points = tmp_path / "curve.json"
    points.write_text(json.dumps([[0, "calm"], {"seconds": 1.0, "name": "angry"}, {"seconds": 2, "valence": 0, "arousal": 1}]))
    valence, arousal = values(str(points), frames=51)
    assert (valence[0], arousal[25], arousal[50]) == pytest.approx((0.65, 0.908, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hapy", r"no emotion 'hapy'; did you mean happy\? the names, .*overwhelmed \(-0.6,0.8\)"),
        ("1.2,0", "valence 1.2 is out of range"),
        ("0,nan", "arousal nan is out of range"),
        ("", "give a name"),
        ("0.5", "give a name"),
        ("happy,0.5", "give a name"),
    ],
)
def test_what_is_no_emotion_is_refused_by_name(text, message):
    with pytest.raises(UsageError, match=message):
        AnimateOptions(emotion=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0,2,0\n", "point 1: valence 2 is out of range"),
        ("0,0,0\n0,1,1\n", "the seconds must rise"),
        ("0,0,0\n1,furious\n", "there is no emotion 'furious'"),
        ("0,0\n", r"point 1 is \['0', '0'\]; write seconds, valence, arousal"),
        ("-1,0,0\n", "point 1 is"),
        ("seconds,valence,arousal\n", "holds no point"),
    ],
)
def test_wrong_rows_of_a_curve_are_named(tmp_path, text, message):
    path = tmp_path / "curve.csv"
    path.write_text(text)
    with pytest.raises(KeySyncError, match=message):
        EmotionCurve.parse(str(path))
    with pytest.raises(KeySyncError, match="cannot be read"):
        EmotionCurve.parse(str(tmp_path / "other.json"))


def test_options_contradict_and_are_held_in_range():
    for options, message in (
        ({"paste": True, "size": 64}, "--size and --paste"),
        ({"size": 33}, "even number"),
        ({"emotion_strength": -1.0}, "--emotion-strength -1.0"),
        ({"crop": "tight"}, "--crop tight"),
        ({"at": -1.0}, "--at -1.0"),
        ({"guidance": "audio=1", "audio_scale": 2.0}, "--audio-scale and --guidance"),
        ({"autoguidance": 200.0}, "--autoguidance 200"),
        ({"face": "upper"}, "face choice 'upper'"),
    ):
        with pytest.raises(UsageError, match=message):
            AnimateOptions(**options)


def test_the_picture_shows_both_curves():
    picture = np.asarray(draw(EmotionCurve.parse("neutral,happy,sad").sampled(50), [0, 13, 26, 39], "emotion"))
    assert picture.shape == (200, 960, 3)
    for colour in ((205, 60, 45), (60, 110, 170)):
        assert (picture == colour).all(axis=-1).sum() > 500
    assert len(NAMED) == 24
