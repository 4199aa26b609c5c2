"""diffusers' names of the U-Net and the VAE, against stored maps of the real models and in both directions."""

import json

import numpy as np
import pytest
from checkpoints import SVD, VAE, draw, same

from keysync_jax.config import UNetConfig, VAEConfig
from keysync_jax.converters import diffusers, sgm
from keysync_jax.converters.parts import part_table
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import prefixed


@pytest.fixture(scope="module")
def manifest(golden_dir):
    return lambda name: json.loads((golden_dir / "manifests" / f"{name}.json").read_text())


def test_full_size_unet(manifest):
    stored = manifest("svd_diffusers_unet")
    config = diffusers.unet_config_from_diffusers(stored["meta"]["config"], "manifest")
    assert config == UNetConfig(audio_cond_method="none", adm_in_channels=768)
    names = diffusers.unet_map(config)
    assert names == manifest("svd_unet_key_map_hf_to_sgm") and len(names) == 1428
    sizes = {e.torch_key: list(e.torch_shape) for e in sgm.unet_table(config)}
    assert {key: sizes[ours] for key, ours in names.items()} == {key: t["shape"] for key, t in stored["tensors"].items()}


def test_full_size_vae(manifest):
    stored = manifest("svd_diffusers_vae")
    config = diffusers.vae_config_from_diffusers(stored["meta"]["config"], "manifest")
    assert config == VAEConfig()
    names = diffusers.vae_map(config)
    assert names == manifest("svd_vae_key_map_hf_to_sgm") and len(names) == 374
    renamed = diffusers.vae_to_diffusers(draw(part_table(config)), config)
    assert {key: list(t.shape) for key, t in renamed.lazy_items()} == {key: t["shape"] for key, t in stored["tensors"].items()}


def test_stored_small_vae(golden_dir):
    folder = golden_dir / "diffusers_vae"
    config = diffusers.vae_config_from_diffusers(json.loads((folder / "case.json").read_text())["config"], "case")
    assert diffusers.vae_map(config) == json.loads((folder / "key_map.json").read_text())


# A two-level case that was verified against the diffusers class, spelled out where the numbering differs from SVD's.
def test_small_unet_names():
    names = diffusers.unet_map(SVD)
    assert names["down_blocks.0.resnets.0.spatial_res_block.conv1.weight"] == "input_blocks.1.0.in_layers.2.weight"
    assert names["down_blocks.0.downsamplers.0.conv.weight"] == "input_blocks.2.0.op.weight"
    assert (
        names["down_blocks.1.attentions.0.temporal_transformer_blocks.0.norm_in.weight"] == "input_blocks.3.1.time_stack.0.norm_in.weight"
    )
    assert names["down_blocks.1.attentions.0.time_pos_embed.linear_2.bias"] == "input_blocks.3.1.time_pos_embed.2.bias"
    assert names["mid_block.resnets.1.temporal_res_block.time_emb_proj.bias"] == "middle_block.2.time_stack.emb_layers.1.bias"
    assert names["up_blocks.0.upsamplers.0.conv.bias"] == "output_blocks.1.2.conv.bias"  # behind an attention
    assert names["up_blocks.1.resnets.1.spatial_res_block.conv_shortcut.weight"] == "output_blocks.3.0.skip_connection.weight"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_mult": (1,), "attention_resolutions": (1,)},
        {"channel_mult": (1, 2, 2), "attention_resolutions": (1,), "num_res_blocks": 3},
        {"channel_mult": (1, 1, 2, 2, 4), "attention_resolutions": (16, 2), "num_res_blocks": 2},
        {"transformer_depth": 2, "attention_resolutions": (2, 1)},
    ],
)
def test_any_depth_is_a_bijection_and_survives_both_ways(changes):
    config = UNetConfig(**{f: getattr(SVD, f) for f in SVD.__dataclass_fields__} | changes)
    tensors = draw(prefixed(sgm.UNET, sgm.unet_table(config)))
    renamed = diffusers.unet_to_diffusers(tensors, config)
    assert len(renamed) == len(tensors)
    assert not any("input_blocks" in key or "time_stack" in key for key in renamed)
    assert same(diffusers.unet_to_sgm(renamed, config), tensors)
    written = diffusers.unet_config_to_diffusers(config, 16)
    assert diffusers.unet_config_from_diffusers(written, "written") == config


@pytest.mark.parametrize("mult", [(1,), (1, 2), (1, 2, 4, 4)])
def test_vae_both_ways(mult):
    config = VAEConfig(base_channels=32, channel_mult=mult)
    tensors = draw(part_table(config))
    renamed = diffusers.vae_to_diffusers(tensors, config)
    attention = "decoder.mid_block.attentions.0.to_q.weight"
    assert renamed.info(attention).shape == (32 * mult[-1],) * 2  # linear there, a 1x1 convolution here
    np.testing.assert_array_equal(renamed[attention], tensors["first_stage_model.decoder.mid.attn_1.q.weight"][:, :, 0, 0])
    assert renamed.info("quant_conv.weight").shape == (8, 8, 1, 1)  # a convolution on both sides
    assert same(diffusers.vae_to_sgm(renamed, config), tensors)
    assert diffusers.vae_config_from_diffusers(diffusers.vae_config_to_diffusers(config, 128), "written") == config


def test_what_diffusers_cannot_express():
    with pytest.raises(KeySyncError, match="merge_strategy='fixed'"):
        diffusers.unet_map(UNetConfig(merge_strategy="fixed"))
    with pytest.raises(KeySyncError, match="no label_emb"):
        diffusers.unet_map(UNetConfig(audio_cond_method="none"))
    with pytest.raises(KeySyncError, match="num_res_blocks 2, this VAE has 1"):
        diffusers.vae_map(VAEConfig(num_res_blocks=1))
    with pytest.raises(KeySyncError, match="temporal decoder"):
        diffusers.vae_map(VAEConfig(decoder="image"))
    # Names and shapes would fit, and diffusers would compute something else.
    for changes in ({"norm_groups": 8}, {"channel_mult": (2, 2)}, {"use_spatial_context": False}, {"max_time_embed_period": 100}):
        with pytest.raises(KeySyncError, match=f"cannot express {next(iter(changes))}="):
            diffusers.unet_map(UNetConfig(model_channels=64, num_head_channels=32, **changes))
    for changes in ({"norm_groups": 8}, {"channel_mult": (2, 2)}):
        with pytest.raises(KeySyncError, match="needs norm_groups=32 and a channel_mult that begins with 1"):
            diffusers.vae_map(VAEConfig(**changes))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"num_attention_heads": [1, 1]}, r"\[32, 64\] wide"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"block_out_channels": None}, "block_out_channels"),
        ({"block_out_channels": [64, 96]}, r"\[64, 96\] are not multiples of the first"),
        ({"block_out_channels": 64}, r"unet/config\.json holds a value that cannot be read"),
        ({"in_channels": "eight"}, r"unet/config\.json holds a value that cannot be read \(.*'eight'\)"),
        ({"num_attention_heads": 0}, r"unet/config\.json holds a value that cannot be read"),
        ({"num_attention_heads": [1, 2, 4]}, r"unet/config\.json holds a value that cannot be read"),
    ],
)
def test_other_configs_are_refused(changes, word):
    values = diffusers.unet_config_to_diffusers(SVD, 16) | changes
    values = {key: value for key, value in values.items() if value is not None}
    with pytest.raises(KeySyncError, match=word):
        diffusers.unet_config_from_diffusers(values, "unet/config.json")
    with pytest.raises(KeySyncError, match="AutoencoderKL;"):
        diffusers.vae_config_from_diffusers(
            diffusers.vae_config_to_diffusers(VAE, 128) | {"_class_name": "AutoencoderKL"}, "vae/config.json"
        )
