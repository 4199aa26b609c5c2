import dataclasses
from typing import Any

import pytest

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, from_dict, to_dict
from keysync_jax.core.errors import KeySyncError


def test_round_trip_through_json_types():
    config = StageConfig(stage="interpolation", unet=UNetConfig(in_channels=9, channel_mult=(1, 2)))
    values = to_dict(config)
    assert values["unet"]["channel_mult"] == [1, 2]
    assert from_dict(StageConfig, values) == config


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"stge": "keyframe"}, "stge"),
        ({"unet": {"model_chanels": 3}}, "model_chanels"),
        ({"num_frames": "14"}, "num_frames"),
        ({"num_frames": True}, "num_frames"),
        ({"unet": 3}, "unet"),
        ({"unet": {"channel_mult": 4}}, "channel_mult"),
        ({"stage": "middle"}, "middle"),
        ({"audio_encoder": "encodec"}, "encodec"),
    ],
)
def test_bad_values_are_refused_by_name(values, word):
    with pytest.raises(KeySyncError, match=word) as error:
        from_dict(StageConfig, values, "part/config.json")
    assert "\n" not in str(error.value)


def test_label_width_follows_the_audio_method():
    assert UNetConfig().label_dim == 1024
    assert UNetConfig(additional_audio_frames=1).label_dim == 3 * 1024
    assert UNetConfig(audio_cond_method="none", adm_in_channels=768).label_dim == 768
    assert UNetConfig(audio_cond_method="none").label_dim == 0
    assert VAEConfig().downsample_factor == 8


@dataclasses.dataclass(frozen=True)
class _Inner:
    size: int


@dataclasses.dataclass(frozen=True)
class _File:
    """What a file of ours may hold."""

    name: str
    inner: tuple[_Inner, ...]
    last: _Inner | None = None
    notes: tuple[str, ...] = ()
    objects: tuple[dict[str, int], ...] = ()
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_files_of_ours_are_read_by_what_they_may_hold():
    values = {"name": "x", "inner": [{"size": 1}, {"size": 2}], "last": None, "notes": ["a"], "objects": [{"a": 1}], "free": {"b": [None]}}
    found = from_dict(_File, values, "x.json")
    assert found == _File("x", (_Inner(1), _Inner(2)), None, ("a",), ({"a": 1},), {"b": [None]})
    assert from_dict(_File, {"name": "x", "inner": [], "last": {"size": 3}}).last == _Inner(3)
    for change, words in (
        ({"name": None}, "x.json: name must be str, not None"),
        ({"inner": [{"size": 1}, {"width": 2}]}, r"x.json: inner\[1\]: unknown key width"),
        ({"inner": [{}]}, r"x.json: inner\[0\] lacks size"),
        ({"last": [1]}, r"x.json: last must be a mapping, not \[1\]"),
        ({"objects": ["a"]}, r"x.json: objects\[0\] must be a mapping, not 'a'"),
        ({"notes": [True]}, "x.json: notes must hold str values, not True"),
        ({"free": 1}, "x.json: free must be a mapping, not 1"),
    ):
        with pytest.raises(KeySyncError, match=words):
            from_dict(_File, values | change, "x.json")
    with pytest.raises(KeySyncError, match="x.json lacks inner, name"):
        from_dict(_File, {}, "x.json")
