"""KeyFace's checkpoints: recognised by what they hold, converted, exported as their authors read them, never mixed with KeySync's."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from keysync_jax.config import StageConfig, UNetConfig
from keysync_jax.converters import assemble_audio, model_directory, sgm, shapes, torch_write
from keysync_jax.converters.containers import open_sources
from keysync_jax.converters.convert import convert
from keysync_jax.converters.export import export
from keysync_jax.converters.initialize import configurations, initialize
from keysync_jax.converters.lazy import LazyTensor, Tensors, constant
from keysync_jax.converters.parts import Part, part_table
from keysync_jax.converters.safetensors_file import read, write
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare.features import Encoders
from keysync_jax.data_pipeline.prepare.groups import plan_features
from keysync_jax.data_pipeline.prepare.settings import Output
from keysync_jax.models.speech import registry
from keysync_jax.models.speech.beats import BeatsConfig
from keysync_jax.models.table import to_flax, to_torch

HEADS = {"head_channels": 32, "resolution": 128}


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    """A random KeyFace model directory, and its stages as `.pt` files."""
    folder = tmp_path_factory.mktemp("face")
    directory = initialize("tiny", folder / "model", mode="keyface")
    export(directory.path, folder / "pt", "keysync")
    return folder


def foreign(path, target, extra=(), drop=(), rename=lambda key: key):
    """A stage's tensors as a stranger's file, which says nothing of itself."""
    tensors = read(path)
    items = {rename(key): tensor for key, tensor in tensors.lazy_items() if key not in drop}
    write(target, Tensors(items | {key: constant(np.zeros(3, np.float32)) for key in extra}, "made"))
    return target


@pytest.fixture(scope="module")
def checkpoints(face, tmp_path_factory):
    """The three checkpoints as the authors publish them: LPIPS inside, the bad one known by its name."""
    folder, model = tmp_path_factory.mktemp("released"), face / "model"
    lpips = [f"loss_fn.lpips.net.slice1.{i}.weight" for i in range(38)]
    return [
        foreign(model / "keyframe/model.safetensors", folder / "keyframe.safetensors", extra=lpips),
        foreign(model / "interpolation/model.safetensors", folder / "interpolation.safetensors"),
        foreign(model / "interpolation_bad/model.safetensors", folder / "interpolation_bad_2024.safetensors", extra=["conditioner.other"]),
    ]


def encoders(face):
    return [face / "model" / "audio" / name for name in ("wavlm", "beats", "wav2vec2")] + [face / "model" / "vae"]


def test_the_released_set_becomes_a_directory(face, checkpoints, tmp_path):
    done = convert([*checkpoints, *encoders(face)], tmp_path / "out", **HEADS)
    parts, model = done.directory.parts, model_directory.load(face / "model")
    assert set(parts) == set(model.parts) and "interpolation_bad" in parts
    for name in parts:
        ours, theirs = done.directory.tensors(name), model.tensors(name)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[key], theirs[key]) for key in ours), name
    stage = done.directory.stage("keyframe")
    assert (stage.system, stage.emotion_dim, stage.audio_encoder, stage.audio_feature_dim) == ("keyface", 16, "wavlm+beats", 64)
    between = done.directory.stage("interpolation")
    assert between.guidance_numbers == {"scale": 2.0} and between.audio_encoder == "wav2vec2+beats" and not between.emotion_dim
    assert any("38 tensors of the perceptual loss" in note for note in done.notes)
    assert any("1 tensors beside the network" in note for note in done.notes)


def test_a_bad_network_is_named_or_refused(face, checkpoints, tmp_path):
    keyframe, good, bad = checkpoints
    running = foreign(bad, tmp_path / "other.safetensors", rename=lambda key: key.replace("model.", "model.inner.", 1))
    with pytest.raises(UsageError, match="name the worse one of a KeyFace model with --bad"):
        second = foreign(good, tmp_path / "second.safetensors")
        convert([keyframe, good, second, *encoders(face)], tmp_path / "out", **HEADS)
    with pytest.raises(UsageError, match="--bad .*keyframe.*give an interpolation network"):
        convert([keyframe, good, *encoders(face)], tmp_path / "out", bad=str(keyframe), **HEADS)
    assert not (tmp_path / "out").exists()
    done = convert([keyframe, good, *encoders(face)], tmp_path / "out", bad=str(running), **HEADS)
    assert len(done.directory.tensors("interpolation_bad")) == len(model_directory.load(face / "model").tensors("interpolation_bad"))
    without = convert([keyframe, good, *encoders(face)], tmp_path / "without", **HEADS)
    assert "interpolation_bad" not in without.directory.parts and any("no interpolation_bad" in note for note in without.notes)


def test_systems_do_not_mix(face, checkpoints, tiny_model, tmp_path):
    keysync = tiny_model / "interpolation" / "model.safetensors"
    with pytest.raises(KeySyncError, match="keyframe stage is KeyFace's and the interpolation stage is KeySync's"):
        convert([checkpoints[0], keysync, *encoders(face)], tmp_path / "out", head_channels=32, allow_missing=["audio/hubert"])
    assert not (tmp_path / "out").exists()


def test_export_writes_the_authors_keys_and_comes_back(face):
    model = model_directory.load(face / "model")
    files = {path.name for path in (face / "pt").glob("*.pt")}
    assert files == {"keyframe.pt", "interpolation.pt", "interpolation_bad.pt"}
    for name in ("keyframe", "interpolation", "interpolation_bad"):
        (source,) = open_sources(str(face / "pt" / f"{name}.pt"))
        assert source.kind == name and source.container.startswith("torch zip file (DeepSpeed")
        tensors = model.tensors(name)
        assert source.tensors.keys() == tensors.keys() and all(np.array_equal(source.tensors[key], tensors[key]) for key in tensors)
    assert "conditioner.embedders.3.linear.weight" in model.tensors("keyframe")
    assert "conditioner.embedders.1.linear.weight" in model.tensors("interpolation")
    assert all(key.startswith("model.") for key in model.tensors("interpolation_bad"))


@pytest.mark.parametrize("name", ["keyface_keyframe", "keyface_interpolation"])
def test_full_size_tables_are_the_manifests(golden_dir, name):
    """Every key and shape of the checkpoints, both ways; shapes alone tell the stage's configuration."""
    stored = json.loads((golden_dir / "manifests" / f"{name}.json").read_text())["tensors"]
    kind = name.removeprefix("keyface_")
    stages, vae, _ = configurations("full", "keyface")
    made = {e.torch_key: e.torch_shape for e in (*sgm.stage_table(stages[kind]), *part_table(vae, ("decoder",)))}
    assert made == {key: tuple(value["shape"]) for key, value in stored.items()}
    zero = {key: LazyTensor(tuple(v["shape"]), np.dtype(np.float32), lambda: np.zeros(())) for key, v in stored.items()}
    assert shapes.stage_config(Tensors(zero, name), kind) == stages[kind]


def test_bad_network_and_perceptual_loss_of_the_manifests(golden_dir):
    manifest = json.loads((golden_dir / "manifests" / "keyface_interpolation.json").read_text())
    stages, _, _ = configurations("full", "keyface")
    assert len(part_table(stages["interpolation"], name="interpolation_bad")) == manifest["meta"]["n_bad_network"]
    extra = json.loads((golden_dir / "manifests" / "keyface_keyframe_extra.json").read_text())["tensors"]
    assert len(extra) == 38 and all(key.startswith(f"{sgm.LPIPS}.") for key in extra)


@pytest.mark.parametrize(("kind", "manifest"), [("beats", "beats_iter3_plus_as2m_finetuned"), ("wav2vec2", "wav2vec2_base_960h")])
def test_encoders_of_the_manifests_come_and_go_bit_exact(golden_dir, kind, manifest):
    stored = json.loads((golden_dir / "manifests" / f"{manifest}.json").read_text())
    keys = stored["tensors"]
    assert registry.recognise(keys, {"model_type": kind}) == kind
    encoder, form = registry.published()[kind]
    config = form.config(stored["meta"]["config"], "cfg") if form.config else encoder.from_hf({"model_type": kind}, None, "config.json")
    renamed = {form.rename(key, config): tuple(v["shape"]) for key, v in keys.items() if not key.startswith(form.unused)}
    config = encoder.settle(config, renamed)
    table = registry.audio_table(config)
    assert {e.torch_key: e.torch_shape for e in table} == renamed
    small = dataclasses.replace(config, num_layers=1)
    entries, rng = registry.audio_table(small), np.random.default_rng(0)
    drawn = {e.torch_key: rng.standard_normal(e.torch_shape, np.float32) for e in entries}
    assert all(np.array_equal(value, drawn[key]) for key, value in to_torch(entries, to_flax(entries, drawn)))


def test_configurations_say_what_does_not_fit(tmp_path):
    with pytest.raises(KeySyncError, match="emotion_dim 16 must be even, and unet.adm_in_channels twice as much, not 8"):
        StageConfig(emotion_dim=16, unet=UNetConfig(adm_in_channels=8))
    with pytest.raises(UsageError, match="mode 'face'"):
        initialize("tiny", tmp_path / "x", mode="face")
    stages, vae, _ = configurations("tiny", "keyface")
    other = dataclasses.replace(stages["interpolation"], unet=dataclasses.replace(stages["interpolation"].unet, model_channels=64))
    parts = [Part(name, config, Tensors({}, "")) for name, config in (*stages.items(), ("interpolation_bad", other), ("vae", vae))]
    with pytest.raises(KeySyncError, match="interpolation_bad has another network than interpolation"):
        model_directory.check("here", {part.name: part.config for part in parts}, complete=False)
    assert BeatsConfig().kind == "beats"


@pytest.fixture(scope="module")
def published(golden_dir, tmp_path_factory):
    """BEATs and wav2vec2 as they are published, small: a `.pt` file with its configuration inside, and a transformers folder."""
    folder = tmp_path_factory.mktemp("published")
    case = golden_dir / "keyface_beats"
    config = json.loads((case / "case.json").read_text())["config"]["main"]
    weights = read(case / "weights.safetensors").under("main.")
    torch_write.write(folder / "BEATs.pt", weights, wrapper="model", extra={"cfg": config, "label_dict": {0: "/m/09x0r"}})
    w2v, case = folder / "wav2vec2", golden_dir / "keyface_wav2vec2"
    w2v.mkdir()
    values = json.loads((case / "case.json").read_text())["config"]
    (w2v / "config.json").write_text(json.dumps({"model_type": "wav2vec2", **values}))
    shutil.copyfile(case / "weights.safetensors", w2v / "model.safetensors")
    return folder


def test_published_encoders_are_read_with_their_own_configuration(published):
    beats, files = assemble_audio.open_encoder("beats", str(published / "BEATs.pt"))
    assert (beats.config.num_layers, beats.config.deep_norm, beats.config.num_classes) == (3, True, 7) and len(files) == 1
    speech, _ = assemble_audio.open_encoder("wav2vec2", str(published / "wav2vec2"))
    assert speech.config.kind == "wav2vec2" and not any(key.startswith(("lm_head", "wav2vec2")) for key in speech.tensors)
    with pytest.raises(KeySyncError, match="holds wav2vec2 weights; give the weights of beats"):
        assemble_audio.open_encoder("beats", str(published / "wav2vec2"))


def test_columns_of_encoders_that_the_model_lacks(published, tiny_model):
    """Prepared from local weights, without adding them to the model directory."""
    weights = {"beats": str(published / "BEATs.pt"), "wav2vec2": str(published / "wav2vec2")}
    plan = plan_features(str(tiny_model), Output(columns=("beats", "wav2vec2", "emotion"), weights=weights), None)
    columns = {group.name: [column.shape for column in group.columns] for group in plan.groups[1:]}
    assert columns == {"audio_beats": [(2, 32)], "audio_wav2vec2": [(2, 32)], "emotion": [(), (), ()]}
    tokens = Encoders(plan).tokens("beats", 0.1 * np.random.default_rng(0).standard_normal(640 * 7).astype(np.float32))
    assert tokens.shape == (7, 2, 32) and np.isfinite(tokens).all() and tokens.std() > 0.1
