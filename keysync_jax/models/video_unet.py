"""SVD's latent video U-Net with KeySync's audio conditioning (KeySync reference at commit cfff7cf, `VideoUNet`)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.config import UNetConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models import layers
from keysync_jax.models.layout import unet_layout
from keysync_jax.models.remat import rematerialised
from keysync_jax.models.resblock import VideoResBlock
from keysync_jax.models.transformer import SpatialVideoTransformer

Array = jax.Array

# Methods that put every frame's audio into one embedding of the whole sample (image models).
_PER_SAMPLE_AUDIO = ("both", "to_time_emb_image")


class VideoUNet(nn.Module):
    """Predicts the network output F from scaled noisy latents; the preconditioning around it is `diffusion.preconditioning`.

    Attributes:
      config: sizes and how audio enters.
      dtype: type of convolutions and matrix products; parameters, norms' statistics, softmax and time embeddings are float32.
      attention: see `models.attention.attention`.
      remat: what the backward pass keeps of each block, see `models.remat`.
    """

    config: UNetConfig
    dtype: Any = jnp.float32
    attention: str = "auto"
    remat: str = "none"

    @nn.compact
    def __call__(
        self,
        x: Array,
        c_noise: Array,
        context: Array,
        audio_emb: Array | None = None,
        vector: Array | None = None,
        image_only_indicator: Array | None = None,
    ) -> Array:
        """Runs the network on clips of any number of frames.

        Args:
          x: `[B, T, h, w, in_channels]` latents with the conditions concatenated.
          c_noise: noise level as the network reads it, 0.25 ln(sigma): `[B]` or per frame `[B, T]`.
          context: `[B, L, context_dim]` tokens that every frame attends to, or per frame `[B, T, L, context_dim]`. For the methods
            "both_keyframes" and "both" these are also the audio embedding.
          audio_emb: `[B, T, audio_dim]` for "to_time_emb"; `[B, L, audio_dim]` for "to_time_emb_image"; else None.
          vector: `[B, adm_in_channels]` (or per frame `[B, T, adm_in_channels]`) extra conditioning.
          image_only_indicator: `[B, T]`, nonzero marks frames that skip the temporal branches.

        Returns:
          `[B, T, h, w, out_channels]` float32.

        Raises:
          KeySyncError: inputs that do not fit the config.
        """
        config, dtype = self.config, self.dtype
        layout = unet_layout(config)
        self._check(x, context)
        epsilon = 1e-5
        diffusers_epsilon = 1e-6 if config.reference_diffusers_eps else epsilon
        emb = self._embedding(x.shape[1], c_noise, context, audio_emb, vector).astype(dtype)
        x, context = x.astype(dtype), context.astype(dtype)

        def resblock(name: str, features: int, epsilon: float = epsilon) -> VideoResBlock:
            kernel = config.video_kernel_size[0]
            return rematerialised(VideoResBlock, self.remat)(
                features,
                kernel,
                config.merge_strategy,
                config.merge_factor,
                epsilon,
                dtype,
                config.temporal_layers,
                config.norm_groups,
                name=name,
            )

        def transformer(name: str, features: int) -> SpatialVideoTransformer:
            return rematerialised(SpatialVideoTransformer, self.remat)(
                features // config.num_head_channels,
                config.num_head_channels,
                config.transformer_depth,
                config.use_spatial_context,
                config.merge_strategy,
                config.merge_factor,
                max_period=config.max_time_embed_period,
                dtype=dtype,
                implementation=self.attention,
                temporal=config.temporal_layers,
                groups=config.norm_groups,
                name=name,
            )

        h, skips = x, []
        for i, block in enumerate(layout.input):
            name = f"input_blocks_{i}"
            if block.kind == "conv":
                h = layers.conv(block.out_channels, f"{name}_0", dtype)(h)
            elif block.kind == "down":
                h = layers.Downsample(dtype, name=f"{name}_0")(h)
            else:
                eps = diffusers_epsilon if block.attention else epsilon
                h = resblock(f"{name}_0", block.out_channels, eps)(h, emb, image_only_indicator)
                if block.attention:
                    h = transformer(f"{name}_1", block.out_channels)(h, context, image_only_indicator)
            skips.append(h)
        h = resblock("middle_block_0", layout.middle_channels)(h, emb, image_only_indicator)
        h = transformer("middle_block_1", layout.middle_channels)(h, context, image_only_indicator)
        h = resblock("middle_block_2", layout.middle_channels)(h, emb, image_only_indicator)
        for i, block in enumerate(layout.output):
            name = f"output_blocks_{i}"
            h = jnp.concatenate([h, skips.pop()], axis=-1)
            h = resblock(f"{name}_0", block.out_channels, diffusers_epsilon)(h, emb, image_only_indicator)
            if block.attention:
                h = transformer(f"{name}_1", block.out_channels)(h, context, image_only_indicator)
            if block.upsample:
                h = layers.Upsample(dtype, name=f"{name}_{block.upsample}")(h)
        h = nn.silu(layers.group_norm("out_0", epsilon, dtype, config.norm_groups)(h))
        return layers.conv(config.out_channels, "out_2", dtype)(h).astype(jnp.float32)

    def _check(self, x: Array, context: Array) -> None:
        config = self.config
        if x.shape[-1] != config.in_channels:
            raise KeySyncError(f"U-Net input {x.shape} has {x.shape[-1]} channels; the config says in_channels {config.in_channels}")
        if context.shape[-1] != config.context_dim:
            width = context.shape[-1]
            raise KeySyncError(f"U-Net context {context.shape} has width {width}; the config says context_dim {config.context_dim}")
        factor = 2 ** (len(config.channel_mult) - 1)
        if x.shape[2] % factor or x.shape[3] % factor:
            size, levels = f"{x.shape[2]}x{x.shape[3]}", len(config.channel_mult)
            raise KeySyncError(f"latent size {size} is not divisible by {factor}, as {levels} U-Net levels need")

    def _embedding(self, frames: int, c_noise: Array, context: Array, audio_emb: Array | None, vector: Array | None) -> Array:
        """`[B, T, E]` float32: the noise level's embedding plus the label path's (audio and extra vector)."""
        config = self.config
        if c_noise.ndim == 1:
            c_noise = c_noise[:, None]
        emb = layers.sinusoidal_embedding(c_noise, config.model_channels)
        emb = layers.dense(config.time_embed_dim, "time_embed_2")(nn.silu(layers.dense(config.time_embed_dim, "time_embed_0")(emb)))
        if config.label_dim:
            label = self._label(frames, context, audio_emb, vector)
            hidden = nn.silu(layers.dense(config.time_embed_dim, "label_emb_0_0")(label))
            emb = emb + layers.dense(config.time_embed_dim, "label_emb_0_2")(hidden)
        return jnp.broadcast_to(emb, (emb.shape[0], frames, emb.shape[-1]))

    def _label(self, frames: int, context: Array, audio_emb: Array | None, vector: Array | None) -> Array:
        """Input of the label path, `[B, T, label_dim]`: extra vector, then audio."""
        config = self.config
        method = config.audio_cond_method
        if method in ("both_keyframes", "both"):
            if audio_emb is not None or context.ndim != 3:
                raise KeySyncError(f"audio_cond_method {method!r} reads audio from the context [B, T, C]; give no audio_emb")
            audio_emb = context
        parts = []
        if vector is not None:
            vector = vector[:, None] if vector.ndim == 2 else vector
            parts.append(jnp.broadcast_to(vector, (vector.shape[0], frames, vector.shape[-1])))
        if method != "none":
            if audio_emb is None:
                raise KeySyncError(f"audio_cond_method {method!r} needs audio_emb")
            if method in _PER_SAMPLE_AUDIO:
                flat = audio_emb.reshape(audio_emb.shape[0], 1, -1)
                audio_emb = jnp.broadcast_to(flat, (flat.shape[0], frames, flat.shape[-1]))
            parts.append(audio_emb)
        width = sum(part.shape[-1] for part in parts)
        if width != config.label_dim or any(part.shape[1] != frames for part in parts):
            shapes = " and ".join(str(part.shape) for part in parts) or "nothing"
            raise KeySyncError(f"the label path reads [B, {frames}, {config.label_dim}] (vector, then audio) but was given {shapes}")
        return jnp.concatenate([part.astype(jnp.float32) for part in parts], axis=-1)
