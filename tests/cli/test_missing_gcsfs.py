"""gs:// paths without the package that speaks it: one line from every verb; other failed imports keep their traceback."""

import sys

import pytest

from keysync_jax.cli import main as cli
from keysync_jax.cli import weights_verbs


@pytest.fixture
def without_gcsfs(monkeypatch):
    from etils.epath import backend

    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.mark.parametrize(
    "words",
    [
        ("train", "--config", "tiny_test", "--workdir", "gs://bucket/a", "--config.data.datasets=data"),
        ("train", "--config", "tiny_test", "--workdir", "x", "--config.data.datasets=('gs://bucket/a','data')"),
        ("plan", "--config", "keyframe", "--topology", "cpu:8", "--config.init.path=gs://bucket/a"),
        ("export", "gs://bucket/a", "-o", "x"),
        ("convert", "gs://bucket/a", "-o", "x"),
        ("inspect", "gs://bucket/a"),
    ],
    ids=lambda words: words[0],
)
def test_one_line_says_what_to_install(words, without_gcsfs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "keysync: error: gs://bucket/a needs gcsfs, which is not installed; pip install gcsfs"
    assert len(said) == (2 if words[0] == "plan" else 1)  # plan says first what it is going to do
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["import absent_package", "from json import absent_name"])
def test_other_imports_keep_their_traceback(missing, monkeypatch):
    monkeypatch.setattr(weights_verbs, "_inspect", lambda args: exec(missing))
    with pytest.raises(ImportError, match="absent"):
        cli.main(["inspect", "gs://bucket/a"])
