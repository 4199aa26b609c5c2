"""`keysync train` and `keysync export` from the command line: bad input is one clear line with the right exit status."""

import json

import numpy as np
import pytest
import tiny_starts as tiny
from tiny import MELS
from tiny_runs import write_dataset

from keysync_jax.cli.main import main
from keysync_jax.config import to_dict
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.core.locking import only_process
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.training import loop, recipes
from keysync_jax.training.config import train_config
from keysync_jax.training.start import runs
from keysync_jax.training.store import checkpoints


@pytest.fixture
def keysync(capsys):
    """Runs the command; returns (exit status, the one error line or "", what was printed)."""

    def run(*words):
        try:
            status = main([str(w) for w in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        out, error = capsys.readouterr()
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if ": error:" in line]
        assert len(lines) == (status != 0), error
        return status, "".join(lines), out

    return run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("cli") / "data")


@pytest.fixture(scope="module")
def recipe_file(dataset, tmp_path_factory):
    """The tiny recipe as a run's config.json, which `--config` takes too."""
    path = tmp_path_factory.mktemp("recipe") / "config.json"
    path.write_text(json.dumps(to_dict(tiny.recipe(dataset=dataset))))
    return path


def train(recipe_file, workdir, *overrides, more=()):
    return ("train", "--config", recipe_file, "--workdir", workdir, *more, *(f"--config.{o}" for o in overrides))


def test_check_says_what_would_happen_and_does_nothing(keysync, recipe_file, tmp_path):
    status, _, out = keysync(*train(recipe_file, tmp_path / "run", more=["--check"]))
    assert status == 0 and "drawn at random, seed 23" in out and "parameters are trained" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "status", "words"),
    [
        (["data.batchsize=3"], 2, "config has no key 'data.batchsize'; there are allow_mismatch, batch_size, box_jitter"),
        (["num_steps=many"], 2, "config key 'num_steps' is 2; 'many' is no int"),
        (["optimizer=3"], 2, "'optimizer' is a section; set one of optimizer.accumulate"),
        (["num_steps"], 2, "write --config.num_steps=VALUE"),
        (["optimizer.ema_decay=1.5"], 1, "optimizer.ema_decay is 1.5"),
        (["data.datasets=()"], 2, "config.data.datasets is empty"),
        (["data.datasets=nowhere"], 1, "nowhere"),
        (["stage.audio_encoder=hubert"], 1, "holds no tokens of audio encoder 'hubert'; it has log_mel"),
        (["stage.audio_feature_dim=9"], 1, "log_mel tokens have 8 numbers, the stage expects 9"),
        (["stage.latent_size=16"], 1, "has latents of (8, 8), the stage is for (16, 16)"),
        (["data.columns=valence"], 2, "no key 'data.columns'"),
        (["loss.pixel_weight=1.0"], 1, "the pixel loss decodes frames: name a model directory with a VAE in config.init.vae"),
        (["init.kind=svd"], 1, "init.kind 'svd' needs init.path"),
        (["init.kind=svd", "init.path=nowhere"], 1, "config.init.path: nowhere does not exist; name Stable Video Diffusion there"),
        (["init.kind=model", "init.path=nowhere"], 1, "config.init.path: nowhere does not exist; name a model directory there"),
        (["init.kind=run", "init.path=nowhere"], 1, "config.init.path: nowhere does not exist; name the workdir of a run there"),
        (["init.kind=run", "init.path=."], 1, ". is not a training run"),
        (["init.vae=nowhere"], 1, "config.init.vae: nowhere does not exist; name a model directory with a VAE there"),
        (["mesh.data=3", "mesh.fsdp=7"], 1, "mesh"),
        (["optimizer.b1=1.5"], 1, "optimizer.b1 is 1.5; it must lie in [0, 1)"),
        (["optimizer.eps=-1.0"], 1, "optimizer.eps is -1.0"),
        (["optimizer.weight_decay=-1.0"], 1, "optimizer.weight_decay is -1.0"),
        (["optimizer.learning_rate=1e999"], 1, "optimizer.learning_rate is inf"),
        (["stage.latent_scale=0.0"], 1, "stage.latent_scale is 0.0"),
        (["checkpoint.keep_every=-1"], 1, "checkpoint.keep_every is -1"),
        (["log.validation_batches=-1"], 1, "log.validation_batches is -1"),
        (["log.samples=-1"], 1, "log.samples is -1"),
        (["log.sample_steps=5"], 1, "log.sample_steps is 5; the noise schedule has at least 10"),
        (["seed=-1"], 1, "seed is -1"),
        (["seed=4294967296"], 1, "seed is 4294967296; choose one from 0 to 4294967295"),
        (["noise.p_mean=1e999"], 1, "noise.p_mean is inf"),
        (["noise.p_std=1e999"], 1, "noise.p_std is inf"),
        (["init.step=4"], 1, "init.step and init.ema are of a run to start from, and init.kind is 'scratch'"),
        (["init.ema=true"], 1, "init.step and init.ema are of a run"),
        (["stage.unet.video_kernel_size=2,1,1"], 1, "UNetConfig.video_kernel_size is (2, 1, 1); temporal kernels are (k, 1, 1) with odd k"),
        (["stage.unet.video_kernel_size=3"], 1, "UNetConfig.video_kernel_size is (3,)"),
        (["vae.video_kernel_size=3,3,3"], 1, "VAEConfig.video_kernel_size is (3, 3, 3)"),
        (["stage.unet.attention_resolutions=3"], 1, "UNetConfig.attention_resolutions is (3,), but the levels downsample by 1:"),
        (["loss.pixel_weight=1.0", "loss.pixel_losses=()"], 1, "loss.pixel_losses is empty"),
        (["model=vae", "resolution=65"], 1, "resolution is 65; the VAE needs a multiple of"),
        (["model=vae", "data.crop=9"], 1, "data.crop is 9; the VAE needs a multiple of"),
        (["vae.latent_channels=0"], 1, "VAEConfig.latent_channels is 0; it must be at least 1"),
        (["stage.latent_size=0"], 1, "StageConfig.latent_size is 0; it must be at least 1"),
        (["stage.audio_feature_dim=0"], 1, "StageConfig.audio_feature_dim is 0"),
        (["stage.unet.channel_mult=0"], 1, "UNetConfig.channel_mult is (0,); it must be at least 1"),
        (["stage.unet.channel_mult=()"], 1, "UNetConfig.channel_mult is ()"),
        (["stage.unet.norm_groups=0"], 1, "UNetConfig.norm_groups is 0"),
        (["stage.unet.num_head_channels=0"], 1, "UNetConfig.num_head_channels is 0"),
        (["stage.unet.num_res_blocks=-1"], 1, "UNetConfig.num_res_blocks is -1"),
        (["loss.lower_weight=-1.0"], 1, "loss.lower_weight is -1.0"),
        (["optimizer.warmup_start=-5.0"], 1, "optimizer.warmup_start is -5.0"),
        (["attention=foo"], 1, "attention is 'foo'; choose one of auto, xla, cudnn, splash"),
        (["data.threads=-1"], 1, "data.threads is -1"),
        (["data.workers=-1"], 1, "data.workers is -1"),
        (["data.prefetch=0"], 1, "data.prefetch is 0; it must be at least 1"),
        (["stage.mask.nose_index=99"], 1, "stage.mask.nose_index is 99"),
    ],
)
def test_bad_recipes(overrides, status, words, keysync, recipe_file, tmp_path):
    found, line, _ = keysync(*train(recipe_file, tmp_path / "run", *overrides, more=["--check"]))
    assert (found, words in line) == (status, True), line


@pytest.mark.parametrize(
    "wrong", ["init.vae=nowhere", "loss.pixel_weight=1.0", "data.datasets=nowhere", "stage.audio_feature_dim=9", "data.batch_size=0"]
)
def test_a_run_that_cannot_begin_leaves_no_workdir(wrong, keysync, recipe_file, tmp_path):
    assert keysync(*train(recipe_file, tmp_path / "run", wrong))[0] in (1, 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mesh.data=3"], "mesh"),
        (["mesh.fsdp=2", "mesh.data=1"], "mesh"),
        (["data.batch_size=3", "optimizer.accumulate=2"], "3 is not a multiple of optimizer.accumulate 2"),
    ],
)
def test_meshes_that_do_not_fit(overrides, words, keysync, recipe_file, tmp_path):
    status, line, _ = keysync(*train(recipe_file, tmp_path / "run", *overrides))
    assert status in (1, 2) and words in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--profile_steps", "10"], "--profile_steps '10' is not A:B"),
        (["--profile_steps", "10:10"], "0 <= A < B"),
        (["--profile_steps", "1:3"], "--profile_steps 1:3: the run ends with step 2"),
        (["--coordinator", "localhost:1234"], "--num-processes"),
    ],
)
def test_bad_options(more, words, keysync, recipe_file, tmp_path):
    status, line, _ = keysync(*train(recipe_file, tmp_path / "run", more=more))
    assert status == 2 and words in line


def test_a_workdir_that_is_a_file(keysync, recipe_file, tmp_path):
    (tmp_path / "file").write_text("mine")
    for more in ([], ["--check"]):
        status, line, _ = keysync(*train(recipe_file, tmp_path / "file", more=more))
        assert status == 1 and "file is a file; name a folder" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_without_a_name(keysync, recipe_file, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    status, line, _ = keysync(*train(recipe_file, ""))  # a variable that was not set
    assert status == 2 and "--workdir is empty; name a folder" in line and not any((tmp_path / "here").iterdir())


def test_unknown_recipe(keysync, tmp_path):
    status, line, _ = keysync("train", "--config", "keyfrme", "--workdir", tmp_path)
    assert status == 2 and "no recipe 'keyfrme'; shipped ones are" in line
    (tmp_path / "broken.json").write_text("{")
    status, line, _ = keysync("train", "--config", tmp_path / "broken.json", "--workdir", tmp_path)
    assert status == 1 and "broken.json cannot be read" in line
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    status, line, _ = keysync("train", "--config", tmp_path / "broken.py", "--workdir", tmp_path)
    assert status == 1 and "broken.py, line 1" in line


def test_checkpoint_of_another_model(keysync, recipe_file, tmp_path):
    config = train_config(recipes.load(str(recipe_file), ["--config.stage.unet.num_head_channels=32"]))
    tiny.save_run(tmp_path / "run", config)
    status, line, _ = keysync(*train(recipe_file, tmp_path / "run"))
    assert status == 1 and "of another model" in line and "stage.unet.num_head_channels 32 -> 16" in line


def test_another_training_in_the_workdir(keysync, recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_SECONDS_TO_LEAVE", 0)
    with only_process(str(tmp_path / "run"), ""):
        status, line, _ = keysync(*train(recipe_file, tmp_path / "run", "log.tensorboard=True"))
    assert status == 1 and "another training is at work in" in line and "give another --workdir" in line
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock"}  # nothing of the other run is touched


def test_nan_in_a_record(keysync, recipe_file, tmp_path, monkeypatch):
    original = FrameStore._reader

    def reader(self, group, split):
        found = original(self, group, split)
        monkeypatch.setattr("keysync_jax.data_pipeline.source.clips._finite", lambda value: not (np.asarray(value).shape == (2, MELS)))
        return found

    monkeypatch.setattr(FrameStore, "_reader", reader)
    status, line, _ = keysync(*train(recipe_file, tmp_path / "run"))
    assert status == 1 and "'audio_log_mel' is not finite; prepare the clip again" in line and "clip 'c" in line


def test_lists_and_numbers_on_the_command_line(recipe_file):
    def value(*overrides):
        return train_config(recipes.load(str(recipe_file), [f"--config.{o}" for o in overrides])).data

    assert value("data.datasets=one").datasets == ("one",)
    assert value("data.datasets=one,gs://b/two").datasets == ("one", "gs://b/two")
    assert value("data.datasets=a,b", "data.weights=0.25,1").weights == (0.25, 1.0)
    assert value('data.datasets=("x",)').datasets == ("x",)
    assert value("data.flip=true").flip is True
    assert value("data.batch_size=1e2").batch_size == 100
    assert value("data.min_scores={'quality': 0.5}").min_scores == {"quality": 0.5}
    assert value("data.split=2024").split == "2024"
    with pytest.raises(KeySyncError, match="datasets must hold str values, not 2024"):
        value("data.datasets=2024")
    with pytest.raises(UsageError, match="is no bool"):
        value("data.flip=1")


def test_export_of_a_run_that_has_not_saved(keysync, recipe_file, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoints.write_config(tmp_path / "run", json.loads(recipe_file.read_text()))
    assert runs.is_run(tmp_path / "run")
    status, line, _ = keysync("export", tmp_path / "run", "-o", tmp_path / "out")
    assert status == 1 and "has no checkpoint yet" in line
    for more in ([], ["--format", "model"], ["--format", "keysync"]):
        status, line, _ = keysync("export", tmp_path / "nowhere", *more, "-o", tmp_path / "out")
        assert status == 1 and "nowhere does not exist; name the workdir of a run or a model directory" in line


def test_export_of_a_model_directory_wants_a_format(keysync, tmp_path):
    path = tiny.write_model(tmp_path / "model", "keyframe").path
    status, line, _ = keysync("export", path, "-o", tmp_path / "out")
    assert status == 2 and "--format" in line
    status, _, _ = keysync("export", path, "-o", tmp_path / "out", "--format", "keysync", "--container", "safetensors")
    assert status == 0 and (tmp_path / "out" / "keyframe_dub.safetensors").exists()


@pytest.mark.parametrize("verb", ["train", "export"])
def test_help_shows_examples(verb, keysync):
    status, _, out = keysync(verb, "--help")
    assert status == 0 and out.count(f"keysync {verb}") >= 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from nowhere import x\n", "line 1: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    return y\n", "line 2: NameError: name 'y' is not defined"),
        ("def get_config():\n    return None\n", "get_config() returns NoneType; it must return an ml_collections.ConfigDict"),
    ],
)
def test_recipe_files_that_fail(text, words, keysync, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(text)
    status, line, _ = keysync("train", "--config", path, "--workdir", tmp_path / "run")
    assert status == 1 and str(path) in line and words in line


def test_a_finished_run_is_told_so_and_damage_is_named(keysync, recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    assert keysync(*train(recipe_file, run))[0] == 0
    before = (run / "config.json").read_text()
    last = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert main([str(w) for w in train(recipe_file, run, "num_steps=1")]) == 0
    assert f"nothing to do: step {last} is reached, the recipe asks for 1" in " ".join(capsys.readouterr().err.split())
    assert (run / "config.json").read_text() == before
    # A refused command is not the one that trained the model.
    assert keysync(*train(recipe_file, run, "stage.mask.kind=full", "num_steps=9"))[0] == 1
    assert len((run / "commands.jsonl").read_text().splitlines()) == 1
    status, line, _ = keysync(*train(recipe_file, run, "stage.mask.kind=full", "num_steps=9", more=["--check"]))
    assert status == 1 and "stage.mask.kind" in line

    for broken in (run / "checkpoints" / str(last) / "params").rglob("*"):
        if broken.is_file():
            broken.write_bytes(b"")
    status, line, _ = keysync(*train(recipe_file, run, "num_steps=9"))
    assert status == 1 and f"checkpoint {last} of {run} cannot be read" in line
    assert "remove a damaged one" in line or "there is no other one" in line
    (run / "config.json").write_text("")
    status, line, _ = keysync("export", run, "-o", tmp_path / "out")
    assert status == 1 and "config.json cannot be read" in line
    assert not (tmp_path / "out").exists()
