"""SAM's mask decoder: prompts and features to masks, their quality, whether the object is there, and a pointer to it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.models.sam2.prompt_encoder import Token
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import Attention, Mlp, gelu, norm

Array = jax.Array

HEADS = 8
MASKS = 3  # alternatives beside the single mask
# A single mask is stable where moving its threshold by this much moves little of its area.
STABILITY_DELTA, STABLE = 0.05, 0.98


class Masks(NamedTuple):
    """What the decoder says: M masks, or the single one.

    Attributes:
      logits: `[B, M, 4h, 4w]`.
      iou: `[B, M]`, quality that it expects.
      tokens: `[B, M, d_model]`, what pointers are made of.
      score: `[B, 1]`, positive where the object is in the picture.
    """

    logits: Array
    iou: Array
    tokens: Array
    score: Array


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the picture, then the picture attends to them."""

    config: Sam2Config
    first: bool

    @nn.compact
    def __call__(self, tokens: Array, picture: Array, tokens_place: Array, picture_place: Array) -> tuple[Array, Array]:
        width = self.config.d_model
        attention = Attention(width, HEADS, name="self_attn")
        if self.first:
            tokens = attention(tokens, tokens, tokens)
        else:
            q = tokens + tokens_place
            tokens = tokens + attention(q, q, tokens)
        tokens = norm("norm1")(tokens)
        across = Attention(width // 2, HEADS, name="cross_attn_token_to_image")
        tokens = norm("norm2")(tokens + across(tokens + tokens_place, picture + picture_place, picture))
        tokens = norm("norm3")(tokens + Mlp((self.config.decoder_ff, width), name="mlp")(tokens))
        back = Attention(width // 2, HEADS, name="cross_attn_image_to_token")
        picture = norm("norm4")(picture + back(picture + picture_place, tokens + tokens_place, tokens))
        return tokens, picture


class TwoWayTransformer(nn.Module):
    config: Sam2Config

    @nn.compact
    def __call__(self, picture: Array, picture_place: Array, prompts: Array) -> tuple[Array, Array]:
        """Tokens of the picture `[B, N, C]` with their places, prompts `[B, P, C]` -> both, transformed."""
        tokens = prompts
        for i in range(self.config.decoder_layers):
            tokens, picture = TwoWayBlock(self.config, i == 0, name=f"layers_{i}")(tokens, picture, prompts, picture_place)
        last = Attention(self.config.d_model // 2, HEADS, name="final_attn_token_to_image")
        tokens = norm("norm_final_attn")(tokens + last(tokens + prompts, picture + picture_place, picture))
        return tokens, picture


class Doubling(nn.Module):
    """Transposed convolution of kernel and stride 2: `[B, h, w, C]` -> `[B, 2h, 2w, features]`."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (2, 2, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        b, h, w, _ = x.shape
        return jnp.einsum("bhwc,yxco->bhywxo", x, kernel).reshape(b, 2 * h, 2 * w, self.features) + bias


class MaskDecoder(nn.Module):
    config: Sam2Config

    def setup(self):
        width = self.config.d_model
        self.transformer = TwoWayTransformer(self.config)
        self.iou_token = Token(1, width)
        self.mask_tokens = Token(MASKS + 1, width)
        self.obj_score_token = Token(1, width)
        self.output_upscaling_0 = Doubling(width // 4)
        self.output_upscaling_1 = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
        self.output_upscaling_3 = Doubling(width // 8)
        self.conv_s0 = nn.Dense(width // 8)
        self.conv_s1 = nn.Dense(width // 4)
        self.output_hypernetworks_mlps = [Mlp((width, width, width // 8)) for _ in range(MASKS + 1)]
        self.iou_prediction_head = Mlp((self.config.iou_width, self.config.iou_width, MASKS + 1))
        self.pred_obj_score_head = Mlp((width, width, 1))

    def fine(self, stride4: Array, stride8: Array) -> tuple[Array, Array]:
        """The pyramid's finer levels, as the decoder reads them: `[B, 4h, 4w, C/8]` and `[B, 2h, 2w, C/4]`."""
        return self.conv_s0(stride4), self.conv_s1(stride8)

    def __call__(self, features: Array, place: Array, sparse: Array, dense: Array, fine: tuple[Array, Array], several: bool) -> Masks:
        """One picture, or several with a prompt each.

        Args:
          features: `[B, h, w, C]`.
          place: position encoding `[h, w, C]`.
          sparse: tokens of points `[B, P, C]`.
          dense: what is added to the features for a mask prompt, broadcast to them.
          fine: what `fine` gives.
          several: three alternatives; else the single mask, or the best of the three where that one is unstable.
        """
        b, h, w, c = features.shape
        own = jnp.concatenate([self.obj_score_token(), self.iou_token(), self.mask_tokens()])
        tokens = jnp.concatenate([jnp.broadcast_to(own, (b, *own.shape)), sparse], axis=1)
        picture = (features + dense).reshape(b, h * w, c)
        tokens, picture = self.transformer(picture, place.reshape(1, h * w, c), tokens)
        masks_out = tokens[:, 2 : 3 + MASKS]
        x = self.output_upscaling_0(picture.reshape(b, h, w, c)) + fine[1]
        x = gelu(self.output_upscaling_3(gelu(self.output_upscaling_1(x))) + fine[0])
        kernels = jnp.stack([mlp(masks_out[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1)
        logits = jnp.einsum("bmc,bhwc->bmhw", kernels, x)
        iou = nn.sigmoid(self.iou_prediction_head(tokens[:, 1]))
        score = self.pred_obj_score_head(tokens[:, 0])
        if several:
            return Masks(logits[:, 1:], iou[:, 1:], masks_out[:, 1:], score)
        return Masks(*_stable(logits, iou), masks_out[:, :1], score)

    def single(self, features: Array, place: Array, sparse: Array, dense: Array, fine: tuple[Array, Array]) -> Masks:
        return self(features, place, sparse, dense, fine, several=False)

    def several(self, features: Array, place: Array, sparse: Array, dense: Array, fine: tuple[Array, Array]) -> Masks:
        return self(features, place, sparse, dense, fine, several=True)


def _stable(logits: Array, iou: Array) -> tuple[Array, Array]:
    """The single mask `[B, 1, H, W]` and its quality, or the best alternative where it is unstable."""
    best = 1 + jnp.argmax(iou[:, 1:], axis=1)[:, None]
    best_logits = jnp.take_along_axis(logits, best[..., None, None], axis=1)
    best_iou = jnp.take_along_axis(iou, best, axis=1)
    single = logits[:, :1]
    inner = (single > STABILITY_DELTA).sum(axis=(-2, -1)).astype(jnp.float32)
    outer = (single > -STABILITY_DELTA).sum(axis=(-2, -1)).astype(jnp.float32)
    stable = jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0) >= STABLE
    return jnp.where(stable[..., None, None], single, best_logits), jnp.where(stable, iou[:, :1], best_iou)
