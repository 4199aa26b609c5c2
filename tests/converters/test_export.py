"""`export`: files that PyTorch code loads strictly, and that convert back to the same directory."""

import json
import shutil

import numpy as np
import pytest
from bounds import close
from checkpoints import ENCODERS, STAGES, VAE, draw, same

from keysync_jax.converters import model_directory, safetensors_file, torch_file
from keysync_jax.converters.convert import convert
from keysync_jax.converters.export import _vae_copies, export
from keysync_jax.converters.fresh import fresh
from keysync_jax.converters.initialize import configurations
from keysync_jax.converters.lazy import BFLOAT16, LazyTensor, Tensors
from keysync_jax.converters.parts import Part, describe, part_table
from keysync_jax.core.errors import KeySyncError, UsageError

KL = "conditioner.embedders.0.encoder."
ENCODER = "first_stage_model.encoder."


def state_of(path):
    if path.suffix == ".pt":
        saved = torch_file.load(path)
        assert set(saved) == {"module", "keysync"}  # what the reference reads, and what we add
        return Tensors(saved["module"], str(path))
    return safetensors_file.read(path)


@pytest.mark.parametrize("container", ["pt", "safetensors"])
def test_keysync_format_and_back(container, tiny_model, tmp_path):
    paths = export(tiny_model, tmp_path / "out", "keysync", container=container)
    assert [p.rsplit("/", 1)[-1] for p in paths] == [f"keyframe_dub.{container}", f"interpolation_dub.{container}"]
    directory = model_directory.load(tiny_model)
    for name in STAGES:
        state = state_of(tmp_path / "out" / f"{name}_dub.{container}")
        assert same(state, directory.tensors(name))
        assert set(state) == {e.torch_key for e in (*part_table(STAGES[name]), *part_table(VAE, ("decoder",)))}
    # Our files say what they were trained with, so nothing has to be assumed on the way back, not even that the weights are random.
    others = [str(tiny_model / part) for part in ("vae", "audio/hubert", "audio/wavlm")]
    result = convert([*paths, *others], tmp_path / "again")
    assert result.directory.random and not any("assumed" in note for note in result.notes)
    for part in directory.parts:
        assert (tmp_path / "again" / part / "model.safetensors").read_bytes() == (tiny_model / part / "model.safetensors").read_bytes()


def test_what_the_reference_would_compute_otherwise_is_said(tiny_model, tmp_path, capsys):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    values = json.loads((model / "keyframe" / "config.json").read_text())
    values["config"]["unet"]["norm_groups"] = 16
    (model / "keyframe" / "config.json").write_text(json.dumps(values))
    export(model, tmp_path / "out", "keysync", container="safetensors")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "keyframe: its group norms have 16 groups, the reference's code always 32" in notes[0]
    with pytest.raises(KeySyncError, match="cannot express norm_groups=16"):
        export(model, tmp_path / "svd", "diffusers")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoders": {"keyframe": "wavlm"}}, "--encoder keyframe=wavlm: .*keyframe_dub.safetensors says of itself that this is hubert"),
        ({"mask": "mouth"}, "--mask mouth: .* this is box"),
        ({"resolution": 256}, "--resolution 256: .* this is 128"),
        ({"head_channels": 16}, "--head-channels 16: .* this is 32"),
    ],
)
def test_options_do_not_overrule_what_our_files_say(options, words, tmp_path):
    path = tmp_path / "keyframe_dub.safetensors"
    config = STAGES["keyframe"]
    safetensors_file.write(path, draw(part_table(config)), {"keysync": json.dumps(describe("keyframe", config, random=True))})
    with pytest.raises(UsageError, match=words):
        convert([str(path)], tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()


def test_diffusers_format_and_back(tiny_model, tmp_path):
    paths = export(tiny_model, tmp_path / "out", "diffusers")
    for path, name in zip(paths, STAGES, strict=True):
        folder = tmp_path / "out" / name
        assert path == str(folder)
        unet = json.loads((folder / "unet" / "config.json").read_text())
        assert (unet["_class_name"], unet["in_channels"]) == ("UNetSpatioTemporalConditionModel", STAGES[name].unet.in_channels)
        assert unet["projection_class_embeddings_input_dim"] == STAGES[name].unet.audio_dim  # audio tokens instead of SVD's ids
        sidecar = safetensors_file.read(folder / "keysync.safetensors")
        filler = {"model.learned_mask"} if name == "interpolation" else set()
        assert set(sidecar) == {"conditioner.embedders.2.linear.weight", "conditioner.embedders.2.linear.bias"} | filler
    encoders = [str(tiny_model / "audio" / config.kind) for config in ENCODERS]
    convert([*paths, *encoders], tmp_path / "again")
    for part in ("keyframe", "interpolation", "vae"):
        assert (tmp_path / "again" / part / "model.safetensors").read_bytes() == (tiny_model / part / "model.safetensors").read_bytes()


def test_vae_copies(tiny_model, tmp_path):
    export(tiny_model, tmp_path / "strict", "keysync", vae_copies=True)
    keyframe = state_of(tmp_path / "strict" / "keyframe_dub.pt")
    assert not any(key.startswith((KL, ENCODER)) for key in keyframe)  # that engine has no autoencoder in its conditioner
    interpolation = state_of(tmp_path / "strict" / "interpolation_dub.pt")
    vae = model_directory.load(tiny_model).tensors("vae")
    np.testing.assert_array_equal(interpolation[f"{KL}quant_conv.weight"], vae["first_stage_model.quant_conv.weight"])
    np.testing.assert_array_equal(interpolation[f"{KL}decoder.conv_out.bias"], vae["first_stage_model.decoder.conv_out.bias"])
    np.testing.assert_array_equal(interpolation[f"{KL}post_quant_conv.weight"][:, :, 0, 0], np.eye(4))
    assert not any("time_stack" in key or "mix_factor" in key for key in interpolation if key.startswith(KL))

    export(tiny_model, tmp_path / "all", "keysync", vae_copies=("conditioner", "first_stage"), stages=["interpolation"])
    assert not (tmp_path / "all" / "keyframe_dub.pt").exists()
    everything = state_of(tmp_path / "all" / "interpolation_dub.pt")
    assert set(everything) - set(interpolation) == {k for k in vae if k.startswith(ENCODER)}


def test_first_stage_copy_is_encoder_and_quant_conv_in_one(tiny_model, tmp_path):
    """The reference's first stage has no quant_conv; ours is folded into the last convolution, and the moments stay the same."""
    export(tiny_model, tmp_path / "out", "keysync", vae_copies=("first_stage",), stages=["keyframe"])
    folded = state_of(tmp_path / "out" / "keyframe_dub.pt")
    ours = model_directory.load(tiny_model).tensors("vae")
    weight, bias = (f"{ENCODER}conv_out.{leaf}" for leaf in ("weight", "bias"))
    patch = np.random.default_rng(0).standard_normal(ours[weight].shape[1:])  # what one output pixel of conv_out sees
    moments = np.tensordot(ours[weight], patch, 3) + ours[bias]
    expected = ours["first_stage_model.quant_conv.weight"][:, :, 0, 0] @ moments + ours["first_stage_model.quant_conv.bias"]
    # The folded weights are sums of eight products, stored in float32.
    close(np.tensordot(folded[weight], patch, 3) + folded[bias], expected, 2, terms=patch.size, wrong=moments)


@pytest.mark.parametrize(
    ("manifest", "name", "copies"),
    [
        ("keysync_keyframe", "keyframe", ()),
        ("keysync_keyframe_with_encoder", "keyframe", ("conditioner", "first_stage")),
        ("keysync_interpolation", "interpolation", ("conditioner",)),
    ],
)
def test_full_size_export_has_exactly_the_keys_of_the_manifest(manifest, name, copies, golden_dir):
    stored = json.loads((golden_dir / "manifests" / f"{manifest}.json").read_text())["tensors"]
    stages, vae_config, _ = configurations("full")
    vae = fresh(part_table(vae_config), 0)
    tensors = fresh([*part_table(stages[name]), *part_table(vae_config, ("decoder",))], 0)
    tensors = tensors.updated(_vae_copies(name, vae_config, vae, copies))
    assert {key: list(t.shape) for key, t in tensors.lazy_items()} == {key: t["shape"] for key, t in stored.items()}
    assert len(stored) == {"keysync_keyframe": 1696, "keysync_keyframe_with_encoder": 1802, "keysync_interpolation": 1697 + 248}[manifest]


def test_other_types(tiny_model, tmp_path):
    export(tiny_model, tmp_path / "half", "keysync", dtype="bfloat16", stages=["keyframe"])
    assert {t.dtype for _, t in state_of(tmp_path / "half" / "keyframe_dub.pt").lazy_items()} == {BFLOAT16}
    export(tiny_model, tmp_path / "svd", "diffusers", dtype="bfloat16", stages=["keyframe"])
    files = sorted((tmp_path / "svd").rglob("*.safetensors"))
    assert [path.parent.name for path in files] == ["keyframe", "unet", "vae"]
    for path in files:  # of the VAE the encoder too, which is not the stage's own
        assert {t.dtype for _, t in safetensors_file.read(path).lazy_items()} == {BFLOAT16}


def test_refusals(tiny_model, tmp_path):
    out = tmp_path / "out"
    for options, words in (
        ({"format": "onnx"}, "format 'onnx': choose one of keysync, diffusers"),
        ({"format": "keysync", "container": "zip"}, "container 'zip'"),
        ({"format": "keysync", "dtype": "int8"}, "dtype 'int8'"),
        ({"format": "keysync", "stages": ["first"]}, "first is no stage"),
        ({"format": "keysync", "vae_copies": ["clip"]}, "vae_copies clip"),
        ({"format": "diffusers", "vae_copies": True}, "belong to the keysync format"),
    ):
        with pytest.raises(UsageError, match=words):
            export(tiny_model, out, **options)
    assert not out.exists()
    with pytest.raises(KeySyncError, match="nowhere does not exist"):
        export(tmp_path / "nowhere", out, "keysync")
    vae = Part("vae", VAE, draw(part_table(VAE)))
    model_directory.save(tmp_path / "vae_only", [vae])
    with pytest.raises(KeySyncError, match="no stage to export"):
        export(tmp_path / "vae_only", out, "keysync")
    stage = Part("keyframe", STAGES["keyframe"], draw(part_table(STAGES["keyframe"])))
    model_directory.save(tmp_path / "no_vae", [stage])
    with pytest.raises(KeySyncError, match="keyframe part has no VAE decoder"):
        export(tmp_path / "no_vae", out, "keysync")
    with pytest.raises(KeySyncError, match="has no part vae"):
        export(tmp_path / "no_vae", out, "diffusers")
    assert not out.exists() and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_replacing(tiny_model, tmp_path):
    out = tmp_path / "out"
    export(tiny_model, out, "keysync", stages=["keyframe"])
    with pytest.raises(KeySyncError, match="is not empty"):
        export(tiny_model, out, "keysync")
    export(tiny_model, out, "diffusers", stages=["keyframe"], force=True)
    assert sorted(p.name for p in out.iterdir()) == ["keyframe", "keysync_export.json"]
    with pytest.raises(KeySyncError, match="holds other files"):  # a model directory is not an export
        export(tiny_model, tiny_model, "keysync", force=True)


def test_tensors_that_are_not_what_they_said(tmp_path):
    wrong = Tensors({"w": LazyTensor((2, 3), np.dtype(np.float32), lambda: np.zeros((3, 2), np.float32))}, "memory")
    with pytest.raises(KeySyncError, match=r"w was announced as float32 \(2, 3\) and is float32 \(3, 2\)"):
        safetensors_file.write(tmp_path / "x.safetensors", wrong)
