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
