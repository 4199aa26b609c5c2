"""Bad input gets one clear line, the right exit status, and leaves nothing behind."""

import io
import pickle
import shutil
import zipfile

import numpy as np
import pytest

from keysync_jax.cli import weights_verbs
from keysync_jax.cli.main import main
from keysync_jax.media.audio import save_wav


@pytest.fixture
def keysync(capsys):
    """Runs the command; returns (exit status, the single error line)."""

    def run(*words):
        try:
            status = main([str(w) for w in words])
        except SystemExit as stop:  # argparse
            status = stop.code
        error = capsys.readouterr().err.strip()
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.startswith("keysync: error:") or ": error:" in line]
        assert len(lines) == 1, error
        return status, lines[0]

    return run


@pytest.fixture
def job(talker, tiny_model, tmp_path):
    """Arguments of a good dub, to be spoiled one at a time."""
    return {"video": talker / "clip.mp4", "voice": talker / "voice.wav", "out": tmp_path / "out.mp4", "model": tiny_model, "extra": []}


def _words(job):
    return ("dub", job["video"], job["voice"], "-o", job["out"], "--model", job["model"], *job["extra"])


def _text_video(job, tmp_path):
    job["video"] = tmp_path / "notes.mp4"
    job["video"].write_text("these are minutes of a meeting\n" * 50)
    return "notes.mp4"


def _missing_video(job, tmp_path):
    job["video"] = tmp_path / "nowhere.mp4"
    return "nowhere.mp4"


def _no_face(job, tmp_path):
    import av

    job["video"] = tmp_path / "meadow.mp4"
    with av.open(str(job["video"]), "w") as writer:
        stream = writer.add_stream("libx264", rate=25)
        stream.width = stream.height = 128
        for shade in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((128, 128, 3), 60 + shade, np.uint8), format="rgb24")
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    return "face"


def _empty_voice(job, tmp_path):
    job["voice"] = tmp_path / "empty.wav"
    save_wav(job["voice"], np.zeros(0, np.float32), 16000)
    return "empty.wav"


def _missing_part(job, tmp_path):
    shutil.copytree(job["model"], tmp_path / "model")
    job["model"] = tmp_path / "model"
    shutil.rmtree(job["model"] / "vae")
    return "vae"


def _misshaped_key(job, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(job["model"], tmp_path / "model")
    job["model"] = tmp_path / "model"
    path = job["model"] / "keyframe" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.diffusion_model.out.2.bias"] = np.zeros(3, np.float32)
    save_file(tensors, path)
    return "model.diffusion_model.out.2.bias"


def _wrong_encoder(job, tmp_path):
    shutil.copytree(job["model"], tmp_path / "model")
    job["model"] = tmp_path / "model"
    shutil.rmtree(job["model"] / "audio" / "hubert")
    index = job["model"] / "model_index.json"
    index.write_text(index.read_text().replace("audio/hubert", "audio/wavlm"))
    return "hubert"


def _no_folder(job, tmp_path):
    job["out"] = tmp_path / "not" / "there" / "out.mp4"
    return "there"


def _five_steps(job, tmp_path):
    job["extra"] = ["--steps", "5"]
    return "10"


def _bad_crf(job, tmp_path):
    job["extra"] = ["--crf", "99"]
    return "0 to 51"


def _weights_of_another_detector(job, tmp_path):
    job["extra"] = ["--face-weights", tmp_path]
    return "--faces fan"


def _bad_extension(job, tmp_path):
    job["out"] = tmp_path / "out.gif"
    return ".mp4"


@pytest.mark.parametrize(
    "spoil",
    [
        _missing_video,
        _text_video,
        _no_face,
        _empty_voice,
        _missing_part,
        _misshaped_key,
        _wrong_encoder,
        _no_folder,
        _five_steps,
        _bad_crf,
        _weights_of_another_detector,
        _bad_extension,
    ],
)
def test_dub(spoil, job, tmp_path, keysync):
    word = spoil(job, tmp_path)
    before = set(tmp_path.rglob("*"))
    status, line = keysync(*_words(job))
    assert status in (1, 2)
    assert word in line
    assert set(tmp_path.rglob("*")) == before  # nothing half-written, no scratch folder


class _Foreign:
    def __reduce__(self):
        import os

        return os.system, ("echo this must never run",)


def test_pickle_with_a_foreign_class(tmp_path, keysync):
    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"module": _Foreign()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    status, line = keysync("convert", path, "-o", tmp_path / "model")
    assert status == 1 and "system" in line
    assert not (tmp_path / "model").exists()


def test_a_name_that_the_terminal_cannot_show_does_not_fail_the_job(monkeypatch):
    """What `ls` shows as caf?.mp4 (a file name that is no UTF-8), and a dash on an ASCII terminal."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(weights_verbs, "_inspect", lambda args: print("caf\udce9.mp4: frames 1–2"))
    assert main(["inspect", "x"]) == 0
    out.flush()
    assert out.buffer.getvalue() == b"caf\\udce9.mp4: frames 1\\u20132\n"


def test_usage_errors(keysync, tmp_path):
    assert keysync("dub")[0] == 2
    assert keysync("inspect")[0] == 2
    assert keysync("verify", tmp_path / "nowhere")[0] in (1, 2)
    assert keysync("inspect", "--config", "no_such")[0] == 2


def test_help_fits_a_screen(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 110
    assert any("keysync dub" in line for line in lines)


@pytest.mark.parametrize("verb", ["demo", "dub", "convert", "export", "inspect", "init", "verify", "train", "evaluate", "plan", "bench"])
def test_every_verb_shows_an_example(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert f"keysync {verb}" in capsys.readouterr().out.split("example:")[1]
