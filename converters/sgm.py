"""Names and shapes of the reference's checkpoints (KeySync and SVD, sgm naming); its constructor arguments are in `sgm_config`.

The tables are walked from the same configs as the modules. Full size: 1,428 tensors in the U-Net, plus the audio projection (2), the
learned filler of the interpolation stage (1), the VAE decoder (266) and encoder (106).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig
from keysync_jax.converters.sgm_config import stage_config_from_sgm, unet_config_from_sgm, vae_config_from_sgm
from keysync_jax.models import freezing
from keysync_jax.models.layout import unet_layout
from keysync_jax.models.table import Entry, Table, conv, linear, norm, prefixed, raw

__all__ = [
    "audio_linear",
    "is_frozen",
    "network_table",
    "resblock_table",
    "stage_config_from_sgm",
    "stage_table",
    "transformer_table",
    "unet_config_from_sgm",
    "unet_table",
    "vae_config_from_sgm",
    "vae_table",
]

# Modules of the reference's engine, and how the keys of their tensors begin.
UNET, VAE, LPIPS = "model.diffusion_model", "first_stage_model", "loss_fn.lpips"
UNET_PREFIX, VAE_PREFIX = f"{UNET}.", f"{VAE}."


def audio_linear(config: StageConfig) -> str:
    """Where the checkpoint has the audio projection: behind the embedders of the latents, of KeySync's mask, of KeyFace's emotion."""
    return f"conditioner.embedders.{2 if config.system == 'keysync' else 1 + 2 * bool(config.emotion_dim)}.linear"


def network_table(config: StageConfig, latent_shape: tuple[int, int] | None = None) -> Table:
    """Of those of `stage_table`, the tensors of the network alone, without the audio projection."""
    return [entry for entry in stage_table(config, latent_shape) if entry.torch_key.startswith("model.")]


def is_frozen(torch_key: str) -> bool:
    """Whether the reference's training leaves a checkpoint tensor as it is: its "time_" rule, applied to U-Net tensors only."""
    return torch_key.startswith(UNET_PREFIX) and freezing.is_frozen(torch_key.removeprefix(UNET_PREFIX))


# -- tables ------------------------------------------------------------------------------------------------------------------------


def unet_table(config: UNetConfig) -> Table:
    """All tensors of a `VideoUNet`, without prefix."""
    # The names that the reference freezes are those of the temporal layers.
    return [entry for entry in _unet(config) if config.temporal_layers or not freezing.is_frozen(entry.torch_key)]


def stage_table(config: StageConfig, latent_shape: tuple[int, int] | None = None) -> Table:
    """All tensors of a `StageModel`: U-Net, learned filler, audio projection.

    `latent_shape` is the filler's (height, width) where latents are not square; None takes `config.latent_size`.
    """
    table = prefixed(UNET, unet_table(config.unet))
    if config.has_learned_filler:
        table += raw("model.learned_mask", (config.unet.out_channels, *(latent_shape or (config.latent_size,) * 2)), "chw")
    if config.audio_linear:
        width = config.audio_feature_dim * (2 if config.audio_merge == "concat" else 1)
        # One module for all of them: the path does not follow the embedder's number.
        path = ("conditioner", "embedders_2", "linear")
        entries = linear(audio_linear(config), width, config.unet.context_dim)
        table += [entry._replace(flax_path=(*path, entry.flax_path[-1])) for entry in entries]
    return table


def vae_table(config: VAEConfig, prefix: str = VAE, parts: Sequence[str] = ("encoder", "decoder")) -> Table:
    """Tensors of the autoencoder.

    Args:
      config: sizes and which 1x1 convolutions there are.
      prefix: under which the checkpoint has them, "" for none; `conditioner.embedders.0.encoder` is the KL autoencoder's. The Flax
        paths are always those of `models.vae.VAE`.
      parts: "encoder" (with the quant_conv) and "decoder" (with the post_quant_conv).
    """
    table: Table = []
    if "encoder" in parts:
        table += prefixed("encoder", _encoder(config))
        if config.quant_conv:
            table += conv("quant_conv", "conv2d", 2 * config.latent_channels, 2 * config.latent_channels, (1, 1))
    if "decoder" in parts:
        table += prefixed("decoder", _decoder(config))
        if config.post_quant_conv:
            table += conv("post_quant_conv", "conv2d", config.latent_channels, config.latent_channels, (1, 1))
    dot = f"{prefix}." if prefix else ""
    return [Entry(dot + e.torch_key, (VAE, *e.flax_path), e.torch_shape, e.layout) for e in table]


def resblock_table(key: str, in_channels: int, out_channels: int, emb_channels: int, temporal_kernel: int) -> Iterator[Entry]:
    """A `VideoResBlock` under `key`."""
    yield from _branch(key, in_channels, out_channels, emb_channels, 0)
    if in_channels != out_channels:
        yield from conv(f"{key}.skip_connection", "conv2d", in_channels, out_channels, (1, 1))
    yield from _branch(f"{key}.time_stack", out_channels, out_channels, emb_channels, temporal_kernel)
    yield from raw(f"{key}.time_mixer.mix_factor", (1,))


def transformer_table(
    key: str,
    channels: int,
    context_dim: int | None,
    *,
    depth: int = 1,
    inner: int | None = None,
    use_spatial_context: bool = True,
) -> Iterator[Entry]:
    """A `SpatialVideoTransformer` under `key`; `inner` is heads times head size (the channels by default)."""
    inner = inner or channels
    time_context = context_dim if use_spatial_context else None
    yield from norm(f"{key}.norm", channels)
    yield from linear(f"{key}.proj_in", channels, inner)
    yield from linear(f"{key}.proj_out", inner, channels)
    for name, first, second in (("time_pos_embed.0", channels, 4 * channels), ("time_pos_embed.2", 4 * channels, channels)):
        yield from linear(f"{key}.{name}", first, second)
    yield from raw(f"{key}.time_mixer.mix_factor", (1,))
    for i in range(depth):
        block = f"{key}.transformer_blocks.{i}"
        yield from _attention(f"{block}.attn1", inner, None)
        yield from _attention(f"{block}.attn2", inner, context_dim)
        yield from _feed_forward(f"{block}.ff", inner)
        for name in ("norm1", "norm2", "norm3"):
            yield from norm(f"{block}.{name}", inner)
        block = f"{key}.time_stack.{i}"
        yield from norm(f"{block}.norm_in", inner)
        yield from _feed_forward(f"{block}.ff_in", inner)
        yield from _attention(f"{block}.attn1", inner, None)
        yield from norm(f"{block}.norm2", inner)
        yield from _attention(f"{block}.attn2", inner, time_context)
        yield from _feed_forward(f"{block}.ff", inner)
        for name in ("norm1", "norm3"):
            yield from norm(f"{block}.{name}", inner)


def _unet(config: UNetConfig) -> Iterator[Entry]:
    emb, layout = config.time_embed_dim, unet_layout(config)

    def resblock(key: str, in_channels: int, out_channels: int) -> Iterator[Entry]:
        return resblock_table(key, in_channels, out_channels, emb, config.video_kernel_size[0])

    def transformer(key: str, channels: int) -> Iterator[Entry]:
        return transformer_table(
            key, channels, config.context_dim, depth=config.transformer_depth, use_spatial_context=config.use_spatial_context
        )

    yield from linear("time_embed.0", config.model_channels, emb)
    yield from linear("time_embed.2", emb, emb)
    if config.label_dim:
        yield from linear("label_emb.0.0", config.label_dim, emb)
        yield from linear("label_emb.0.2", emb, emb)
    for i, block in enumerate(layout.input):
        key = f"input_blocks.{i}"
        if block.kind == "conv":
            yield from conv(f"{key}.0", "conv2d", block.in_channels, block.out_channels, (3, 3))
        elif block.kind == "down":
            yield from conv(f"{key}.0.op", "conv2d", block.in_channels, block.out_channels, (3, 3))
        else:
            yield from resblock(f"{key}.0", block.in_channels, block.out_channels)
            if block.attention:
                yield from transformer(f"{key}.1", block.out_channels)
    middle = layout.middle_channels
    yield from resblock("middle_block.0", middle, middle)
    yield from transformer("middle_block.1", middle)
    yield from resblock("middle_block.2", middle, middle)
    for i, block in enumerate(layout.output):
        key = f"output_blocks.{i}"
        yield from resblock(f"{key}.0", block.in_channels, block.out_channels)
        if block.attention:
            yield from transformer(f"{key}.1", block.out_channels)
        if block.upsample:
            yield from conv(f"{key}.{block.upsample}.conv", "conv2d", block.out_channels, block.out_channels, (3, 3))
    yield from norm("out.0", config.model_channels * config.channel_mult[0])
    yield from conv("out.2", "conv2d", config.model_channels * config.channel_mult[0], config.out_channels, (3, 3))


def _branch(key: str, in_channels: int, out_channels: int, emb_channels: int | None, temporal_kernel: int) -> Iterator[Entry]:
    layout, kernel = ("conv3d_temporal", (temporal_kernel, 1, 1)) if temporal_kernel else ("conv2d", (3, 3))
    yield from norm(f"{key}.in_layers.0", in_channels)
    yield from conv(f"{key}.in_layers.2", layout, in_channels, out_channels, kernel)
    if emb_channels:
        yield from linear(f"{key}.emb_layers.1", emb_channels, out_channels)
    yield from norm(f"{key}.out_layers.0", out_channels)
    yield from conv(f"{key}.out_layers.3", layout, out_channels, out_channels, kernel)


def _attention(key: str, channels: int, context_dim: int | None) -> Iterator[Entry]:
    yield from linear(f"{key}.to_q", channels, channels, bias=False)
    for name in ("to_k", "to_v"):
        yield from linear(f"{key}.{name}", context_dim or channels, channels, bias=False)
    yield from linear(f"{key}.to_out.0", channels, channels)


def _feed_forward(key: str, channels: int) -> Iterator[Entry]:
    yield from linear(f"{key}.net.0.proj", channels, 8 * channels)  # value and gate, 4 * channels each
    yield from linear(f"{key}.net.2", 4 * channels, channels)


def _vae_block(key: str, in_channels: int, out_channels: int, temporal_kernel: int) -> Iterator[Entry]:
    yield from norm(f"{key}.norm1", in_channels)
    yield from conv(f"{key}.conv1", "conv2d", in_channels, out_channels, (3, 3))
    yield from norm(f"{key}.norm2", out_channels)
    yield from conv(f"{key}.conv2", "conv2d", out_channels, out_channels, (3, 3))
    if in_channels != out_channels:
        yield from conv(f"{key}.nin_shortcut", "conv2d", in_channels, out_channels, (1, 1))
    if temporal_kernel:
        yield from _branch(f"{key}.time_stack", out_channels, out_channels, None, temporal_kernel)
        yield from raw(f"{key}.mix_factor", (1,))


def _vae_middle(channels: int, temporal_kernel: int) -> Iterator[Entry]:
    for name in ("mid.block_1", "mid.block_2"):
        yield from _vae_block(name, channels, channels, temporal_kernel)
    yield from norm("mid.attn_1.norm", channels)
    for name in ("q", "k", "v", "proj_out"):
        yield from conv(f"mid.attn_1.{name}", "conv1x1", channels, channels, (1, 1))


def _encoder(config: VAEConfig) -> Iterator[Entry]:
    channels = config.base_channels
    yield from conv("conv_in", "conv2d", config.in_channels, channels, (3, 3))
    for i, mult in enumerate(config.channel_mult):
        width = config.base_channels * mult
        for j in range(config.num_res_blocks):
            yield from _vae_block(f"down.{i}.block.{j}", channels, width, 0)
            channels = width
        if i < len(config.channel_mult) - 1:
            yield from conv(f"down.{i}.downsample.conv", "conv2d", width, width, (3, 3))
    yield from _vae_middle(channels, 0)
    yield from norm("norm_out", channels)
    yield from conv("conv_out", "conv2d", channels, 2 * config.latent_channels, (3, 3))


def _decoder(config: VAEConfig) -> Iterator[Entry]:
    kernel = config.video_kernel_size[0] if config.decoder == "temporal" else 0
    channels = config.base_channels * config.channel_mult[-1]
    yield from conv("conv_in", "conv2d", config.latent_channels, channels, (3, 3))
    yield from _vae_middle(channels, kernel)
    for i in reversed(range(len(config.channel_mult))):
        width = config.base_channels * config.channel_mult[i]
        for j in range(config.num_res_blocks + 1):
            yield from _vae_block(f"up.{i}.block.{j}", channels, width, kernel)
            channels = width
        if i:
            yield from conv(f"up.{i}.upsample.conv", "conv2d", width, width, (3, 3))
    yield from norm("norm_out", channels)
    yield from conv("conv_out", "conv2d", channels, config.out_channels, (3, 3))
    if kernel:
        yield from conv("conv_out.time_mix_conv", "conv3d_temporal", config.out_channels, config.out_channels, (kernel, 1, 1))
