import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import LAYOUTS, conv, fold, get_leaf, linear, norm, prefixed, raw, to_flax, to_torch

TABLE = prefixed(
    "model.net",
    [
        *linear("to_out.0", 3, 5),
        *norm("in_layers.0", 4),
        *conv("in_layers.2", "conv2d", 3, 4, (3, 3)),
        *conv("time_stack.2", "conv3d_temporal", 3, 4, (3, 1, 1)),
        *conv("attn.q", "conv1x1", 3, 4, (1, 1)),
        *conv("pos", "conv1d", 2, 6, (5,), bias=False),
        *raw("learned_mask", (4, 2, 3), "chw"),
    ],
)


def tensors():
    rng = np.random.default_rng(0)
    return {e.torch_key: rng.standard_normal(e.torch_shape).astype(np.float32) for e in TABLE}


def test_fold_joins_integers_to_the_name_before():
    assert fold("a.4.1.to_q.weight", "kernel") == ("a_4_1", "to_q", "kernel")
    assert fold("block.10.bias", "bias") == ("block_10", "bias")
    assert fold("conv2d.weight", "kernel") == ("conv2d", "kernel")  # a digit inside a name is no index


def test_round_trip_is_exact_and_shapes_are_as_told():
    source = tensors()
    params = to_flax(TABLE, source)
    for entry in TABLE:
        assert get_leaf(params, entry.flax_path).shape == entry.flax_shape
    back = dict(to_torch(TABLE, params))
    assert list(back) == [e.torch_key for e in TABLE]
    for key, value in source.items():
        np.testing.assert_array_equal(back[key], value)


def test_kernels_compute_what_torch_computes():
    w = np.arange(15, dtype=np.float32).reshape(5, 3)
    x = np.ones(3, np.float32)
    np.testing.assert_array_equal(x @ LAYOUTS["linear"].to_flax(w), w @ x)
    k = np.random.default_rng(1).standard_normal((4, 3, 3, 1, 1)).astype(np.float32)
    flax = LAYOUTS["conv3d_temporal"].to_flax(k)
    assert flax.shape == (3, 1, 3, 4) and flax[2, 0, 1, 3] == k[3, 1, 2, 0, 0]


def test_missing_and_misshaped_are_all_named():
    source = tensors()
    del source["model.net.pos.weight"], source["model.net.to_out.0.bias"]
    with pytest.raises(KeySyncError, match=r"2 tensors are missing.*to_out\.0\.bias.*pos\.weight"):
        to_flax(TABLE, source, "file.pt")
    source = tensors()
    source["model.net.to_out.0.weight"] = np.zeros((3, 5), np.float32)
    with pytest.raises(KeySyncError, match=r"to_out\.0\.weight is \(3, 5\), expected \(5, 3\)"):
        to_flax(TABLE, source)
    params = to_flax(TABLE, tensors())
    del params["model"]["net"]["pos"]
    with pytest.raises(KeySyncError, match="model/net/pos/kernel"):
        list(to_torch(TABLE, params))
