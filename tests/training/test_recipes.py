import importlib
import json
import sys
import types

import pytest

from keysync_jax.cli.main import _with_joined_overrides, main
from keysync_jax.config import StageConfig, from_dict
from keysync_jax.core.errors import UsageError
from keysync_jax.training import recipes


def test_shipped_stages_are_the_released_ones():
    keyframe = from_dict(StageConfig, recipes.load("keyframe").stage.to_dict())
    interpolation = from_dict(StageConfig, recipes.load("interpolation").stage.to_dict())
    assert (keyframe.audio_encoder, keyframe.unet.in_channels) == ("hubert", 8)
    assert (interpolation.audio_encoder, interpolation.unet.in_channels) == ("wavlm", 9)


def test_overrides():
    config = recipes.load("keyframe", ["--config.stage.unet.model_channels=64", "--config.stage.audio_encoder=log_mel"])
    assert config.stage.unet.model_channels == 64
    assert config.stage.audio_encoder == "log_mel"


@pytest.mark.parametrize(
    "override", ["--config.stage.unet.modl=64", "--config.stage.unet.model_channels=wide", "--config.stage.num_frames"]
)
def test_bad_overrides(override):
    with pytest.raises(UsageError):
        recipes.load("keyframe", [override])


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'a': {'b': 1}})\n")
    assert recipes.load(str(path), ["--config.a.b=3"]).a.b == 3
    with pytest.raises(UsageError, match="keyframe"):
        recipes.load("no_such_recipe")


def test_a_stored_recipe_of_an_older_version_can_be_given_the_keys_it_lacks(tmp_path):
    values = recipes.load("tiny_test").to_dict()
    del values["optimizer"]["max_skipped"], values["log"]
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    config = recipes.load(str(path), ["--config.optimizer.max_skipped=3", "--config.log.samples=1"])
    assert config.optimizer.max_skipped == 3 and config.log.samples == 1
    assert config.optimizer.learning_rate == values["optimizer"]["learning_rate"]


def test_a_recipe_written_for_the_former_names_loads_and_leaves_none_of_them(tmp_path):
    """`configs` and `keysync_jax.errors` are nobody's names any more, and a package of the user's own under such a name comes back."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import tiny_test\n"
        "from configs.keyframe import PRESETS as KNOWN\n"
        "from keysync_jax.errors import KeySyncError\n"
        "def get_config():\n"
        "    import configs.demo_keyframe\n"
        "    if configs.demo_keyframe.UNET is None:\n"
        "        raise KeySyncError('no network')\n"
        "    config = tiny_test.get_config()\n"
        "    config.num_steps = len(KNOWN)\n"
        "    return config\n"
    )
    other = types.ModuleType("configs")
    for before in (None, other):
        sys.modules.pop("configs", None) if before is None else sys.modules.update(configs=before)
        config = recipes.load(str(path))
        assert config.num_steps == 2 and config.stage == recipes.load("tiny_test").stage
        assert sys.modules.pop("configs", None) is before
    assert not [name for name in sys.modules if name.startswith(("configs.", "keysync_jax.errors"))]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("keysync_jax.errors")


def test_a_key_given_twice_is_refused_and_a_value_may_follow_a_space(capsys):
    words = ["train", "--config", "tiny_test", "--workdir", "w", "--config.data.datasets=a", "--config.data.datasets", "b"]
    assert main(words) == 2
    assert "--config.data.datasets is given twice" in (said := capsys.readouterr().err) and "datasets=a,b" in said
    assert recipes.load("tiny_test", ["--config.num_steps=3", "--config.num_steps=4"]).num_steps == 4  # of a program, the later one
    assert tuple(recipes.load("tiny_test", ["--config.data.datasets=a,b"] * 2).data.datasets) == ("a", "b")
    joined = _with_joined_overrides(["train", "--config", "tiny_test", "--config.num_steps", "3", "--workdir", "w", "--config.a=1", "x"])
    assert joined == ["train", "--config", "tiny_test", "--config.num_steps=3", "--workdir", "w", "--config.a=1", "x"]
