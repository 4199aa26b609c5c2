"""SAM 2.1's published sizes: names, shapes, and what is refused."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keysync_jax.converters import torch_write
from keysync_jax.converters.lazy import Tensors, constant
from keysync_jax.converters.sam2_file import load_sam2
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.sam2.sam2_config import UNUSED, Sam2Config, config_from_shapes, size_name
from keysync_jax.models.sam2.sam2_network import Sam2
from keysync_jax.models.sam2.sam2_table import sam2_table

MANIFESTS = Path(__file__).parents[2] / "golden" / "manifests"
SIZES = {"tiny": 471, "small": 519, "base_plus": 615, "large": 903}


@functools.cache
def shapes(size):
    stored = json.loads((MANIFESTS / f"sam2.1_hiera_{size}.json").read_text())["tensors"]
    return {key: tuple(value["shape"]) for key, value in stored.items()}


@pytest.mark.parametrize("size", SIZES)
def test_sizes_follow_from_shapes_and_tables_and_parameters_match_the_manifests(size):
    config = config_from_shapes(shapes(size))
    assert size_name(config) == size and len(shapes(size)) == SIZES[size]
    table = sam2_table(config)
    assert {e.torch_key: e.torch_shape for e in table} == {k: v for k, v in shapes(size).items() if k not in UNUSED}
    params = jax.eval_shape(Sam2(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 512, 512, 3), jnp.float32))["params"]
    found = {tuple(k.key for k in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert found == {e.flax_path: e.flax_shape for e in table}


def test_the_defaults_are_tiny():
    assert config_from_shapes(shapes("tiny")) == Sam2Config()


def test_weights_of_sam_2_0_and_of_something_else_are_refused():
    older = {k: v for k, v in shapes("small").items() if not k.startswith(("no_obj_embed_spatial", "obj_ptr_tpos_proj"))}
    with pytest.raises(KeySyncError, match=r"old.pt holds SAM 2.0 weights .*; give those of SAM 2.1"):
        config_from_shapes(older, "old.pt")
    with pytest.raises(KeySyncError, match="x.pt holds no SAM 2.1 video model"):
        config_from_shapes({"conv.weight": (3, 3)}, "x.pt")
    with pytest.raises(KeySyncError, match=r"y.pt: a Hiera of width 96 with \(1, 2, 7, 1\) blocks is none of tiny, small"):
        config_from_shapes({k: v for k, v in shapes("tiny").items() if ".blocks.11." not in k}, "y.pt")


def test_a_checkpoint_is_read_without_torch_whatever_its_name(tmp_path):
    tensors = {key: np.full(shape, i % 7, np.float16) for i, (key, shape) in enumerate(shapes("tiny").items())}
    path = tmp_path / "weights.pt"
    torch_write.write(path, Tensors({k: constant(v) for k, v in tensors.items()}, str(path)))
    config, params = load_sam2(path)
    assert config == Sam2Config()
    kernel = params["sam_mask_decoder"]["output_upscaling_0"]["kernel"]
    assert kernel.shape == (2, 2, 256, 64) and kernel.dtype == np.float32
    assert kernel.max() == tensors["sam_mask_decoder.output_upscaling.0.weight"].max()
    lacking = Tensors({k: constant(v) for k, v in tensors.items() if k != "no_obj_ptr"}, str(path))
    torch_write.write(path, lacking)
    with pytest.raises(KeySyncError, match=r"weights.pt: 1 tensors are missing: no_obj_ptr"):
        load_sam2(path)
    with pytest.raises(KeySyncError, match="no.pt does not exist"):
        load_sam2(tmp_path / "no.pt")
