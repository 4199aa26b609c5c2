"""Which tensor of a published SAM 2.1 checkpoint is which parameter."""

from __future__ import annotations

from collections.abc import Iterator

from keysync_jax.models.sam2.mask_decoder import MASKS
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.table import Entry, Table, conv, linear, norm, prefixed, raw


def sam2_table(config: Sam2Config) -> Table:
    """One entry per tensor of a checkpoint's `["model"]`, apart from those that nothing reads (`sam2_config.UNUSED`)."""
    return [
        *prefixed("image_encoder.trunk", _trunk(config)),
        *prefixed("image_encoder.neck", _neck(config)),
        *prefixed("memory_attention", _memory_attention(config)),
        *prefixed("memory_encoder", _memory_encoder(config)),
        *prefixed("sam_prompt_encoder", _prompt_encoder(config)),
        *prefixed("sam_mask_decoder", _mask_decoder(config)),
        *_own(config),
    ]


def _own(config: Sam2Config) -> Iterator[Entry]:
    width, mem = config.d_model, config.mem_dim
    yield from raw("maskmem_tpos_enc", (config.num_maskmem, 1, 1, mem))
    yield from raw("no_mem_embed", (1, 1, width))
    yield from raw("no_obj_ptr", (1, width))
    yield from raw("no_obj_embed_spatial", (1, mem))
    yield from _mlp("obj_ptr_proj", width, (width, width, width))
    yield from linear("obj_ptr_tpos_proj", width, mem)


def _mlp(key: str, inputs: int, widths: tuple[int, ...]) -> Iterator[Entry]:
    for i, width in enumerate(widths):
        yield from linear(f"{key}.layers.{i}", inputs, width)
        inputs = width


def _trunk(config: Sam2Config) -> Iterator[Entry]:
    width, side = config.embed_dim, config.window_spec[0]
    yield from raw("pos_embed", (1, width, *config.background))
    yield from raw("pos_embed_window", (1, width, side, side))
    yield from conv("patch_embed.proj", "conv2d", 3, width, (7, 7))
    stage = 0
    for i in range(sum(config.stages)):
        key, inputs = f"blocks.{i}", config.stage_dims[stage]
        starts = i - 1 in config.stage_ends
        stage += starts
        out = config.stage_dims[stage]
        yield from norm(f"{key}.norm1", inputs)
        yield from linear(f"{key}.attn.qkv", inputs, 3 * out)
        yield from linear(f"{key}.attn.proj", out, out)
        yield from norm(f"{key}.norm2", out)
        yield from _mlp(f"{key}.mlp", out, (4 * out, out))
        if starts:
            yield from linear(f"{key}.proj", inputs, out)


def _neck(config: Sam2Config) -> Iterator[Entry]:
    for i, width in enumerate(reversed(config.stage_dims)):
        yield from conv(f"convs.{i}.conv", "conv1x1", width, config.d_model, (1, 1))


def _attention(key: str, inputs: int, keys: int, inner: int) -> Iterator[Entry]:
    yield from linear(f"{key}.q_proj", inputs, inner)
    yield from linear(f"{key}.k_proj", keys, inner)
    yield from linear(f"{key}.v_proj", keys, inner)
    yield from linear(f"{key}.out_proj", inner, inputs)


def _memory_attention(config: Sam2Config) -> Iterator[Entry]:
    width = config.d_model
    for key in (f"layers.{i}" for i in range(config.attention_layers)):
        yield from _attention(f"{key}.self_attn", width, width, width)
        yield from _attention(f"{key}.cross_attn_image", width, config.mem_dim, width)
        yield from linear(f"{key}.linear1", width, config.attention_ff)
        yield from linear(f"{key}.linear2", config.attention_ff, width)
        for name in ("norm1", "norm2", "norm3"):
            yield from norm(f"{key}.{name}", width)
    yield from norm("norm", width)


def _memory_encoder(config: Sam2Config) -> Iterator[Entry]:
    width = config.d_model
    for i in range(4):
        yield from conv(f"mask_downsampler.encoder.{3 * i}", "conv2d", 4**i, 4 ** (i + 1), (3, 3))
        yield from norm(f"mask_downsampler.encoder.{3 * i + 1}", 4 ** (i + 1))
    yield from conv("mask_downsampler.encoder.12", "conv1x1", 256, width, (1, 1))
    yield from conv("pix_feat_proj", "conv1x1", width, width, (1, 1))
    for key in (f"fuser.layers.{i}" for i in range(config.fuser_layers)):
        yield from conv(f"{key}.dwconv", "conv2d", 1, width, (7, 7))
        yield from norm(f"{key}.norm", width)
        yield from linear(f"{key}.pwconv1", width, 4 * width)
        yield from linear(f"{key}.pwconv2", 4 * width, width)
        yield from raw(f"{key}.gamma", (width,))
    yield from conv("out_proj", "conv1x1", width, config.mem_dim, (1, 1))


def _prompt_encoder(config: Sam2Config) -> Iterator[Entry]:
    width, channels = config.d_model, config.prompt_mask_channels
    yield from raw("pe_layer.positional_encoding_gaussian_matrix", (2, width // 2))
    for i in range(4):
        yield from raw(f"point_embeddings.{i}.weight", (1, width))
    yield from raw("not_a_point_embed.weight", (1, width))
    yield from raw("no_mask_embed.weight", (1, width))
    yield from conv("mask_downscaling.0", "conv2d", 1, channels // 4, (2, 2))
    yield from norm("mask_downscaling.1", channels // 4)
    yield from conv("mask_downscaling.3", "conv2d", channels // 4, channels, (2, 2))
    yield from norm("mask_downscaling.4", channels)
    yield from conv("mask_downscaling.6", "conv1x1", channels, width, (1, 1))


def _doubling(key: str, inputs: int, out: int) -> Iterator[Entry]:
    """A transposed convolution: torch has inputs before outputs."""
    for entry in conv(key, "conv2d_transposed", out, inputs, (2, 2)):
        yield entry if entry.flax_path[-1] == "kernel" else entry._replace(torch_shape=(out,))


def _mask_decoder(config: Sam2Config) -> Iterator[Entry]:
    width = config.d_model
    for key in (f"transformer.layers.{i}" for i in range(config.decoder_layers)):
        yield from _attention(f"{key}.self_attn", width, width, width)
        yield from _attention(f"{key}.cross_attn_token_to_image", width, width, width // 2)
        yield from _attention(f"{key}.cross_attn_image_to_token", width, width, width // 2)
        yield from _mlp(f"{key}.mlp", width, (config.decoder_ff, width))
        for i in range(1, 5):
            yield from norm(f"{key}.norm{i}", width)
    yield from _attention("transformer.final_attn_token_to_image", width, width, width // 2)
    yield from norm("transformer.norm_final_attn", width)
    yield from raw("iou_token.weight", (1, width))
    yield from raw("mask_tokens.weight", (MASKS + 1, width))
    yield from raw("obj_score_token.weight", (1, width))
    yield from _doubling("output_upscaling.0", width, width // 4)
    yield from norm("output_upscaling.1", width // 4)
    yield from _doubling("output_upscaling.3", width // 4, width // 8)
    yield from conv("conv_s0", "conv1x1", width, width // 8, (1, 1))
    yield from conv("conv_s1", "conv1x1", width, width // 4, (1, 1))
    for i in range(MASKS + 1):
        yield from _mlp(f"output_hypernetworks_mlps.{i}", width, (width, width, width // 8))
    yield from _mlp("iou_prediction_head", width, (config.iou_width, config.iou_width, MASKS + 1))
    yield from _mlp("pred_obj_score_head", width, (width, width, 1))
