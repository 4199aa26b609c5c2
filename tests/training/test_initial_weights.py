"""Starting points: what a run takes from where, and what is drawn at random."""

import dataclasses

import checkpoints as weights
import numpy as np
import pytest
import tiny_starts as tiny
from bounds import close
from tiny import KEYFRAME, UNET
from tiny_runs import write_dataset

from keysync_jax.config import to_dict
from keysync_jax.converters import model_directory, sgm
from keysync_jax.converters.parts import part_table
from keysync_jax.core import assets
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.table import to_torch
from keysync_jax.training import (
    recipes,
)
from keysync_jax.training.config import TrainConfig, train_config
from keysync_jax.training.start import check, runs
from keysync_jax.training.start.weights_layout import checked
from keysync_jax.training.state import merge
from keysync_jax.training.store import checkpoints
from keysync_jax.training.trainables import trainable_of

LABEL = "model.diffusion_model.label_emb.0.0.weight"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
AUDIO = {"conditioner.embedders.2.linear.weight", "conditioner.embedders.2.linear.bias"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("start") / "model", "keyframe").path


@pytest.fixture(scope="module")
def svd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("svd")
    return {"file": weights.save_svd_file(folder / "svd.safetensors"), "folder": weights.save_svd_folder(folder / "svd")}


def whole(found, stage):
    """Torch-layout tensors of a start, trained and frozen together."""
    frozen = {name: tree for name, tree in found.frozen.items() if name != "first_stage_model"}
    return dict(to_torch(part_table(stage), merge(found.params, frozen)))


@pytest.mark.parametrize("container", ["file", "folder"])
@pytest.mark.parametrize("stage", ["keyframe", "interpolation"])
def test_svd_start_draws_only_what_svd_cannot_give(svd, stage, container):
    pixels = tiny.LossConfig(pixel_weight=1.0)
    config = TrainConfig(stage=weights.STAGES[stage], loss=pixels, init=tiny.start_from("svd", svd[container]))
    found = trainable_of(config).initial_weights()
    ours, theirs = whole(found, config.stage), weights.svd_tensors()
    drawn = {LABEL} | AUDIO | ({FIRST, "model.learned_mask"} if stage == "interpolation" else set())
    for key, value in ours.items():
        same = key in theirs and theirs[key].shape == value.shape and np.array_equal(theirs[key], value)
        assert same == (key not in drawn), key
    assert np.abs(ours[LABEL]).max() <= 1 / np.sqrt(32) and ours[LABEL].std() > 0.05  # torch's default range
    if stage == "interpolation":
        assert not ours["model.learned_mask"].any()
        assert np.abs(ours[FIRST]).max() <= 1 / 9
    assert any(all(key in note for key in drawn) and "drawn at random" in note for note in found.notes)
    # The pixel loss decodes with SVD's own decoder.
    decoder = dict(to_torch(part_table(weights.VAE, ("decoder",)), found.frozen))
    assert found.vae.latent_scale == 0.18215 and all(np.array_equal(value, theirs[key]) for key, value in decoder.items())


def test_svd_start_refuses_what_is_not_svd(svd, tmp_path):
    wide = dataclasses.replace(weights.STAGES["keyframe"].unet, context_dim=48)
    config = TrainConfig(stage=dataclasses.replace(weights.STAGES["keyframe"], unet=wide), init=tiny.start_from("svd", svd["file"]))
    with pytest.raises(KeySyncError, match=r"does not fit the recipe: \d+ tensors of the wrong shape: .*attn2.to_k.weight is .*32"):
        trainable_of(config).initial_weights()
    heads = dataclasses.replace(weights.STAGES["keyframe"].unet, num_head_channels=16)
    config = TrainConfig(stage=dataclasses.replace(weights.STAGES["keyframe"], unet=heads), init=tiny.start_from("svd", svd["folder"]))
    with pytest.raises(KeySyncError, match="attention heads of 32.*set it to 32"):
        trainable_of(config).initial_weights()
    hubert = weights.save_hf_encoder(tmp_path / "hubert", weights.HUBERT)
    with pytest.raises(KeySyncError, match="no U-Net of Stable Video Diffusion, but HuBERT"):
        trainable_of(dataclasses.replace(config, init=tiny.start_from("svd", hubert))).initial_weights()


def test_svd_also_starts_a_vae(svd):
    config = TrainConfig(model="vae", vae=weights.VAE, init=tiny.start_from("svd", svd["folder"]))
    found, theirs = trainable_of(config).initial_weights(), weights.svd_tensors()
    assert all(np.array_equal(value, theirs[key]) for key, value in to_torch(part_table(weights.VAE), found.params))
    with pytest.raises(KeySyncError, match=r"set --config.vae.base_channels=32 \(is 64\)"):
        trainable_of(dataclasses.replace(config, vae=dataclasses.replace(weights.VAE, base_channels=64))).initial_weights()


def test_model_start_is_the_model(model):
    trainable, notes = check.resolve(tiny.recipe(pixels=True, init=tiny.start_from("model", model)))
    config = trainable.config
    assert config.stage.latent_scale == tiny.SCALE and config.vae == tiny.VAE and "0.25 instead of 0.18215" in notes[0]
    found = trainable_of(config).initial_weights()
    stored = model_directory.load(model, complete=False)
    ours, theirs = whole(found, config.stage), stored.tensors("keyframe")
    assert all(np.array_equal(value, theirs[key]) for key, value in ours.items())
    # Frozen are the temporal layers and the decoder, trained is everything else.
    frozen = {name for name, _ in to_torch(part_table(config.stage), merge(found.params, found.frozen)) if sgm.is_frozen(name)}
    names = tiny.leaves(found.frozen)
    assert len([n for n in names if not n.startswith("first_stage_model")]) == len(frozen) > 0
    assert {n.split("/")[1] for n in names if n.startswith("first_stage_model")} == {"decoder"}
    abstract = trainable_of(config).abstract_weights()
    checked(found.params, abstract.params, "params")
    checked(found.frozen, abstract.frozen, "frozen")


def test_named_tensors_are_drawn_anew(model):
    init = dataclasses.replace(tiny.start_from("model", model), redraw=("^conditioner", r"label_emb\.0\.2"))
    found = trainable_of(tiny.recipe(init=init)).initial_weights()
    ours, theirs = whole(found, KEYFRAME), model_directory.load(model, complete=False).tensors("keyframe")
    wanted = AUDIO | {LABEL.replace("0.0.weight", "0.2.weight"), LABEL.replace("0.0.weight", "0.2.bias")}
    assert {key for key, value in ours.items() if not np.array_equal(theirs[key], value)} == wanted
    assert any("drawn at random" in note and all(key in note for key in wanted) for note in found.notes)
    for pattern, words in (("nothing_of_it", "found in no tensor's name"), ("attn2", "time_stack.*would stay random: freeze 'temporal'")):
        with pytest.raises(KeySyncError, match=words):
            trainable_of(tiny.recipe(init=dataclasses.replace(init, redraw=(pattern,)))).initial_weights()
    with pytest.raises(KeySyncError, match="no regular expression"):
        dataclasses.replace(init, redraw=("(",))


def test_model_start_refuses_another_network(model):
    narrow = dataclasses.replace(KEYFRAME, unet=dataclasses.replace(UNET, num_head_channels=32, context_dim=8))
    with pytest.raises(KeySyncError) as error:
        trainable_of(dataclasses.replace(tiny.recipe(init=tiny.start_from("model", model)), stage=narrow)).initial_weights()
    assert "--config.stage.unet.num_head_channels=16 (is 32), --config.stage.unet.context_dim=32 (is 8)" in str(error.value)
    assert "\n" not in str(error.value)


def test_interpolation_can_start_from_keyframes(model):
    config = tiny.recipe("interpolation", init=tiny.start_from("model", model))
    found = trainable_of(config).initial_weights()
    ours, theirs = whole(found, config.stage), model_directory.load(model, complete=False).tensors("keyframe")
    different = {key for key, value in ours.items() if key not in theirs or not np.array_equal(theirs[key], value)}
    assert different == {FIRST, "model.learned_mask"}
    assert FIRST in found.notes[1]


def test_run_start_takes_only_the_weights(model, tmp_path):
    first = tiny.recipe(pixels=True, init=tiny.start_from("model", model))
    tiny.save_run(tmp_path / "first", first, step=7, nudge=0.5)
    last, mean = (
        trainable_of(tiny.recipe(init=tiny.start_from("run", tmp_path / "first", ema=ema))).initial_weights() for ema in (False, True)
    )
    stored = checkpoints.Checkpoints(tmp_path / "first", read_only=True)
    for found, ema in ((last, False), (mean, True)):
        wanted = tiny.leaves(stored.weights(7, trainable_of(first).abstract_weights().params, ema=ema))
        got = tiny.leaves(found.params)
        assert wanted.keys() == got.keys() and all(np.array_equal(wanted[n], got[n]) for n in got)
    stored.close()
    name = "model/diffusion_model/out_2/bias"
    given = tiny.leaves(last.params)[name]
    close(given - tiny.leaves(mean.params)[name], 0.25, 2, scale=np.abs(given).max())
    assert "step 7" in last.notes[0] and "averaged" in mean.notes[0]
    # A stage that started from a run finds its VAE where that run found it.
    trainable, _ = check.resolve(tiny.recipe(pixels=True, init=tiny.start_from("run", tmp_path / "first")))
    assert trainable.config.vae == tiny.VAE
    for init, message in (
        (tiny.start_from("run", tmp_path / "first", step=8), "no checkpoint of step 8; there are 7|no checkpoint of step 8"),
        (tiny.start_from("run", tmp_path), "not a training run"),
    ):
        with pytest.raises(KeySyncError, match=message):
            trainable_of(tiny.recipe(init=init)).initial_weights()
    with pytest.raises(KeySyncError, match="trains a stage, this run a vae"):
        trainable_of(TrainConfig(model="vae", vae=tiny.VAE, init=tiny.start_from("run", tmp_path / "first"))).initial_weights()


def test_scratch_says_so():
    found = trainable_of(tiny.recipe()).initial_weights()
    assert "drawn at random, seed 23" in found.notes[0]
    assert len(found.notes) == 2 and "the temporal layers stay random: freeze 'temporal' holds them" in found.notes[1]
    assert len(trainable_of(tiny.recipe(freeze="none")).initial_weights().notes) == 1
    assert found.vae is None and not any("first_stage" in name for name in found.frozen)


def test_the_vae_decides_scale_and_size(model, tmp_path):
    trainable, notes = check.resolve(tiny.recipe(init=tiny.InitConfig(vae=str(model))))
    config = trainable.config
    assert config.stage.latent_scale == tiny.SCALE and len(notes) == 1
    assert check.resolve(config) == (trainable, [])  # nothing left to take
    large = dataclasses.replace(KEYFRAME, resolution=128)
    with pytest.raises(KeySyncError, match=r"resolution is 128, but latents of config.stage.latent_size=8 are 64 pixels"):
        check.resolve(dataclasses.replace(config, stage=large))
    with pytest.raises(KeySyncError, match="does not exist"):
        check.resolve(tiny.recipe(init=tiny.InitConfig(vae=str(tmp_path / "nowhere"))))
    # A run that goes on needs the VAE's directory no more.
    checkpoints.write_config(tmp_path / "run", to_dict(config))
    gone = tiny.recipe(pixels=True, init=tiny.InitConfig(vae=str(tmp_path / "nowhere")))
    with pytest.raises(KeySyncError, match="config.init.vae: .*nowhere does not exist"):
        check.resolve(gone, tmp_path / "run")  # it died before its first checkpoint: it begins again
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    again, _ = check.resolve(gone, tmp_path / "run")
    assert again.config.stage.latent_scale == tiny.SCALE and again.abstract_weights().vae == tiny.VAE
    # One that moved is the same; another is not.
    moved = tiny.write_model(tmp_path / "moved").path
    assert check.resolve(tiny.recipe(init=tiny.InitConfig(vae=str(moved))), tmp_path / "run")[0].config.vae == tiny.VAE
    other = tiny.write_model(tmp_path / "other", vae_config=dataclasses.replace(tiny.VAE, latent_scale=0.5)).path
    with pytest.raises(KeySyncError, match=r"other.* makes latents of scale 0.5, the run in .*run was trained at 0.25: another VAE; take"):
        check.resolve(tiny.recipe(init=tiny.InitConfig(vae=str(other))), tmp_path / "run")


def test_demo_is_the_bundled_model():
    bundled = model_directory.load(assets.bundled_model_path())
    recipe = train_config(recipes.load("demo_keyframe", ["--config.init.vae=demo", "--config.init.kind=model", "--config.init.path=demo"]))
    config = check.resolve(recipe)[0].config
    assert config.stage.latent_scale == bundled.vae.latent_scale and config.init.vae == config.init.path == "demo"
    whole = merge(*trainable_of(config).initial_weights()[:2])
    assert tiny.leaves(whole)["model/diffusion_model/out_2/bias"].any()  # zero in a fresh network
    vae = train_config(recipes.load("demo_vae", ["--config.init.kind=model", "--config.init.path=demo", "--config.data.datasets=x"]))
    assert trainable_of(vae).initial_weights().notes == (f"all parameters come from {assets.bundled_model_path()}/vae/model.safetensors",)


def test_pixel_loss_without_vae():
    with pytest.raises(KeySyncError, match="config.init.vae"):
        trainable_of(tiny.recipe(pixels=True)).initial_weights()


def test_data_of_another_scale_are_refused(tmp_path, model, monkeypatch):
    trainable, _ = check.resolve(tiny.recipe(dataset=write_dataset(tmp_path / "data"), init=tiny.InitConfig(vae=str(model))))
    reader = trainable.reader()
    trainable.check_data(reader)  # a dataset that does not say is taken at its word
    monkeypatch.setattr(type(reader.stores[0]), "info", lambda self, column: {"scale": 0.18215})
    with pytest.raises(KeySyncError, match=r"data holds latents at scale 0.18215, the stage works at 0.25"):
        trainable.check_data(reader)


def test_runs_are_recognised(model, tmp_path):
    assert not runs.is_run(model) and not runs.is_run(tmp_path) and not runs.is_run("hub:a/b")
    assert runs.last_step(tmp_path) is None
