"""The tables against the manifests of the full-size models and against the networks themselves."""

import dataclasses
import json
import math

import jax
import pytest

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.converters import sgm, sgm_config
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models import stage
from keysync_jax.models.freezing import frozen_mask

KEYFRAME = StageConfig()
INTERPOLATION = StageConfig(stage="interpolation", unet=UNetConfig(in_channels=9))
DECODER = sgm.vae_table(VAEConfig(quant_conv=False), parts=("decoder",))
KL_COPY = sgm.vae_table(VAEConfig(decoder="image", post_quant_conv=True), prefix="conditioner.embedders.0.encoder")


@pytest.fixture(scope="module")
def manifest(golden_dir):
    def read(name):
        return json.loads((golden_dir / "manifests" / f"{name}.json").read_text())

    return read


def shapes_of(manifest):
    return {key: tuple(entry["shape"]) for key, entry in manifest["tensors"].items()}


def shapes(*tables):
    return {entry.torch_key: entry.torch_shape for table in tables for entry in table}


def flat(tree):
    return {tuple(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def test_keyframe_manifest(manifest):
    table = sgm.stage_table(KEYFRAME)
    assert (len(sgm.unet_table(KEYFRAME.unet)), len(table), len(DECODER)) == (1428, 1430, 266)
    assert shapes(table, DECODER) == shapes_of(manifest("keysync_keyframe"))
    with_encoder = sgm.vae_table(VAEConfig(quant_conv=False))
    assert shapes(table, with_encoder) == shapes_of(manifest("keysync_keyframe_with_encoder"))


def test_interpolation_manifest(manifest):
    table = sgm.stage_table(INTERPOLATION)
    assert len(table) + len(DECODER) == 1697
    assert len(KL_COPY) == 248
    assert shapes(table, DECODER, KL_COPY) == shapes_of(manifest("keysync_interpolation"))


def test_svd_manifest(manifest):
    config = UNetConfig(audio_cond_method="none", adm_in_channels=768)
    expected = shapes_of(manifest("svd_sgm_unet"))
    prefix = sgm.UNET_PREFIX if next(iter(expected)).startswith("model.") else ""
    assert {prefix + key: shape for key, shape in shapes(sgm.unet_table(config)).items()} == expected


@pytest.mark.parametrize(
    ("config", "total", "trained", "name"),
    [(KEYFRAME, 1_524_950_762, 868_873_924, "trainable_keyframe"), (INTERPOLATION, 1_524_953_642, 868_876_804, "trainable_interpolation")],
    ids=["keyframe", "interpolation"],
)
def test_full_size_network_and_freezing(config, total, trained, name, manifest):
    tree = stage.abstract_params(config)
    leaves = flat(tree)
    table = sgm.stage_table(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {entry.flax_path: entry.flax_shape for entry in table}
    assert len({entry.torch_key for entry in table}) == len(table)
    unet = {path: math.prod(leaf.shape) for path, leaf in leaves.items() if path[:2] == ("model", "diffusion_model")}
    assert sum(unet.values()) == total
    frozen = flat(frozen_mask(tree))
    assert sum(frozen.values()) == 738 and len(unet) - 738 == 690
    assert sum(size for path, size in unet.items() if frozen[path]) == 656_076_838
    assert sum(size for path, size in unet.items() if not frozen[path]) == trained
    assert {entry.torch_key: frozen[entry.flax_path] for entry in table} == {e.torch_key: sgm.is_frozen(e.torch_key) for e in table}
    lists = manifest(name)
    assert {entry.torch_key for entry in table if frozen[entry.flax_path]} == {_full(key) for key in lists["frozen"]}
    assert not any(sgm.is_frozen(entry.torch_key) for entry in (*DECODER, *KL_COPY))  # the decoder's time_stack is not the U-Net's


def _full(key):
    return key if key.startswith("model.") else f"model.{key}" if key.startswith("diffusion_model.") else f"{sgm.UNET_PREFIX}{key}"


@pytest.mark.parametrize(
    "config",
    [
        VAEConfig(),
        VAEConfig(quant_conv=False),
        VAEConfig(decoder="image", post_quant_conv=True),
        VAEConfig(channel_mult=(1, 2), num_res_blocks=1),
    ],
)
def test_autoencoder(config):
    leaves = flat(stage.abstract_vae_params(config))
    table = sgm.vae_table(config)
    assert {path: leaf.shape for path, leaf in leaves.items()} == {entry.flax_path: entry.flax_shape for entry in table}


SMALL = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_head_channels=16, context_dim=24, audio_dim=24
)


@pytest.mark.parametrize(
    "changes",
    [
        {"transformer_depth": 2},
        {"use_spatial_context": False},
        {"merge_strategy": "fixed"},
        {"video_kernel_size": (5, 1, 1)},
        {"audio_cond_method": "none"},
        {"adm_in_channels": 12},
        {"channel_mult": (1, 2, 1), "num_res_blocks": 2, "attention_resolutions": (1, 4)},
        {"additional_audio_frames": 1, "context_dim": 72},
    ],
    ids=str,
)
def test_other_networks(changes):
    unet = dataclasses.replace(SMALL, **changes)
    if unet.adm_in_channels:  # a stage gives no vector: look at the U-Net by itself
        from keysync_jax.models.video_unet import VideoUNet

        x = jax.ShapeDtypeStruct((1, 2, 4, 4, 8), "float32")
        args = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((1,), (1, 2, 24))]
        vector = jax.ShapeDtypeStruct((1, 12), "float32")
        tree = jax.eval_shape(lambda *a: VideoUNet(unet).init(jax.random.key(0), *a[:3], vector=a[3]), x, *args, vector)["params"]
        table = sgm.unet_table(unet)
    else:
        config = StageConfig(unet=unet, latent_size=4, audio_feature_dim=6)
        tree, table = stage.abstract_params(config), sgm.stage_table(config)
    assert {path: leaf.shape for path, leaf in flat(tree).items()} == {entry.flax_path: entry.flax_shape for entry in table}


def test_layouts_and_names():
    entries = {entry.torch_key: entry for entry in (*sgm.stage_table(INTERPOLATION), *DECODER)}
    unet = "model.diffusion_model"
    temporal = entries[f"{unet}.input_blocks.4.0.time_stack.in_layers.2.weight"]
    assert temporal.flax_path == ("model", "diffusion_model", "input_blocks_4_0", "time_stack", "in_layers_2", "kernel")
    assert (temporal.torch_shape, temporal.flax_shape) == ((640, 640, 3, 1, 1), (3, 1, 640, 640))
    assert entries["model.learned_mask"].flax_shape == (64, 64, 4)
    assert entries["first_stage_model.decoder.mid.attn_1.q.weight"].flax_shape == (512, 512)
    assert entries["first_stage_model.decoder.conv_out.time_mix_conv.weight"].flax_path[-3:] == ("conv_out", "time_mix_conv", "kernel")


# -- the reference's constructor arguments -----------------------------------------------------------------------------------------

ARGUMENTS = {
    "adm_in_channels": 0,
    "num_classes": "sequential",
    "use_checkpoint": True,
    "in_channels": 8,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
    "transformer_depth": 1,
    "context_dim": 1024,
    "spatial_transformer_attn_type": "softmax-xformers",
    "extra_ff_mix_layer": True,
    "use_spatial_context": True,
    "merge_strategy": "learned_with_images",
    "video_kernel_size": [3, 1, 1],
    "fine_tuning_method": None,
    "audio_cond_method": "both_keyframes",
    "additional_audio_frames": 0,
    "audio_dim": 1024,
    "unfreeze_blocks": [],
}


def test_released_arguments_are_the_default_config():
    assert sgm.unet_config_from_sgm(ARGUMENTS) == UNetConfig()


def test_no_label_path_without_classes():
    config = sgm.unet_config_from_sgm({**ARGUMENTS, "num_classes": None, "adm_in_channels": 5})
    assert config.label_dim == 0


def test_attention_at_factors_that_no_level_has_is_no_attention():
    """As in the reference case "unet_to_time_emb": one level, attention at factor 2."""
    assert sgm.unet_config_from_sgm({**ARGUMENTS, "channel_mult": [1], "attention_resolutions": [2]}).attention_resolutions == ()
    assert sgm.unet_config_from_sgm({**ARGUMENTS, "channel_mult": [1, 2]}).attention_resolutions == (2, 1)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"flux": 1}, "argument flux is unknown"),
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm True is not supported"),
        ({"video_kernel_size": 3}, "video_kernel_size 3 is not supported"),
        ({"video_kernel_size": [3, 3, 3]}, "temporal kernels are"),
        ({"num_classes": 10}, "num_classes 10"),
        ({"transformer_depth": [1, 1, 2, 1]}, "differs between levels"),
        ({"audio_cond_method": "cross_attention"}, "cross_attention"),
        ({"use_linear_in_transformer": False}, "use_linear_in_transformer False"),
    ],
)
def test_other_arguments_are_refused_by_name(changes, match):
    with pytest.raises(KeySyncError, match=match):
        sgm.unet_config_from_sgm({**ARGUMENTS, **changes})
    incomplete = {key: value for key, value in ARGUMENTS.items() if key != "context_dim"}
    with pytest.raises(KeySyncError, match="argument context_dim is missing"):
        sgm.unet_config_from_sgm(incomplete)


DDCONFIG = {
    "attn_type": "vanilla",
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def test_autoencoder_arguments():
    kl = sgm.vae_config_from_sgm({"embed_dim": 4, "monitor": "x", "ddconfig": DDCONFIG, "lossconfig": {}})
    assert kl == VAEConfig(decoder="image", quant_conv=True, post_quant_conv=True)
    decoder = {"target": "sgm.modules.autoencoding.temporal_ae.VideoDecoder", "params": {**DDCONFIG, "video_kernel_size": [3, 1, 1]}}
    engine = {"encoder_config": {"target": "Encoder", "params": DDCONFIG}, "decoder_config": decoder}
    assert sgm.vae_config_from_sgm(engine) == VAEConfig(quant_conv=False)
    for changes, match in (
        ({"attn_resolutions": [16]}, "attn_resolutions"),
        ({"colour": 1}, "colour is unknown"),
        ({"double_z": False}, "double_z"),
    ):
        with pytest.raises(KeySyncError, match=match):
            sgm.vae_config_from_sgm({"embed_dim": 4, "ddconfig": {**DDCONFIG, **changes}})
    with pytest.raises(KeySyncError, match="embed_dim 3"):
        sgm.vae_config_from_sgm({"embed_dim": 3, "ddconfig": DDCONFIG})
    other = {**engine, "encoder_config": {"target": "Encoder", "params": {**DDCONFIG, "ch": 64}}}
    with pytest.raises(KeySyncError, match="differ in base_channels"):
        sgm.vae_config_from_sgm(other)


def test_engine_arguments():
    audio = {
        "target": "sgm.modules.encoders.modules.WhisperAudioEmbedder",
        "params": {"merge_method": "mean", "linear_dim": 1024, "audio_dim": 768},
    }
    engine = {
        "scale_factor": 0.18215,
        "network_config": {"params": {**ARGUMENTS, "in_channels": 9}},
        "network_wrapper": {"target": "x.InterpolationWrapper", "params": {"im_size": [512, 512], "starting_mask_method": "zeros"}},
        "conditioner_config": {"params": {"emb_models": [{"target": "x.IdentityEncoder"}, audio]}},
    }
    config, latent_shape = sgm.stage_config_from_sgm(engine)
    assert (config, latent_shape) == (INTERPOLATION, (64, 64))
    engine["network_wrapper"] = {"target": "x.DubbingWrapper", "params": {"mask_input": True}}
    engine["network_config"] = {"params": ARGUMENTS}
    assert sgm.stage_config_from_sgm(engine) == (KEYFRAME, None)
    engine["network_wrapper"] = {"target": "x.OpenAIWrapper"}
    with pytest.raises(KeySyncError, match="OpenAIWrapper"):
        sgm.stage_config_from_sgm(engine)
    with pytest.raises(KeySyncError, match="fix_image_leak True"):
        sgm_config.wrapper_from_sgm("x.InterpolationWrapper", {"fix_image_leak": True})
