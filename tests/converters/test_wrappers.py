"""What people hold: wrappers at any depth, running averages, a trainer's folders, variants, pointers, a hub cache, patterns."""

import json

import numpy as np
import pytest
from checkpoints import HUBERT, save_hf_encoder, save_stage, stage_tensors

from keysync_jax.converters import containers, safetensors_file, torch_write, wrappers
from keysync_jax.converters.lazy import Tensors, constant
from keysync_jax.core.differences import Allowed, compare, patterns_for
from keysync_jax.core.errors import KeySyncError

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 6098682464\n"


@pytest.fixture(scope="module")
def tensors():
    """A keyframe checkpoint, drawn once."""
    return Tensors({key: constant(tensor.read()) for key, tensor in stage_tensors("keyframe").lazy_items()}, "keyframe")


def opened(path, **options):
    (source,) = containers.open_sources(str(path), **options)
    return source


def equal(found, expected):
    """Equal names; values of a few, which a wrong name would mix up."""
    assert set(found) == set(expected)
    for key in list(expected)[::40]:
        np.testing.assert_array_equal(np.asarray(found[key]), np.asarray(expected[key]))


def inside(tensors, place, segment):
    """Every name with a segment put in after the first `place` ones of the network's path, as wrappers of submodules leave it."""
    path = "model.diffusion_model.".split(".")[:place]
    prefix = ".".join([*path, ""]) if path else ""
    return tensors.renamed({key: f"{prefix}{segment}.{key[len(prefix) :]}" for key in tensors if key.startswith(prefix)})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t.prefixed("module."),
        lambda t: t.prefixed("_forward_module.module._orig_mod."),
        lambda t: t.prefixed("engine.generator.net."),  # nobody's list has these
        lambda t: t.prefixed("model.module."),
        lambda t: inside(t, 1, "module"),  # model.module.diffusion_model
        lambda t: inside(t, 2, "_orig_mod"),
        lambda t: inside(t, 2, "module"),  # model.diffusion_model.module.input_blocks
        lambda t: inside(t, 2, "module").prefixed("model.module."),
    ],
)
def test_wrappers_are_taken_off_by_the_shape_of_the_tree(wrap, tensors, tmp_path):
    safetensors_file.write(tmp_path / "x.safetensors", wrap(tensors))
    source = opened(tmp_path / "x.safetensors")
    assert source.kind == "keyframe"
    equal(source.tensors, tensors)


@pytest.mark.parametrize("path", [("params",), ("model",), ("agent", "weights", "student"), ("state", "model_state_dict")])
def test_a_state_dict_is_found_under_any_name(path, tensors):
    saved = dict(tensors.lazy_items())
    for name in reversed(path):
        saved = {name: saved, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": constant(np.zeros(3))}}}}
    found = [each for each in wrappers.state_dicts(saved) if not each.is_average]
    assert [each.path for each in found] == [path]


def test_speech_encoders_lose_their_wrappers_too(tmp_path):
    folder = save_hf_encoder(tmp_path / "hubert", HUBERT)
    plain = opened(folder)
    (path,) = plain.files
    tensors = Tensors({key: constant(t.read()) for key, t in safetensors_file.read(path).lazy_items()}, "x")
    safetensors_file.write(tmp_path / "wrapped.safetensors", tensors.prefixed("encoder_module.module."))
    (tmp_path / "wrapped.safetensors").replace(path)
    assert (opened(folder).kind, set(opened(folder).tensors)) == (plain.kind, set(plain.tensors))


def with_average(tensors):
    average = {"model_ema.decay": constant(np.float32(0.9999)), "model_ema.num_updates": constant(np.int64(7))}
    for key, tensor in tensors.lazy_items():
        if key.startswith("model."):
            average["model_ema." + key.removeprefix("model.").replace(".", "")] = constant(tensor.read() * 2)
    return tensors.updated(average)


def test_a_running_average_is_a_choice(tensors, tmp_path):
    safetensors_file.write(tmp_path / "x.safetensors", with_average(tensors).prefixed("module."))
    source = opened(tmp_path / "x.safetensors")
    equal(source.tensors, tensors)
    assert "model_ema.* are a running average" in source.notes[0] and "--ema" in source.notes[0]
    average = opened(tmp_path / "x.safetensors", ema=True)
    assert set(average.tensors) == set(tensors)
    key = "model.diffusion_model.out.2.weight"
    np.testing.assert_array_equal(average.tensors[key], 2 * np.asarray(tensors[key]))


def test_an_average_in_a_dict_of_its_own(tensors, tmp_path):
    flat = tensors.prefixed("state_dict.").updated({f"ema_model.{k}": constant(v.read() * 2) for k, v in tensors.lazy_items()})
    torch_write.write(tmp_path / "x.pt", flat, wrapper="all")
    equal(opened(tmp_path / "x.pt").tensors, tensors)


def test_a_folder_of_deepspeed(tensors, tmp_path):
    folder = tmp_path / "last.ckpt"
    (folder / "global_step900").mkdir(parents=True)
    (folder / "latest").write_text("global_step900")
    states = folder / "global_step900" / "mp_rank_00_model_states.pt"
    torch_write.write(states, tensors.prefixed("_forward_module."), extra={"ds_version": "0.14.0", "dp_world_size": 8})
    (folder / "global_step900" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    for place in (folder, folder / "global_step900"):
        source = opened(place)
        equal(source.tensors, tensors)
        assert "DeepSpeed" in source.container and states.name in source.notes[-1]
    (folder / "global_step900" / "mp_rank_01_model_states.pt").write_bytes(states.read_bytes())
    with pytest.raises(KeySyncError, match=r"cut into 2 .*zero_to_fp32\.py"):
        opened(folder)


def test_a_pointer_is_named_and_a_good_file_beside_it_taken(tmp_path):
    (tmp_path / "x.pt").write_text(POINTER)
    with pytest.raises(KeySyncError, match=r"x\.pt: this is the git-lfs pointer, not the file.*6,098,682,464 bytes"):
        opened(tmp_path / "x.pt")
    folder = save_hf_encoder(tmp_path / "hubert", HUBERT)
    (path,) = opened(folder).files
    tensors = safetensors_file.read(path)
    torch_write.write(folder / "pytorch_model.bin", tensors, wrapper=None)
    (folder / "model.safetensors").write_text(POINTER)
    assert opened(folder).files == (str(folder / "pytorch_model.bin"),)
    (folder / "pytorch_model.bin").write_text(POINTER)
    with pytest.raises(KeySyncError, match="git-lfs pointer"):
        opened(folder)


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("index", ["model.safetensors.index.{}.json", "model.{}.safetensors.index.json"])
def test_variants_in_shards(variant, index, tensors, tmp_path):
    names = list(tensors)
    shards = {f"model.{variant}-{i + 1:05d}-of-00002.safetensors": names[i::2] for i in range(2)}
    for name, keys in shards.items():
        safetensors_file.write(tmp_path / name, tensors.select(keys))
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (tmp_path / index.format(variant)).write_text(json.dumps({"weight_map": weight_map}))
    equal(opened(tmp_path).tensors, tensors)


def test_a_hub_cache_by_its_top(tmp_path):
    cache = tmp_path / "hub"
    repository = cache / "models--facebook--hubert"
    for commit in ("aaa", "bbb"):
        save_hf_encoder(repository / "snapshots" / commit, HUBERT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("bbb")
    for top in (tmp_path, cache, repository):
        assert opened(top).files[0].startswith(str(repository / "snapshots" / "bbb"))
    (repository / "refs" / "main").unlink()
    with pytest.raises(KeySyncError, match=r"2 snapshots \(aaa, bbb\)"):
        opened(repository)
    (cache / "models--other--one" / "snapshots").mkdir(parents=True)
    with pytest.raises(KeySyncError, match="2 repositories .*facebook/hubert, other/one"):
        opened(cache)


def test_patterns_and_the_nearest_name():
    names = ["loss.a.x", "loss.a.y", "step"]
    assert patterns_for(names) == ["loss.a.*", "step"]
    assert all(name in Allowed(patterns_for(names)) for name in names) and "losses.x" not in Allowed(["loss.*"])
    found = compare({"a.kernel_weight": (1,), "b": (2,)}, {"a.kernel.weight": (1,), "b": (2,)})
    assert found.in_words(["a.kernel_weight"]).startswith("a.kernel.weight is missing (nearest name: a.kernel_weight); 1 tensor missing")
    many = compare({f"model_ema.{i}": (1,) for i in range(400)}, {})
    assert str(many) == "400 tensors unexpected: model_ema.*"


def test_a_file_alone_is_the_same(tensors, tmp_path):
    equal(opened(save_stage(tmp_path / "x.pt", "keyframe", prefix="")).tensors, tensors)
