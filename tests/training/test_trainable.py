"""A kind of model from outside the library, trained by the real command; and the guard of the loop."""

from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import assert_equal_runs

from keysync_jax.cli.main import main
from keysync_jax.planning import recipe_plan
from keysync_jax.training import data, loop, recipes, trainables
from keysync_jax.training.config import train_config
from keysync_jax.training.start import check
from keysync_jax.training.watch.metrics import read_metrics

RECIPE = str(Path(__file__).parents[1] / "helpers" / "line_recipe.py")


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a recipe enters is gone after the test."""
    monkeypatch.setattr(trainables, "TRAINABLES", dict(trainables.TRAINABLES))


def _train(workdir, *settings):
    return main(["train", "--config", RECIPE, "--workdir", str(workdir), *(f"--config.{s}" for s in settings)])


def test_a_third_kind_of_model_is_trained_saved_and_continued(tmp_path, capsys, monkeypatch):
    assert _train(tmp_path / "run", "num_steps=2") == 0
    first = read_metrics(tmp_path / "run")
    said = capsys.readouterr().err
    assert "2 parameters are trained, 1 are frozen" in said and "validating on 64 points" in said and "points/s" in said
    assert _train(tmp_path / "run") == 0
    assert "continuing from step 2" in capsys.readouterr().err
    assert _train(tmp_path / "whole", "log.validate_every=0") == 0
    assert assert_equal_runs(tmp_path / "run", tmp_path / "whole", 4) > 6
    losses = {step: row["loss"] for step, row in read_metrics(tmp_path / "run").items()}
    assert losses == {step: row["loss"] for step, row in read_metrics(tmp_path / "whole").items()}
    rows = read_metrics(tmp_path / "run")
    assert first[2]["loss"] == losses[2] and 0 < rows[4]["val/loss"] < rows[2]["val/loss"]  # it learns
    # What it is trained for stands in the checkpoint; what makes another model of it is refused, and what it never reads is not said.
    capsys.readouterr()
    assert _train(tmp_path / "run", "num_steps=6", "resolution=64") == 1
    assert "is of another model: resolution 512 -> 64" in capsys.readouterr().err
    config = train_config(recipes.load(RECIPE, ["--config.num_steps=6", "--config.vae.base_channels=64", "--config.seed=3"]))
    said = check.describe(config, tmp_path / "run")
    assert said == [f"the recipe changed: {c}" for c in ("seed 23 -> 3", "num_steps 4 -> 6")] + [
        f"goes on from step 4 of {tmp_path / 'run'}"
    ]
    whole = trainables.read_run(tmp_path / "whole")
    assert whole.step == 4 and whole.part == "line" and whole.params["line"].keys() == {"slope", "height", "zero"}
    assert main(["export", str(tmp_path / "whole"), "-o", str(tmp_path / "model")]) == 1
    assert "whole trains a line, which has no place in a model directory" in capsys.readouterr().err
    # The plan counts it too.
    program = recipe_plan.make_program(config)
    assert program.batch["x"].shape == (8,) and sum(x.size for x in jax.tree.leaves(program.state.params)) == 2


def test_a_kind_that_nobody_entered_is_named(tmp_path, capsys):
    assert main(["train", "--config", "tiny_test", "--workdir", str(tmp_path), "--config.model=line"]) == 1
    assert "model is 'line'; choose one of stage, vae" in capsys.readouterr().err


def test_what_slips_between_host_and_device_in_the_loop_ends_the_run(tmp_path, monkeypatch):
    config = train_config(recipes.load(RECIPE, ["--config.data.validation_split="]))
    monkeypatch.setattr(loop, "global_batch", lambda mesh, batch: jax.tree.map(jax.numpy.asarray, batch))
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.train(config, str(tmp_path / "run"))
    assert data.step_arrays({"x": np.ones(1), "clip": np.ones(1)}).keys() == {"x"}
