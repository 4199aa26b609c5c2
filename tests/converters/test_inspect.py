"""`inspect` names what it sees, `init` says that its weights are random."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from checkpoints import (
    HUBERT,
    STAGES,
    VAE,
    WAVLM,
    save_hf_encoder,
    save_microsoft_wavlm,
    save_stage,
    save_svd_file,
    save_svd_folder,
    stage_tensors,
)
from rich.console import Console

from keysync_jax.converters import model_directory, safetensors_file
from keysync_jax.converters.initialize import configurations, initialize
from keysync_jax.converters.inspect_weights import inspect, show
from keysync_jax.converters.lazy import Tensors, constant
from keysync_jax.converters.parts import part_table
from keysync_jax.core.errors import KeySyncError, UsageError


def shown(path, **options):
    console = Console(record=True, width=160, file=io.StringIO())
    show(path, console=console, **options)
    return console.export_text()


def test_stage(tmp_path):
    path = save_stage(tmp_path / "keyframe_dub.pt", "keyframe")
    found = inspect(path)
    (item,) = found["items"]
    assert found["what"] == "KeySync keyframe checkpoint"
    assert item["container"] == 'torch zip file (DeepSpeed, under "module")'
    assert (item["count"], item["types"]) == (len(stage_tensors("keyframe")), {"float32": item["count"]})
    assert item["parameters"] * 4 == item["bytes"]
    assert (item["missing"], item["unexpected"], item["wrong_shape"]) == ([], [], {})
    assert item["config"]["unet"]["model_channels"] == 32
    assert item["tensors"]["conditioner.embedders.2.linear.bias"] == {"shape": [32], "type": "float32"}
    assert sum(group["tensors"] for group in item["groups"].values()) == item["count"]
    text = shown(path)
    assert "KeySync keyframe checkpoint" in text and "nothing missing, nothing unexpected" in text and "label_emb" in text
    assert "conditioner.embedders.2.linear.bias  (32,)  float32" in shown(path, tensors=True)


def test_problems_are_listed(tmp_path):
    tensors = dict(stage_tensors("interpolation").lazy_items())
    del tensors["model.learned_mask"]
    tensors["loss_fn.scale"] = constant(np.zeros(1, np.float32))
    tensors["model.diffusion_model.out.2.bias"] = constant(np.zeros(9, np.float32))
    path = save_stage(tmp_path / "x.pt", "interpolation", tensors=Tensors(tensors, "x"))
    (item,) = inspect(path)["items"]
    assert item["kind"] == "interpolation" and item["missing"] == ["model.learned_mask"] and item["unexpected"] == ["loss_fn.scale"]
    assert item["wrong_shape"] == {"model.diffusion_model.out.2.bias": {"found": [9], "expected": [4]}}
    text = shown(path)
    assert all(line in text for line in ("missing: model.learned_mask", "unexpected: loss_fn.scale", "out.2.bias is [9], expected [4]"))


def test_every_kind(tmp_path):
    made = {
        "Stable Video Diffusion U-Net (diffusers) and Stable Video Diffusion VAE (diffusers)": save_svd_folder(tmp_path / "svd"),
        "Stable Video Diffusion in one file (sgm names)": save_svd_file(tmp_path / "svd.safetensors"),
        "HuBERT (Hugging Face)": save_hf_encoder(tmp_path / "hubert", HUBERT),
        "WavLM (Hugging Face)": save_hf_encoder(tmp_path / "wavlm", WAVLM),
        "WavLM (Microsoft)": save_microsoft_wavlm(tmp_path / "WavLM.pt"),
    }
    for what, path in made.items():
        found = inspect(path)
        assert found["what"] == what
        for item in found["items"]:
            assert item["count"] > 0 and not item.get("missing") and not item.get("unexpected") and not item.get("problem"), what
    (tmp_path / "hubert" / "config.json").unlink()
    assert "needs the config.json" in inspect(tmp_path / "hubert")["items"][0]["problem"]


def test_unknown_tensors_are_described_and_other_files_refused(tmp_path):
    safetensors_file.write(tmp_path / "net.safetensors", Tensors({"fc.weight": constant(np.zeros((2, 3), np.float32))}, "net"))
    found = inspect(tmp_path / "net.safetensors")
    assert found["what"] == "tensors of an unknown model" and found["items"][0]["parameters"] == 6
    (tmp_path / "notes.pt").write_text("hello")
    with pytest.raises(KeySyncError, match=r"notes\.pt is not a weights file"):
        inspect(tmp_path / "notes.pt")


def test_model_directory(tiny_model, tmp_path):
    found = inspect(tiny_model)
    assert found["what"] == "KeySync-JAX model directory, RANDOM weights" and found["problem"] is None
    assert [item["name"] for item in found["items"]] == ["keyframe", "interpolation", "vae", "audio/hubert", "audio/wavlm"]
    assert "RANDOM" in shown(tiny_model)
    broken = shutil.copytree(tiny_model, tmp_path / "model")
    index = json.loads((broken / "model_index.json").read_text())
    index["parts"].remove("audio/wavlm")
    (broken / "model_index.json").write_text(json.dumps(index))
    assert "no part audio/wavlm" in inspect(broken)["problem"]
    assert "no part audio/wavlm" in shown(broken)


def test_json(tiny_model, capsys):
    show(tiny_model, as_json=True)
    brief = json.loads(capsys.readouterr().out)
    assert "tensors" not in brief["items"][0] and brief["random"] is True
    show(tiny_model / "vae", as_json=True, tensors=True)
    assert len(json.loads(capsys.readouterr().out)["items"][0]["tensors"]) == len(part_table(VAE))


# -- init ---------------------------------------------------------------------------------------------------------------------------


def test_tiny_is_what_the_documentation_says():
    stages, vae, encoders = configurations("tiny")
    for name, stage in stages.items():
        assert (stage.stage, stage.resolution, stage.latent_size) == (name, 128, 16)
        assert len(stage.unet.channel_mult) == 2 and stage.unet.attention_resolutions
        assert stage.latent_size * vae.downsample_factor == stage.resolution
    assert vae.base_channels == 32
    assert [e.kind for e in encoders] == ["hubert", "wavlm"] and {e.num_layers for e in encoders} == {2}
    with pytest.raises(UsageError, match="size 'huge'"):
        configurations("huge")


def test_full_has_the_released_numbers():
    stages, vae, encoders = configurations("full")
    counts = [len(part_table(stages[name])) + len(part_table(vae, ("decoder",))) for name in ("keyframe", "interpolation")]
    assert counts == [1696, 1697]
    assert [(e.kind, len(part_table(e)), e.hidden_size) for e in encoders] == [("hubert", 211, 768), ("wavlm", 248, 768)]
    assert not encoders[1].normalize_waveform and stages["interpolation"].audio_encoder == "wavlm"


def test_seed_decides_the_bytes_and_nothing_is_degenerate(tiny_model, tmp_path):
    lines = Console(record=True, file=io.StringIO())
    first = initialize("tiny", tmp_path / "a", seed=0, console=lines)
    assert "RANDOM weights" in lines.export_text()
    other = initialize("tiny", tmp_path / "b", seed=1, console=lines)
    for part in first.parts:
        data = (tmp_path / "a" / part / "model.safetensors").read_bytes()
        assert data == (tiny_model / part / "model.safetensors").read_bytes()  # seed 0 again
        assert data != (tmp_path / "b" / part / "model.safetensors").read_bytes()
    # The two stages share names and shapes, and must not share values.
    keyframe, interpolation = (other.tensors(name) for name in ("keyframe", "interpolation"))
    key = "model.diffusion_model.middle_block.1.proj_out.weight"
    assert np.abs(keyframe[key]).max() > 0 and not np.array_equal(keyframe[key], interpolation[key])


def test_a_random_network_answers_to_its_inputs(tiny_model):
    """The reference starts its last layers at zero; a demo with them would show nothing."""
    from keysync_jax.models.stage import StageModel

    directory = model_directory.load(tiny_model)
    config = STAGES["keyframe"]
    rng = np.random.default_rng(0)
    x, concat = rng.standard_normal((1, 2, 16, 16, 4)).astype(np.float32), rng.standard_normal((1, 16, 16, 4)).astype(np.float32)
    audio = rng.standard_normal((1, 2, 2, 32)).astype(np.float32)
    model, params = StageModel(config), {"params": directory.params("keyframe")}

    @jax.jit
    def run(x, concat, audio):
        return model.apply(params, x, np.zeros(1, np.float32), concat, audio, method="everything")

    out = run(x, concat, audio)
    assert 0.1 < float(out.std()) < 3
    for changed in (run(x + 1, concat, audio), run(x, concat + 1, audio), run(x, concat, audio + 1)):
        assert float(np.abs(changed - out).mean()) > 0.02 * float(out.std())
