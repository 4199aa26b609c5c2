"""`keysync inspect` says what a dataset, a run and a checkpoint are."""

import json

import tiny_shards as tiny

from keysync_jax.cli.main import main
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.training import recipes


def test_a_dataset(tmp_path, capsys):
    write_group(tmp_path / "data", tiny.group(), tiny.load, tiny.clips((20,)))
    assert main(["inspect", str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'data'}: a dataset") and "audio_hubert" in out


def test_a_run_and_what_lies_in_it(tmp_path, capsys):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    (tmp_path / "config.json").write_text(recipes.load("tiny_test").to_json_best_effort())
    for path, words in (
        (tmp_path, "a training run: keyframe"),
        (tmp_path / "checkpoints" / "2", f"a checkpoint in the training run {tmp_path}"),
    ):
        assert main(["inspect", str(path)]) == 0
        assert words in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["part"] == "keyframe"
