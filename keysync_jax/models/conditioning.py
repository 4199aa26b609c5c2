"""From a batch of windows to what a stage is conditioned on: the one place where conditions are assembled.

Training, its sample pictures, generation and parity all describe their windows by the names of `batch_shapes` and hand them to
`conditions`. A batch may hold further arrays under other names.

To add a condition, for example an emotion that steers the time embedding:

1. `config.py`: a field of `StageConfig` that says whether, and how wide, the stage reads it.
2. Here: its name and shape in `batch_shapes`, and in `conditions` how it becomes a field of `diffusion.conditions.Conditions`. The U-Net
   reads latents (`concat`), tokens (`crossattn`) and a vector beside the noise level (`vector`); what has parameters of its own is a
   module of `models.stage.Conditioner`.
3. Only if guidance or dropout shall be able to leave it out: a name in `diffusion.conditions.FIELDS` (the guidance rules then take it in
   their branches) and a rate in `training.config.DropoutConfig`.
4. Where it comes from: a column of `data_pipeline.source.sample` for training, a field of the window in `inference.engine`.

Objective, sampler, guidance and network hand `Conditions` on whole and need no change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.conditions import Conditions
from keysync_jax.models.layers import sinusoidal_embedding
from keysync_jax.models.stage import StageModel

Array = jax.Array | np.ndarray

EMOTION = ("valence", "arousal")  # in this order, in front of the audio


def batch_shapes(config: StageConfig) -> dict[str, tuple[int, ...]]:
    """What `conditions` reads of a batch, float32, by name: shapes of one window.

    - `known [T, h, w, C]`: scaled latents of the source, of which the network sees what the mask leaves; in training the target too.
    - `audio [T, 2, D]`: two speech tokens per frame.
    - `mask [T, h, w, 1]`: 1 = regenerate, 0 = known. A batch without it has no known region: everything is generated.
    - `identity [h, w, C]` (keyframe stage): scaled latent of the person's picture; or one per frame.
    - `endpoints [2, h, w, C]` (interpolation stage): scaled latents of the first and the last frame.
    - `valence [T]` and `arousal [T]` in [-1, 1], if the stage reads them (`emotion_dim`).
    - `vector [T, V]`, or one for all frames `[V]`, if the network reads another one (`unet.adm_in_channels`): extra conditioning of the
      time embedding.
    """
    frames, (h, w), channels = config.num_frames, (config.latent_size, config.latent_size), config.unet.out_channels
    shapes = {"known": (frames, h, w, channels), "audio": (frames, 2, config.audio_feature_dim), "mask": (frames, h, w, 1)}
    shapes |= {"identity": (h, w, channels)} if config.stage == "keyframe" else {"endpoints": (2, h, w, channels)}
    if config.system == "keyface":  # nothing of the source is known; in training `known` is the target
        del shapes["mask"]
    if config.emotion_dim:
        return shapes | {name: (frames,) for name in EMOTION}
    return shapes | ({"vector": (frames, config.unet.adm_in_channels)} if config.unet.adm_in_channels else {})


def conditions(model: StageModel, variables: Mapping[str, Any], batch: Mapping[str, Array]) -> Conditions:
    """The conditions of a batch, nothing left out.

    Args:
      model: the stage.
      variables: its variables, `{"params": ...}`.
      batch: arrays `[B, ...]` by the names of `batch_shapes`, traced or not.

    Raises:
      KeySyncError: no emotion for a stage that reads one.
    """
    latents = batch["identity"] if model.config.stage == "keyframe" else join_frames(batch["endpoints"])
    given = {name: jnp.asarray(batch[name]) for name in ("known", "mask", "vector") if name in batch}
    if model.config.emotion_dim:
        if lacking := [name for name in EMOTION if name not in batch]:
            raise KeySyncError(f"the {model.config.stage} stage reads {' and '.join(EMOTION)}, and there is no {lacking[0]}: it animates")
        valence, arousal = (jnp.asarray(batch[name]) for name in EMOTION)
        given["vector"] = emotion_vector(valence, arousal, model.config.emotion_dim)
    return Conditions(
        jnp.asarray(raw_latents(latents, model.config.latent_scale)),
        model.apply(variables, batch["audio"], method="embed_audio"),
        given.get("known") if "mask" in given else None,
        given.get("mask"),
        given.get("vector"),
    )


def emotion_vector(valence: jax.Array, arousal: jax.Array, width: int) -> jax.Array:
    """Valence and arousal `[..., T]` in [-1, 1] as the time embedding reads them, `[..., T, 2 * width]` float32.

    Each becomes cosines, then sines, of `width / 2` frequencies from 1 down to 1/10000: smooth, and monotone in the sines.
    """
    return jnp.concatenate([sinusoidal_embedding(value, width) for value in (valence, arousal)], axis=-1)


def raw_latents(scaled: Array, latent_scale: float) -> Array:
    """Scaled latents as the network reads them when they are a condition: raw, as in SVD, while targets and noise are scaled."""
    return scaled / latent_scale


def join_frames(latents: Array) -> jax.Array:
    """Condition frames `[B, F, h, w, C]` side by side in the channels, `[B, h, w, F*C]` (start first)."""
    b, frames, h, w, c = latents.shape
    return jnp.moveaxis(latents, 1, 3).reshape(b, h, w, frames * c)
