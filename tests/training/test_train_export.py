"""`keysync export` of training runs: everything arrives, what was frozen is untouched, and what does not belong together is refused."""

import dataclasses
import io
import json
import sys

import jax
import numpy as np
import pytest
import tiny_starts as tiny
from bounds import close
from rich.console import Console
from tiny import KEYFRAME, MELS

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.converters import model_directory, safetensors_file, sgm, torch_file
from keysync_jax.converters.lazy import Tensors
from keysync_jax.converters.parts import Part, part_table
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare.groups import plan_features
from keysync_jax.data_pipeline.prepare.settings import Output
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset
from keysync_jax.models.vae import VAE, sample_posterior
from keysync_jax.training.config import DataConfig, TrainConfig
from keysync_jax.training.export import model_card
from keysync_jax.training.export.export_run import ExportOptions, export, parse_steps
from keysync_jax.training.loop import train
from keysync_jax.training.start import check, runs, vae_scale
from keysync_jax.training.store import checkpoints, jsonl
from keysync_jax.training.trainables import read_run, trainable_of

NAME = "model/diffusion_model/out_2/bias"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("origin") / "model", "keyframe", "interpolation").path


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """Two real updates of the keyframe stage, pixel loss and averages included, from the model directory."""
    folder = tmp_path_factory.mktemp("runs")
    dataset = tiny.write_frames(folder / "data")
    config = check.resolve(tiny.recipe(dataset=dataset, pixels=True, init=tiny.start_from("model", model)))[0].config
    assert train(config, str(folder / "keyframe")) == 2
    return folder / "keyframe"


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run as a model directory, last weights."""
    path = tmp_path_factory.mktemp("exported") / "model"
    export([run], path)
    return model_directory.load(path, complete=False)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    synth_dataset(2, folder / "talkers", SynthSettings(seed=3, frames=30, size=tiny.SIZE), quiet=True)
    return folder / "talkers" / "manifest.csv"


@pytest.fixture(scope="module")
def vae_run(model, talkers, tmp_path_factory):
    config = TrainConfig(
        model="vae", vae=dataclasses.replace(tiny.VAE, latent_scale=1.0), resolution=tiny.SIZE, init=tiny.start_from("model", model),
        data=DataConfig(datasets=(str(talkers),), batch_size=2),
    )  # fmt: skip
    return tiny.save_run(tmp_path_factory.mktemp("vae_run") / "vae", config, step=3, nudge=0.01)


def test_pytorch_file_has_every_tensor_and_no_other(run, model, tmp_path):
    export([run], tmp_path / "pt", ExportOptions(format="keysync"))
    state = Tensors(torch_file.load(tmp_path / "pt" / "keyframe_dub.pt")["module"], "exported")
    table = [*part_table(KEYFRAME), *part_table(tiny.VAE, ("decoder",))]
    missing, unexpected = {e.torch_key for e in table} - set(state), set(state) - {e.torch_key for e in table}
    assert not missing and not unexpected
    assert all(state[e.torch_key].shape == e.torch_shape for e in table)
    # Frozen tensors are bit for bit those that the run began with, everything else was trained.
    before = model_directory.load(model, complete=False).tensors("keyframe")
    for key in state:
        frozen = sgm.is_frozen(key) or key.startswith("first_stage_model.")
        if key.startswith("model.diffusion_model.") and not sgm.is_frozen(key) and before[key].ndim > 1:
            assert not np.array_equal(state[key], before[key]), key
        if frozen:
            assert (state[key].dtype, state[key].tobytes()) == (before[key].dtype, before[key].tobytes()), key


def test_diffusers_folder(tmp_path):
    # diffusers' decoder has two blocks a level.
    model = tiny.write_model(tmp_path / "model", "keyframe", vae_config=dataclasses.replace(tiny.VAE, num_res_blocks=2))
    tiny.save_run(tmp_path / "run", tiny.recipe(init=tiny.start_from("model", model.path)))
    export([tmp_path / "run"], tmp_path / "svd", ExportOptions(format="diffusers"))
    names = {p.name for p in (tmp_path / "svd" / "keyframe").iterdir()}
    assert {"unet", "vae", "keysync.safetensors"} <= names
    audio = safetensors_file.read(tmp_path / "svd" / "keyframe" / "keysync.safetensors")
    assert set(audio) == {"conditioner.embedders.2.linear.weight", "conditioner.embedders.2.linear.bias"}


def test_model_directory_of_a_run(run, exported, model):
    origin = model_directory.load(model, complete=False)
    assert set(exported.parts) == {"keyframe", "vae", "audio/log_mel"}
    assert exported.stage("keyframe").latent_scale == exported.vae.latent_scale == tiny.SCALE
    assert exported.audio("log_mel").hidden_size == exported.audio("log_mel").num_mels == MELS
    vae, ours = origin.tensors("vae"), exported.tensors("vae")
    assert all(np.array_equal(vae[key], ours[key]) for key in vae)
    assert exported.index["sources"] == [{"part": "keyframe", "run": "keyframe", "step": 2, "weights": "last"}]
    # A further run can start from it.
    again = trainable_of(tiny.recipe(init=tiny.start_from("model", exported.path))).initial_weights()
    assert "come from" in again.notes[0] and len(again.notes) == 2 and "latent_scale" in again.notes[1]


def test_a_run_that_began_from_a_run_finds_that_ones_vae(run, exported, tmp_path):
    config = tiny.recipe(init=tiny.start_from("run", run))
    second = tiny.save_run(tmp_path / "second", config, step=1, nudge=0.01)
    export([second], tmp_path / "out")
    out = model_directory.load(tmp_path / "out", complete=False)
    assert set(out.parts) == {"keyframe", "vae", "audio/log_mel"}
    ours, theirs = out.tensors("vae"), exported.tensors("vae")
    assert all(np.array_equal(theirs[key], ours[key]) for key in theirs)


def test_averages_and_steps_differ(run, exported, tmp_path):
    export([run], tmp_path / "ema", ExportOptions(ema=True, dtype="float16"))
    export([run], tmp_path / "first", ExportOptions(steps=parse_steps(["keyframe=1"])))
    ema, first = (model_directory.load(tmp_path / name, complete=False) for name in ("ema", "first"))
    kinds = {info.dtype for _, info in ema.tensors("keyframe").lazy_items()}
    assert kinds == {np.dtype(np.float16)}
    last = exported.tensors("keyframe")
    for other in (ema.tensors("keyframe"), first.tensors("keyframe")):
        for key in last:
            same = np.array_equal(np.asarray(last[key], np.float16), np.asarray(other[key], np.float16))
            if sgm.is_frozen(key) or key.startswith("first_stage_model."):
                assert same, key
            elif key.endswith("out.2.weight"):
                assert not same, key
    assert ema.index["sources"][0]["weights"] == "ema" and first.index["sources"][0]["step"] == 1


def test_several_runs_make_one_directory(run, model, tmp_path):
    other = tiny.recipe("interpolation", init=tiny.start_from("model", model))
    tiny.save_run(tmp_path / "interpolation", other, nudge=0.1)
    export([run, tmp_path / "interpolation"], tmp_path / "both", ExportOptions(steps=parse_steps(["keyframe=2"])))
    both = model_directory.load(tmp_path / "both")  # complete: it can dub
    assert [*both.parts] == ["keyframe", "interpolation", "vae", "audio/log_mel"]
    before = model_directory.load(model, complete=False).params("interpolation")
    initial_leaf = tiny.leaves(before)[NAME]
    close(tiny.leaves(both.params("interpolation"))[NAME] - initial_leaf, 0.1, 2, scale=np.abs(initial_leaf).max() + 0.1)
    # A model directory gives what the runs do not.
    with pytest.raises(UsageError, match="both hold keyframe"):
        export([run, model], tmp_path / "twice")
    with pytest.raises(UsageError, match="both hold keyframe"):
        export([run, run], tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_another_vae_is_refused(run, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=9)
    with pytest.raises(KeySyncError, match=r"the keyframe run .*keyframe was trained with another VAE than that of .*other"):
        export([run, other.path], tmp_path / "out")
    # Of other sizes; and one whose decoder has the same tensors, but for the temporal ones.
    for name, changes, words in (
        ("wide", {"channel_mult": (1, 2, 1, 1)}, "expected"), ("image", {"decoder": "image"}, r"its decoder has \d+ tensors, not \d+"),
    ):  # fmt: skip
        other = tiny.write_model(tmp_path / name, vae_config=dataclasses.replace(tiny.VAE, **changes))
        with pytest.raises(
            KeySyncError, match=f"trained with another VAE than that of .*{name} \\(.*{words}.*give the one in its init.vae"
        ):
            export([run, other.path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_vae_run_is_measured_and_prepare_takes_it(vae_run, tmp_path):
    said = io.StringIO()
    export([vae_run], tmp_path / "vae", ExportOptions(scale_frames=32), console=Console(file=said, width=200))
    assert "measuring the latent scale" in said.getvalue() and "100%" in said.getvalue()
    export([vae_run], tmp_path / "again", ExportOptions(scale_frames=32))
    directory, again = (model_directory.load(tmp_path / name, complete=False) for name in ("vae", "again"))
    scale = directory.vae.latent_scale
    assert scale == again.vae.latent_scale and scale != 1.0 and f"{scale:.5g}" == repr(scale)
    # Scaled latents of the run's frames have unit variance, by another route than the export's.
    config = TrainConfig(model="vae", vae=tiny.VAE, resolution=tiny.SIZE, data=DataConfig(datasets=_videos(vae_run)))
    images = np.concatenate(list(vae_scale.training_images(config, 32)))
    mean, logvar = VAE(directory.vae).apply({"params": directory.params("vae")}, images, method="encode_moments")
    z = sample_posterior(mean, logvar, jax.random.normal(jax.random.key(1), mean.shape))
    assert abs(float(np.std(np.asarray(z) * scale)) - 1) < 0.1  # random weights have wide posteriors: two draws differ by some per cent
    plan = plan_features(str(tmp_path / "vae"), Output(columns=()), tiny.SIZE)
    assert plan.groups[0].info["latent"]["scale"] == scale and list(plan.encoders) == ["log_mel"]
    assert plan.encoders["log_mel"].hidden_size == 80


def _videos(workdir):
    return tuple(json.loads((workdir / "config.json").read_text())["data"]["datasets"])


def test_vae_beside_stages_has_their_scale(run, vae_run, model, tmp_path):
    # The decoder of the pixel loss is not that of the VAE run, which went on training.
    with pytest.raises(KeySyncError, match="another VAE"):
        export([vae_run, run], tmp_path / "out")
    same = TrainConfig(model="vae", vae=tiny.VAE, resolution=tiny.SIZE, init=tiny.start_from("model", model))
    tiny.save_run(tmp_path / "same", same)
    export([tmp_path / "same", run], tmp_path / "out")
    assert model_directory.load(tmp_path / "out", complete=False).vae.latent_scale == tiny.SCALE


def test_options_of_a_vae_run(vae_run, tmp_path):
    export([vae_run], tmp_path / "given", ExportOptions(latent_scale=0.5, log_mel=24))
    directory = model_directory.load(tmp_path / "given", complete=False)
    assert directory.vae.latent_scale == 0.5 and directory.audio("log_mel").hidden_size == 24
    config = json.loads((vae_run / "config.json").read_text())
    gone = tmp_path / "gone"
    gone.mkdir()
    (gone / "checkpoints").symlink_to(vae_run / "checkpoints")
    config["data"]["datasets"] = [str(tmp_path / "nowhere.csv")]
    (gone / "config.json").write_text(json.dumps(config))
    with pytest.raises(KeySyncError, match="nowhere.csv does not exist"):
        export([gone], tmp_path / "unmeasured")
    assert not (tmp_path / "unmeasured").exists()


def test_the_command_tells_apart_what_can_be_no_source(model, tmp_path, capsys):
    from keysync_jax.cli.main import main

    for source, status, words in (
        (model, 2, "--format is needed to export a model directory"),
        ("hub:owner/name", 2, "--format is needed to export a model directory"),
        ("demo", 2, "--format is needed to export a model directory"),  # the bundled one
        (tmp_path, 1, "is neither a training run nor a model directory"),
        (tmp_path / "none", 1, "none does not exist; name the workdir of a run or a model directory"),
    ):
        assert main(["export", str(source), "-o", str(tmp_path / "out")]) == status
        assert words in capsys.readouterr().err


def test_what_is_not_there(run, vae_run, model, tmp_path):
    for sources, options, message in (
        ([run], ExportOptions(steps={"": 7}), "no checkpoint of step 7; there are 1, 2"),
        ([vae_run], ExportOptions(ema=True), "no averaged weights"),
        ([tmp_path], ExportOptions(), "neither a training run nor a model directory"),
        ([model], ExportOptions(latent_scale=0.3), "--latent-scale is for a VAE run"),
    ):
        with pytest.raises(KeySyncError, match=message) as error:
            export(sources, tmp_path / "out", options)
        assert "\n" not in str(error.value)
    for words in (["keyframe"], ["x=2"], ["=3.5"]):
        with pytest.raises(UsageError, match="--step"):
            ExportOptions(steps=parse_steps(words))
    assert not (tmp_path / "out").exists()


def test_check_also_opens_what_the_loss_and_the_log_need(run, tmp_path, monkeypatch):
    config = runs.read_config(run)
    loss = dataclasses.replace(config.loss, pixel_losses=("l2", "lpips"))
    for folder, words in (("", "the LPIPS term needs weights"), (str(tmp_path / "none"), "none holds no weights of LPIPS")):
        with pytest.raises(KeySyncError, match=words):
            check.describe(dataclasses.replace(config, loss=loss, lpips=folder), tmp_path / "new")
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UsageError, match="wandb is not installed; pip install wandb"):
        check.describe(dataclasses.replace(config, log=dataclasses.replace(config.log, wandb=True)), tmp_path / "new")
    assert check.describe(config, tmp_path / "new")[-1].endswith("2 steps of 1 samples")


def test_an_encoder_of_other_tokens_is_not_dragged_along(tmp_path):
    """A VAE's directory may hold the encoder of another model, as the bundled one does."""
    config = AudioEncoderConfig(kind="log_mel", hidden_size=24, num_mels=24)
    other = model_directory.save(tmp_path / "other", [tiny.vae_part(), Part("audio/log_mel", config, Tensors({}, "log_mel"))])
    run = tiny.save_run(tmp_path / "run", tiny.recipe(init=tiny.InitConfig(vae=str(other.path))))
    for options in (ExportOptions(), ExportOptions(log_mel=MELS, force=True)):
        export([run], tmp_path / "out", options)
        made = model_directory.load(tmp_path / "out", complete=False)
        assert made.audio("log_mel").hidden_size == MELS and "vae" in made.parts
    with pytest.raises(KeySyncError) as error:  # what is asked for and cannot be names the run, not the output
        export([run], tmp_path / "none", ExportOptions(log_mel=16))
    assert str(error.value) == f"{run}: audio/log_mel gives 16 features per token, but the keyframe stage reads {MELS}"


def test_options_that_no_source_heeds_are_refused(run, vae_run, model, tmp_path):
    for sources, options, message in (
        ([run], dict(steps={"interpolation": 2}), "--step interpolation=…: no source is a run of that part, but of keyframe"),
        ([model], dict(steps={"": 2}), "--step and --ema choose among the checkpoints of a run, and .*model is none"),
        ([model], dict(ema=True, format="keysync"), "--step and --ema"),
        ([model], dict(log_mel=80, format="keysync"), "--log-mel and --latent-scale are for model directories"),
        ([run], dict(stages=["interpolation"]), "--stage, --vae-copies and --container are for PyTorch formats"),
        ([run], dict(vae_copies=True), "are for PyTorch formats"),
    ):
        with pytest.raises(UsageError, match=message):
            export(sources, tmp_path / "out", ExportOptions(**options))
    with pytest.raises(UsageError, match="--log-mel is 0; it counts mel bands"):
        ExportOptions(log_mel=0)
    with pytest.raises(UsageError, match="--step 3: there is --step 2 already"):
        parse_steps(["2", "3"])
    with pytest.raises(UsageError, match="--step vae=3: there is --step vae=2 already"):
        parse_steps(["vae=2", "keyframe=4", "vae=3"])
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_found_before_the_weights_are_read(run, model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    monkeypatch.setattr(runs, "read_weights", lambda *_: pytest.fail("the weights were read"))
    for options in (dict(), dict(format="keysync"), dict(format="diffusers", force=True)):
        with pytest.raises(KeySyncError, match="out (is not empty|holds other files than ours)"):
            export([run], tmp_path / "out", ExportOptions(**options))
    with pytest.raises(KeySyncError, match="missing does not exist; make the folder first"):
        export([run], tmp_path / "missing" / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


def test_errors_name_the_sources_and_no_temporary_folder(vae_run, tmp_path):
    with pytest.raises(KeySyncError) as error:
        export([vae_run], tmp_path / "out", ExportOptions(format="keysync", latent_scale=0.5))
    assert f"model directory {vae_run} has no stage to export" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_weights_that_changed_on_the_disk_are_not_exported(model, tmp_path):
    run = tiny.save_run(tmp_path / "run", tiny.recipe(init=tiny.start_from("model", model)), step=3)
    sums = run / "checkpoints" / "3" / "checksums" / "metadata"
    values = json.loads(sums.read_text())
    name = next(iter(values["params"]))
    values["params"][name] ^= 1
    sums.write_text(json.dumps(values))
    with pytest.raises(KeySyncError, match=f"checkpoint 3 of .* cannot be read: params is not what was saved: {name}"):
        export([run], tmp_path / "out")


def test_card_tells_data_steps_metrics_and_terms(run, exported):
    model_card.record_command(run, "keysync train --config tiny --workdir x", "2026-01-01T00:00:00")
    jsonl.JsonLines(run / "metrics.jsonl").add({"step": 2, "val/loss": 0.25, "device_peak_gib": 93.1, "clips_per_s": 21.0})
    card = model_card.text("lips", exported, [read_run(run)], model_card.CardOptions(licence="apache-2.0"))
    recipe = json.loads(open(f"{exported.path}/training/keyframe/config.json").read())
    told = [
        "license: apache-2.0", "data: data (split train)", "steps: 2 of 2, batch 1, seed 23", "start: model (model)", "| loss |",
        "Initialised from another model, whose terms apply", "keysync train --config tiny --workdir x", "| keyframe |",
    ]  # fmt: skip
    for words in (*told, "| val/loss | 0.25 | 2 |"):
        assert words in card, words
    assert "peak_gib" not in card and "per_s" not in card  # how it went, not what came of it
    # Nothing about where on this machine things lay is published.
    assert str(run.parent) not in card + json.dumps(recipe) and recipe["data"]["datasets"] == ["data"]


class Hub:
    """Stands in for `huggingface_hub.HfApi`: the calls and signatures that a push uses."""

    calls: list = []
    error: Exception | None = None

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append(("create", repo_id, repo_type, private, exist_ok))

    def create_branch(self, repo_id, *, branch, exist_ok):
        self.calls.append(("branch", repo_id, branch))

    def upload_folder(self, *, repo_id, folder_path, repo_type, revision, commit_message):
        import pathlib

        files = sorted(str(p.relative_to(folder_path)) for p in pathlib.Path(folder_path).rglob("*") if p.is_file())
        self.calls.append(("upload", repo_id, revision, files))
        return f"https://hub.example/{repo_id}/commit/1"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setattr(Hub, "error", None)
    return Hub


def test_stand_in_has_the_real_signatures():
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "create_branch", "upload_folder"):
        real, ours = (set(inspect.signature(getattr(api, name)).parameters) for api in (HfApi, Hub))
        assert ours <= real, name


def test_push_uploads_the_directory_with_its_card(hub, run, tmp_path, capsys):
    from keysync_jax.cli.main import main

    words = ["export", str(run), "-o", str(tmp_path / "lips"), "--push", "hub:someone/lips@v1", "--private", "--licence", "mit"]
    assert main(words) == 0
    assert hub.calls[:2] == [("create", "someone/lips", "model", True, True), ("branch", "someone/lips", "v1")]
    kind, repo, revision, files = hub.calls[2]
    assert (kind, repo, revision) == ("upload", "someone/lips", "v1")
    assert {"README.md", "model_index.json", "keyframe/model.safetensors", "training/keyframe/config.json"} <= set(files)
    assert "license: mit" in (tmp_path / "lips" / "README.md").read_text()
    assert "https://hub.example/someone/lips/commit/1" in capsys.readouterr().out


def test_nothing_is_pushed_when_the_export_fails(hub, run, tmp_path, capsys):
    from keysync_jax.cli.main import main

    assert main(["export", str(run), "--step", "9", "-o", str(tmp_path / "out"), "--push", "hub:someone/lips"]) == 1
    assert hub.calls == []
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--push", "someone/lips"]) == 2  # found before any work
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--push", "hub:someone/lips/inside"]) == 2
    assert not (tmp_path / "out").exists() and hub.calls == []
    hub.error = OSError("401 Client Error\n\nInvalid username or password.")
    capsys.readouterr()
    assert main(["export", str(run), "-o", str(tmp_path / "out"), "--push", "hub:someone/lips"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(errors) == 1 and "cannot push to hub:someone/lips: 401 Client Error" in errors[0]


def test_the_card_names_no_local_folders():
    command = "keysync train --config keyframe --workdir /home/me/runs/k --config.data.datasets=/data/a,/data/b --config.num_steps=5"
    wanted = "keysync train --config keyframe --workdir k --config.data.datasets=a,b --config.num_steps=5"
    assert model_card._public_command(command) == wanted


def test_a_checkpoint_that_makes_way_while_it_is_read(run, monkeypatch):
    """A training at work removes its oldest checkpoint once a newer one is written."""
    steps = iter([99, 2])
    monkeypatch.setattr(checkpoints.Checkpoints, "latest", lambda self: next(steps))
    assert read_run(run).step == 2
    with pytest.raises(KeySyncError, match="no checkpoint of step 99"):
        read_run(run, step=99)
    monkeypatch.setattr(checkpoints.Checkpoints, "latest", lambda self: 99)
    with pytest.raises(KeySyncError, match="no checkpoint of step 99"):  # nothing newer came: no endless trying
        read_run(run)
