"""Every container and kind of source is recognised by what it holds."""

import io
import json
import tarfile

import numpy as np
import object_store
import pytest
from checkpoints import (
    HUBERT,
    STAGES,
    VAE,
    WAVLM,
    draw,
    merged,
    same,
    save_hf_encoder,
    save_microsoft_wavlm,
    save_stage,
    save_svd_file,
    save_svd_folder,
    stage_tensors,
)

from keysync_jax.converters import containers, safetensors_file, torch_write
from keysync_jax.converters.lazy import Tensors, constant
from keysync_jax.converters.parts import part_table
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import registry


@pytest.mark.parametrize("name", ["keyframe", "interpolation"])
@pytest.mark.parametrize(
    ("file", "wrapper", "prefix"),
    [
        ("deepspeed.pt", "module", "_forward_module."),
        ("lightning.ckpt", "state_dict", ""),
        ("flat.bin", None, ""),
        ("compiled.pt", "module", "_forward_module._orig_mod."),
        ("plain.safetensors", None, ""),
        ("misleading.safetensors.pt", "module", ""),
    ],
)
def test_stage_containers(name, file, wrapper, prefix, tmp_path):
    path = save_stage(tmp_path / file, name, wrapper, prefix)
    (source,) = containers.open_sources(str(path))
    assert source.kind == name and source.files == (str(path),)
    assert same(source.tensors, stage_tensors(name))


def test_lightning_extras_are_left_alone(tmp_path):
    tensors = stage_tensors("keyframe")
    extra = {"epoch": 3, "global_step": 100, "loops": {"fit": [1, 2]}, "hyper_parameters": {"lr": 1e-4}}
    torch_write.write(tmp_path / "x.ckpt", tensors, wrapper="state_dict", extra=extra)
    (source,) = containers.open_sources(str(tmp_path / "x.ckpt"))
    assert source.kind == "keyframe" and set(source.tensors) == set(tensors)


def test_sharded(tmp_path):
    tensors = stage_tensors("keyframe")
    keys = list(tensors)
    shards = {"part-1.safetensors": keys[::2], "part-2.safetensors": keys[1::2]}
    for name, names in shards.items():
        safetensors_file.write(tmp_path / name, tensors.select(names))
    weight_map = {key: name for name, names in shards.items() for key in names}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in (index, tmp_path):  # the folder finds its index
        (source,) = containers.open_sources(str(path))
        assert source.kind == "keyframe" and len(source.files) == 2 and same(source.tensors, tensors)
    index.write_text(json.dumps({"weight_map": weight_map | {"extra.weight": "part-1.safetensors"}}))
    with pytest.raises(KeySyncError, match=r"part-1\.safetensors lacks extra\.weight"):
        containers.open_sources(str(index))
    index.write_text(json.dumps({"weight_map": {keys[0]: "../part-1.safetensors"}}))
    with pytest.raises(KeySyncError, match="not a weights file beside the index"):
        containers.open_sources(str(index))
    index.write_text(json.dumps({"weight_map": {keys[0]: "part-3.safetensors"}}))
    with pytest.raises(KeySyncError, match=r"part-3\.safetensors"):
        containers.open_sources(str(index))


def test_svd(tmp_path):
    folder = save_svd_folder(tmp_path / "svd")
    assert [s.kind for s in containers.open_sources(str(folder))] == ["diffusers_unet", "diffusers_vae"]
    assert [s.kind for s in containers.open_sources(str(folder / "vae"))] == ["diffusers_vae"]
    (half,) = containers.open_sources(str(save_svd_folder(tmp_path / "half", unet=False, variant=".fp16")))
    assert half.kind == "diffusers_vae" and half.config["_class_name"] == "AutoencoderKLTemporalDecoder"
    (single,) = containers.open_sources(str(save_svd_file(tmp_path / "svd.safetensors")))
    assert single.kind == "svd"


def test_full_precision_is_preferred(tmp_path):
    folder = save_svd_folder(tmp_path / "svd", unet=False)
    safetensors_file.write(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", Tensors({"x": constant(np.zeros(1))}, "x"))
    (source,) = containers.open_sources(str(folder))
    assert source.path.endswith("diffusion_pytorch_model.safetensors")


def test_speech_encoders(tmp_path):
    for kind, config in (("hubert", HUBERT), ("wavlm", WAVLM)):
        for container in ("safetensors", "bin"):
            (source,) = containers.open_sources(str(save_hf_encoder(tmp_path / f"{kind}-{container}", config, container)))
            assert source.kind == kind and source.config["model_type"] == kind
    (source,) = containers.open_sources(str(save_microsoft_wavlm(tmp_path / "WavLM.pt")))
    assert source.kind == "wavlm_microsoft" and source.config["encoder_layers"] == 2
    assert same(source.tensors, draw(registry.audio_table(WAVLM), 5))


def test_stages_without_their_signs_are_still_told_apart():
    """A checkpoint that lacks one of the telling tensors is named after the others, so that the missing one can be reported."""
    keyframe, interpolation = (draw(part_table(STAGES[name])) for name in ("keyframe", "interpolation"))

    def without(tensors, *names):
        return tensors.select(k for k in tensors if not k.startswith(names))

    assert containers.recognise(without(keyframe, "conditioner")) == "keyframe"
    assert containers.recognise(without(keyframe, "model.diffusion_model.label_emb")) == "keyframe"
    assert containers.recognise(without(interpolation, "model.learned_mask")) == "interpolation"
    assert containers.recognise(without(interpolation, "conditioner", "model.diffusion_model.input_blocks.0.0")) == "interpolation"
    assert containers.recognise(merged(draw(part_table(VAE)))) == "svd"
    assert containers.recognise(Tensors({"fc.weight": constant(np.zeros(1))}, "x")) == "unknown"


def write_text(path):
    path.write_text("these are not weights, whatever the name says\n" * 10)


def write_cut(path):
    save_stage(path.with_name("whole.safetensors"), "keyframe", prefix="")
    path.write_bytes(path.with_name("whole.safetensors").read_bytes()[:-10])


def write_gap(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)


def write_lie(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def write_type(path):
    header = json.dumps({"a": {"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)


def write_cut_tar(path):
    whole = path.with_name("whole.tar")
    with tarfile.open(whole, "w") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(name)
            info.size = 60_000
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    path.write_bytes(whole.read_bytes()[:70_000])


def write_no_tensors(path):
    safetensors_file.write(path, Tensors({}, "none"))


@pytest.mark.parametrize(
    ("name", "make", "word"),
    [
        ("weights.pt", write_text, "not a weights file"),
        ("weights.safetensors", write_text, "not a safetensors file"),
        ("empty.pt", lambda path: path.touch(), "is empty"),
        ("nowhere.pt", lambda path: None, "does not exist"),
        ("folder", lambda path: path.mkdir(), "holds no weights"),
        ("cut.safetensors", write_cut, "truncated"),
        ("gap.safetensors", write_gap, "does not add up"),
        ("lie.safetensors", write_lie, "does not add up"),
        ("type.safetensors", write_type, "malformed"),
        ("none.safetensors", write_no_tensors, "holds no tensors"),
        ("cut.tar", write_cut_tar, "not a weights file"),
        ("list.index.json", lambda path: path.write_text("[]"), "not a JSON object"),
        ("map.index.json", lambda path: path.write_text("{}"), "no weight_map"),
    ],
)
def test_what_is_no_container_gets_one_clear_line(name, make, word, tmp_path):
    path = tmp_path / name
    make(path)
    with pytest.raises(KeySyncError, match=word) as caught:
        containers.open_sources(str(path))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_several_files_need_a_choice(tmp_path):
    for name in ("keyframe_dub.pt", "interpolation_dub.pt"):
        save_stage(tmp_path / name, name.removesuffix("_dub.pt"))
    with pytest.raises(KeySyncError, match=r"2 weight files \(interpolation_dub\.pt, keyframe_dub\.pt\)"):
        containers.open_sources(str(tmp_path))


def test_safetensors_are_read_from_an_object_store(tmp_path, monkeypatch):
    root = object_store.mount(tmp_path, monkeypatch)
    folder = save_svd_folder(root / "bucket" / "svd")
    unet, vae = containers.open_sources("gs://bucket/svd")
    assert (unet.kind, vae.kind) == ("diffusers_unet", "diffusers_vae")
    assert unet.files == ("gs://bucket/svd/unet/diffusion_pytorch_model.safetensors",)
    for remote, local in zip((unet, vae), containers.open_sources(str(folder)), strict=True):
        assert same(remote.tensors, local.tensors) and remote.config == local.config
    save_svd_file(root / "bucket" / "svd.safetensors")
    assert [s.kind for s in containers.open_sources("gs://bucket/svd.safetensors")] == ["svd"]
    save_stage(root / "bucket" / "keyframe_dub.pt", "keyframe")
    with pytest.raises(
        KeySyncError, match=r"gs://bucket/keyframe_dub\.pt is not a safetensors file.* read from a local disk, copy it there"
    ):
        containers.open_sources("gs://bucket/keyframe_dub.pt")
    with pytest.raises(KeySyncError, match="gs://bucket/absent does not exist"):
        containers.open_sources("gs://bucket/absent")


def test_safetensors_files_are_those_of_the_package(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    values = {
        "b": np.arange(6, dtype=np.float16).reshape(2, 3),
        "a": np.ones(3, np.float32),
        "n": np.arange(4),
        "e": np.zeros((0, 2), np.float32),
    }
    written = safetensors_file.write(
        tmp_path / "ours.safetensors", Tensors({k: constant(v) for k, v in values.items()}, "x"), {"who": "me"}
    )
    assert (written.tensors, written.parameters) == (4, 13)
    assert written.nbytes == (tmp_path / "ours.safetensors").stat().st_size
    for key, value in load_file(tmp_path / "ours.safetensors").items():
        np.testing.assert_array_equal(value, values[key])
    with safe_open(tmp_path / "ours.safetensors", "np") as f:
        assert f.metadata() == {"format": "pt", "who": "me"}
    save_file(values, tmp_path / "theirs.safetensors")
    ours = safetensors_file.read(tmp_path / "theirs.safetensors")
    assert set(ours) == set(values) and all(np.array_equal(ours[k], values[k]) for k in values)
