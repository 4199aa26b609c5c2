"""Files that come through a pipe, have odd names, or lie in a network: they work, or one line says what to do."""

import io
import os
import sys
import threading

import clips
import pytest

from keysync_jax.cli import main as cli
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.inference.clip_io import open_video, open_voice
from keysync_jax.media import writer


class Piped(io.BytesIO):
    """Standard input with bytes in it."""

    def __init__(self, data):
        super().__init__(data)
        self.buffer = self

    def isatty(self):
        return False


@pytest.fixture
def film(tmp_path):
    clips.make_clip(tmp_path / "a.mp4", [512 * i for i in range(6)])
    return tmp_path / "a.mp4"


def test_a_video_through_standard_input_is_read_more_than_once(film, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Piped(film.read_bytes()))
    source = open_video("-")
    assert [len(list(source.read())) for _ in range(2)] == [6, 6]
    scratch = source.info.path
    assert os.path.exists(scratch)
    del source
    assert not os.path.exists(scratch)


def test_a_named_pipe_is_read_like_a_file(tmp_path):
    import soundfile

    soundfile.write(str(tmp_path / "v.wav"), clips.click_track(16000, 1, 0.9), 16000)
    data = (tmp_path / "v.wav").read_bytes()
    os.mkfifo(tmp_path / "pipe")
    feeder = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data))
    feeder.start()
    voice = open_voice(tmp_path / "pipe")
    feeder.join(timeout=30)
    assert len(voice.sound.samples) == 14400 and voice.path is not None and os.path.exists(voice.path)


def test_nothing_in_a_pipe_and_addresses_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdin", Piped(b""))
    with pytest.raises(KeySyncError, match="-: nothing came through"):
        open_voice("-")
    for opened in (open_video, open_voice):
        with pytest.raises(KeySyncError, match=r"https://example.invalid/a.mp4: an address.*download"):
            opened("https://example.invalid/a.mp4")
    for name in ("-", "/dev/stdout"):
        with pytest.raises(UsageError, match="the output must be a file"):
            writer.check_output(name)


def test_names_with_a_leading_dash_are_files(film, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    film.rename(tmp_path / "-talk.mp4")
    words = cli._with_dashed_names(["dub", "-talk.mp4", "voice.wav", "-o", "-out.mp4", "--seed", "-v", "-missing.mp4"])
    assert words == ["dub", "./-talk.mp4", "voice.wav", "-o", "./-out.mp4", "--seed", "-v", "-missing.mp4"]
    assert len(list(open_video(words[1]).read())) == 6
