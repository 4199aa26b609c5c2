"""SAM 2.1 as one network: a prompted frame and a tracked frame, each with what later frames remember of it."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from keysync_jax.models.sam2.hiera import ImageEncoder
from keysync_jax.models.sam2.mask_decoder import MaskDecoder
from keysync_jax.models.sam2.object_memory import MemoryAttention, MemoryEncoder
from keysync_jax.models.sam2.prompt_encoder import NO_POINT, PromptEncoder
from keysync_jax.models.sam2.sam2_config import Sam2Config
from keysync_jax.models.sam2.sam2_layers import Mlp, resize, sine_grid, sine_of

Array = jax.Array

# Logits of a mask whose object is not in the picture.
GONE = -1024.0
# Mask probabilities enter the memory as 20 p - 10.
MASK_SCALE, MASK_SHIFT = 20.0, -10.0


class Features(NamedTuple):
    """A picture: `coarse` `[B, h, w, C]` at stride 16, `fine` `[B, 4h, 4w, C/8]` and `[B, 2h, 2w, C/4]`."""

    coarse: Array
    fine: tuple[Array, Array]


class Found(NamedTuple):
    """What a frame says of an object.

    Attributes:
      logits: `[B, 4h, 4w]`, positive on the object; -1024 throughout where it is gone.
      pointer: `[B, d_model]`.
      score: `[B, 1]`, positive where the object is in the picture.
      memory: `[B, h, w, mem_dim]`, not rounded yet.
    """

    logits: Array
    pointer: Array
    score: Array
    memory: Array


class Bank(NamedTuple):
    """What an object's frame may look at, padded to a fixed number of slots.

    Attributes:
      memories: `[B, S, h, w, mem_dim]`.
      row: int `[B, S]`, row of the temporal encoding: 6 for prompts, 0 for the frame just before, 5 for six frames ago; -1 empty.
      pointers: `[B, P, d_model]`.
      age: `[B, P]`, how long ago, 1 the longest; signed.
      held: bool `[B, P]`, whether the slot has a pointer.
    """

    memories: Array
    row: Array
    pointers: Array
    age: Array
    held: Array


class Sam2(nn.Module):
    """The tracker's network. `features` sees a picture, `prompted` a frame with clicks, `tracked` any other."""

    config: Sam2Config

    def setup(self):
        config = self.config
        width, mem = config.d_model, config.mem_dim
        small = nn.initializers.normal(0.02)
        self.image_encoder = ImageEncoder(config)
        self.memory_attention = MemoryAttention(config)
        self.memory_encoder = MemoryEncoder(config)
        self.sam_prompt_encoder = PromptEncoder(config)
        self.sam_mask_decoder = MaskDecoder(config)
        self.obj_ptr_proj = Mlp((width, width, width))
        self.obj_ptr_tpos_proj = nn.Dense(mem)
        self.maskmem_tpos_enc = self.param("maskmem_tpos_enc", small, (config.num_maskmem, 1, 1, mem))
        self.no_mem_embed = self.param("no_mem_embed", small, (1, 1, width))
        self.no_obj_ptr = self.param("no_obj_ptr", small, (1, width))
        self.no_obj_embed_spatial = self.param("no_obj_embed_spatial", small, (1, mem))

    def __call__(self, picture: Array) -> Found:
        """A click, a frame tracked from it, and a mask prompt: everything that has parameters."""
        features = self.features(picture)
        found = self.prompted(features, jnp.zeros((1, 1, 2)), jnp.ones((1, 1), jnp.int32))
        self.sam_prompt_encoder.masks(found.logits[..., None])
        pointers = found.pointer[:, None]
        return self.tracked(
            features, Bank(found.memory[:, None], jnp.zeros((1, 1), int), pointers, jnp.ones((1, 1)), jnp.ones((1, 1), bool))
        )

    def features(self, picture: Array) -> Features:
        """Normalised picture `[B, 16h, 16w, 3]` -> its features."""
        stride4, stride8, coarse = self.image_encoder(picture)
        return Features(coarse, self.sam_mask_decoder.fine(stride4, stride8))

    def prompted(self, features: Features, points: Array, labels: Array) -> Found:
        """A frame with clicks, seen without any memory: `points` `[B, P, 2]` in pixels of the picture, `labels` `[B, P]`."""
        # One click may mean several things: the best of three masks. More of them, and a box counts as two, mean one.
        return self._decode(features, features.coarse + self.no_mem_embed, points, labels, labels.shape[1] <= 1, True)

    def tracked(self, features: Features, bank: Bank) -> Found:
        """A frame without clicks, told what the bank holds."""
        config = self.config
        b, s, h, w, mem = bank.memories.shape
        place = jnp.asarray(sine_grid(h, w, mem)).reshape(1, 1, h * w, mem) + self.maskmem_tpos_enc[bank.row, 0]
        n = config.pointer_tokens
        pointers = bank.pointers.reshape(b, -1, mem)
        ages = self.obj_ptr_tpos_proj(sine_of(bank.age, config.d_model)).repeat(n, axis=1)
        # The reference stores memories in bfloat16; without its rounding the two drift apart. A cast there and back may be optimised away.
        memories = jax.lax.reduce_precision(bank.memories, exponent_bits=8, mantissa_bits=7).reshape(b, s * h * w, mem)
        memory = jnp.concatenate([memories, pointers], axis=1)
        exists = jnp.concatenate([(bank.row >= 0).repeat(h * w, axis=1), bank.held.repeat(n, axis=1)], axis=1)
        bias = jnp.where(exists, 0.0, -jnp.inf)
        x = features.coarse.reshape(-1, h * w, config.d_model)
        x_place = jnp.asarray(sine_grid(h, w, config.d_model)).reshape(1, h * w, -1)
        place = jnp.concatenate([place.reshape(b, s * h * w, mem), ages], axis=1)
        x = self.memory_attention(x, x_place, memory, place, s * h * w, bias).reshape(b, h, w, -1)
        none = jnp.zeros((b, 1, 2)), jnp.full((b, 1), NO_POINT)
        return self._decode(features, x, *none, True, False)

    def _decode(self, features: Features, x: Array, points: Array, labels: Array, several: bool, prompted: bool) -> Found:
        prompts = self.sam_prompt_encoder
        height, width = x.shape[1:3]
        sparse = prompts.points(points, labels, 16 * height)
        fine = (features.fine[0], features.fine[1])
        masks = self.sam_mask_decoder(x, prompts.grid(height, width), sparse, prompts.no_mask(), fine, several)
        there = masks.score > 0
        best = jnp.argmax(masks.iou, axis=1)
        logits = jnp.take_along_axis(masks.logits, best[:, None, None, None], axis=1)[:, 0]
        token = jnp.take_along_axis(masks.tokens, best[:, None, None], axis=1)[:, 0]
        logits = jnp.where(there[:, :, None], logits, GONE)
        pointer = jnp.where(there, self.obj_ptr_proj(token), self.no_obj_ptr)
        return Found(logits, pointer, masks.score, self._remember(features, logits, masks.score, prompted))

    def _remember(self, features: Features, logits: Array, score: Array, prompted: bool) -> Array:
        """Memory of a frame whose mask is `logits` `[B, 4h, 4w]`; what a person clicked is remembered as a hard mask."""
        height, width = features.coarse.shape[1:3]
        large = resize(logits, 16 * height, 16 * width)
        mask = (large > 0).astype(jnp.float32) if prompted else nn.sigmoid(large)
        coarse = jnp.broadcast_to(features.coarse, (len(logits), *features.coarse.shape[1:]))
        memory = self.memory_encoder(coarse, mask[..., None] * MASK_SCALE + MASK_SHIFT)
        memory = memory + jnp.where(score > 0, 0.0, self.no_obj_embed_spatial)[:, None, None]
        return memory
