"""Speech encoders by configuration: waveform `[B, S]` at 16 kHz -> tokens `[B, N, D]` every 20 ms.

All kinds are linen modules with the same methods: `__call__(waveform)` in one pass, and for long clips `features` (local, can be
streamed in blocks) and `encode` (over a window of features). `geometry` says which samples a token sees.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.speech import log_mel
from keysync_jax.speech.hubert import Hubert
from keysync_jax.speech.log_mel import LogMel
from keysync_jax.speech.speech_layers import Geometry, convolution_geometry
from keysync_jax.speech.wavlm import WavLM

MODULES: dict[str, type[nn.Module]] = {"hubert": Hubert, "wavlm": WavLM, "log_mel": LogMel}


def build(config: AudioEncoderConfig, dtype: jnp.dtype = jnp.float32) -> nn.Module:
    """The encoder's module; `dtype` is what matmuls and convolutions compute in (norms and softmax stay in float32)."""
    return MODULES[config.kind](config, dtype)


def geometry(config: AudioEncoderConfig) -> Geometry:
    """Hop, receptive field and left margin of a token, in samples."""
    return log_mel.GEOMETRY if config.kind == "log_mel" else convolution_geometry(config)


def init_params(config: AudioEncoderConfig, rng: np.random.Generator) -> dict:
    """Random float32 parameters (nested dict of NumPy arrays) without compiling an initialisation; empty for "log_mel".

    Weights are normal with variance 1 / fan-in, biases zero, norms one, so that activations keep their scale.
    """
    module = build(config)
    samples = max(geometry(config).receptive, 2 * geometry(config).hop)
    waveform = jax.ShapeDtypeStruct((1, samples), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), waveform).get("params", {})

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "bias":
            return np.zeros(leaf.shape, np.float32)
        if name in ("scale", "grep_a"):
            return np.ones(leaf.shape, np.float32)
        fan_in = int(np.prod(leaf.shape[:-1])) if name in ("kernel", "weight_v") else leaf.shape[-1]
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return _tie_weight_norm(params)


def _tie_weight_norm(tree: dict) -> dict:
    """A fresh `weight_g` is the norm of its `weight_v`: the weight starts as `v` itself."""
    out = {key: _tie_weight_norm(value) if isinstance(value, dict) else value for key, value in tree.items()}
    if "weight_v" in out:
        out["weight_g"] = np.linalg.norm(out["weight_v"], axis=(1, 2), keepdims=True)
    return out
