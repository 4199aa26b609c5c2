"""torch file -> Flax parameters -> Orbax checkpoint -> torch file, bit for bit, with one table."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoints import HUBERT, STAGES, VAE, WAVLM, draw

from keysync_jax.converters import model_directory, safetensors_file, torch_file, torch_write
from keysync_jax.converters.export import export_params
from keysync_jax.converters.lazy import BFLOAT16, Tensors, constant, from_params
from keysync_jax.converters.parts import part_table
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import get_leaf, to_flax

PARTS = {"keyframe": STAGES["keyframe"], "interpolation": STAGES["interpolation"], "vae": VAE, "audio/hubert": HUBERT, "audio/wavlm": WAVLM}


@pytest.mark.parametrize("name", list(PARTS))
def test_through_orbax(name, tmp_path):
    table = part_table(PARTS[name])
    source = draw(table, 3)
    torch_write.write(tmp_path / "in.pt", source)
    read = Tensors(torch_file.flatten(torch_file.load(tmp_path / "in.pt")["module"], "in.pt"), "in.pt")
    params = to_flax(table, read)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "checkpoint", jax.tree.map(np.zeros_like, params))
    torch_write.write(tmp_path / "out.pt", from_params(table, restored))
    back = torch_file.load(tmp_path / "out.pt")["module"]
    assert list(back) == [e.torch_key for e in table]
    for entry in table:  # every tensor has values of its own, so none can stand in for another
        np.testing.assert_array_equal(back[entry.torch_key].read(), source[entry.torch_key], err_msg=entry.torch_key)
    if name in STAGES:
        export_params(tmp_path / "stage.safetensors", PARTS[name], restored, container="safetensors")
        exported = safetensors_file.read(tmp_path / "stage.safetensors")
        assert all(np.array_equal(exported[key], source[key]) for key in source) and len(exported) == len(source)


@pytest.mark.parametrize("name", list(PARTS))
def test_each_entry_alone_comes_back_under_its_own_name(name):
    """Each Flax leaf in turn is marked, and only the tensor of its entry changes.

    One pass does it for all: leaf i holds the constant i, so a tensor that came from another leaf shows another number.
    """
    table = part_table(PARTS[name])
    params: dict = to_flax(table, draw(table))
    paths = [e.flax_path for e in table]
    assert len(set(paths)) == len(paths) == len(jax.tree.leaves(params))
    for i, path in enumerate(paths):
        get_leaf(params, path)[...] = i
    back = from_params(table, params)
    for i, entry in enumerate(table):
        assert (back[entry.torch_key] == i).all() and back.info(entry.torch_key).shape == entry.torch_shape
    # A sample of entries with one element changed: it comes back at the place that the layout says.
    for entry in table[:: max(1, len(table) // 25)]:
        leaf = get_leaf(params, entry.flax_path)
        place = tuple(n // 2 for n in leaf.shape)
        before = leaf[place].copy()
        leaf[place] = -1
        changed = [e.torch_key for e in table if (back[e.torch_key] == -1).any()]
        assert changed == [entry.torch_key] and (back[entry.torch_key] == -1).sum() == 1
        leaf[place] = before


def test_half_precision_keeps_its_bits(tmp_path):
    for dtype in (np.dtype(np.float16), BFLOAT16):
        tensors = draw(part_table(VAE)).astype(dtype)
        torch_write.write(tmp_path / "half.pt", tensors)
        read = Tensors(torch_file.flatten(torch_file.load(tmp_path / "half.pt")["module"], "x"), "x")
        params = to_flax(part_table(VAE), read, dtype=None)
        back = from_params(part_table(VAE), params)
        assert all(back[k].dtype == dtype and np.array_equal(back[k].view(np.uint16), tensors[k].view(np.uint16)) for k in tensors)


def test_from_params_names_what_does_not_fit():
    table = part_table(VAE)
    params = to_flax(table, draw(table))
    del params["first_stage_model"]["quant_conv"]["bias"]
    with pytest.raises(
        KeySyncError, match=r"first_stage_model/quant_conv/bias is missing \(it becomes first_stage_model\.quant_conv\.bias\)"
    ):
        from_params(table, params)
    params["first_stage_model"]["quant_conv"]["bias"] = np.zeros(3, np.float32)
    with pytest.raises(KeySyncError, match=r"quant_conv/bias is \(3,\), expected \(8,\)"):
        from_params(table, params)


def test_trained_parameters_become_a_model_directory(tmp_path):
    """The way of a training job: parameters (from an Orbax checkpoint) to a directory that dubs, and to the reference's file."""
    configs = {**STAGES, "vae": VAE, "audio/hubert": HUBERT, "audio/wavlm": WAVLM}
    params = {name: to_flax(part_table(config), draw(part_table(config), 9)) for name, config in configs.items()}
    directory = model_directory.save_params(tmp_path / "model", configs, params)
    model_directory.load(tmp_path / "model", verify=True)
    for name in configs:
        jax.tree.map(np.testing.assert_array_equal, directory.params(name), params[name])
    export_params(tmp_path / "keyframe_dub.pt", STAGES["keyframe"], params["keyframe"], vae=(VAE, params["vae"]))
    written = torch_file.load(tmp_path / "keyframe_dub.pt")["module"]
    stored = directory.tensors("keyframe")
    assert set(written) == set(stored) and all(np.array_equal(written[k].read(), stored[k]) for k in stored)


def test_values_that_are_not_finite_stop_the_writing(tmp_path):
    key = "first_stage_model.decoder.conv_out.bias"
    spoiled = draw(part_table(VAE)).updated({key: constant(np.array([0, np.nan, 0], np.float32))})
    with pytest.raises(KeySyncError, match=f"{key} holds values that are not finite"):
        safetensors_file.write(tmp_path / "x.safetensors", spoiled)
    too_large = draw(part_table(VAE)).updated({key: constant(np.array([0, 1e6, 0], np.float32))})
    with pytest.raises(KeySyncError, match=f"{key} holds values that are not finite"):
        safetensors_file.write(tmp_path / "x.safetensors", too_large.astype(np.dtype(np.float16)))
