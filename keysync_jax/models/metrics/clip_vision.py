"""CLIP's vision tower with its projection, whose embeddings CMMD compares (Radford et al. 2021), under Hugging Face's names."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from keysync_jax.models.metrics.metric_layers import network_table
from keysync_jax.models.table import Table

_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@dataclasses.dataclass(frozen=True)
class ClipVisionConfig:
    """Sizes of a tower; those of ViT-L/14 at 336 pixels unless said."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    projection_dim: int = 768
    layer_norm_eps: float = 1e-5


class _Attention(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        q, k, v = (
            nn.Dense(width, name=f"{name}_proj")(x).reshape(*x.shape[:2], self.heads, width // self.heads) for name in ("q", "k", "v")
        )
        return nn.Dense(width, name="out_proj")(nn.dot_product_attention(q, k, v).reshape(x.shape))


class _Mlp(nn.Module):
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.Dense(self.hidden, name="fc1")(x)
        return nn.Dense(x.shape[-1], name="fc2")(y * nn.sigmoid(1.702 * y))  # CLIP's own GELU


class _Layer(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        eps = self.config.layer_norm_eps
        x = x + _Attention(self.config.num_attention_heads, name="self_attn")(nn.LayerNorm(eps, name="layer_norm1")(x))
        return x + _Mlp(self.config.intermediate_size, name="mlp")(nn.LayerNorm(eps, name="layer_norm2")(x))


class _Embeddings(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, patch = self.config.hidden_size, (self.config.patch_size,) * 2
        x = nn.Conv(width, patch, patch, padding="VALID", use_bias=False, name="patch_embedding")(x).reshape(len(x), -1, width)
        first = self.param("class_embedding", nn.initializers.normal(), (width,))
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, width)), x], axis=1)
        return x + nn.Embed(x.shape[1], width, name="position_embedding")(jnp.arange(x.shape[1]))


class _Encoder(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.config.num_hidden_layers):
            x = _Layer(self.config, name=f"layers_{i}")(x)
        return x


class _Tower(nn.Module):
    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        eps = self.config.layer_norm_eps
        x = nn.LayerNorm(eps, name="pre_layrnorm")(_Embeddings(self.config, name="embeddings")(x))
        return nn.LayerNorm(eps, name="post_layernorm")(_Encoder(self.config, name="encoder")(x)[:, 0])


class ClipVision(nn.Module):
    """Pictures `[N, S, S, 3]`, normalised, to the class token `[N, width]` and its projection `[N, projection_dim]`."""

    config: ClipVisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        pooled = _Tower(self.config, name="vision_model")(x)
        return pooled, nn.Dense(self.config.projection_dim, use_bias=False, name="visual_projection")(pooled)


def clip_vision_table(config: ClipVisionConfig) -> Table:
    return network_table(ClipVision(config), (1, config.image_size, config.image_size, 3), numbered=True)


def cmmd_picture(picture: np.ndarray, size: int) -> np.ndarray:
    """`[size, size, 3]` uint8: the centre square of `[H, W, 3]`, by Pillow's bicubic with antialias, as CMMD's reference does."""
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    square = PIL.Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), PIL.Image.Resampling.BICUBIC))


def normalised(pictures: np.ndarray) -> np.ndarray:
    """`[N, S, S, 3]` uint8 to float32 with CLIP's mean and deviation."""
    return (pictures.astype(np.float32) / 255 - _MEAN) / _STD
