"""Random parameters of a speech encoder, for models that try the tools."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import SpeechEncoderConfig
from keysync_jax.models.speech import registry


def init_params(config: SpeechEncoderConfig, rng: np.random.Generator) -> dict[str, Any]:
    """Random float32 parameters (nested dict of NumPy arrays) without compiling an initialisation; empty where there are no weights.

    Weights are normal with variance 1 / fan-in, biases zero, norms one, so that activations keep their scale.
    """
    geometry = registry.geometry(config)
    waveform = jax.ShapeDtypeStruct((1, max(geometry.receptive, 2 * geometry.hop)), jnp.float32)
    shapes = jax.eval_shape(registry.build(config).init, jax.random.key(0), waveform).get("params", {})

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        if name == "bias":
            return np.zeros(leaf.shape, np.float32)
        if name in ("scale", "grep_a"):
            return np.ones(leaf.shape, np.float32)
        fan_in = int(np.prod(leaf.shape[:-1])) if name in ("kernel", "weight_v") else leaf.shape[-1]
        return (rng.standard_normal(leaf.shape, np.float32) / np.sqrt(fan_in)).astype(np.float32)

    return _tie_weight_norm(jax.tree_util.tree_map_with_path(draw, shapes))


def _tie_weight_norm(tree: dict[str, Any]) -> dict[str, Any]:
    """A fresh `weight_g` is the norm of its `weight_v`: the weight starts as `v` itself."""
    out: dict[str, Any] = {key: _tie_weight_norm(value) if isinstance(value, dict) else value for key, value in tree.items()}
    if "weight_v" in out:
        out["weight_g"] = np.linalg.norm(out["weight_v"], axis=(1, 2), keepdims=True)
    return out
