"""Items that are parts of one long video: the same result as from the start, without decoding or hashing the file for each."""

import dataclasses
import os
import time

import numpy as np
import pytest
from broken_inputs import encode

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.prepare import features, frame_table, work
from keysync_jax.data_pipeline.prepare.analyse import Tools, analyse
from keysync_jax.data_pipeline.prepare.frame_table import FrameTables
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.settings import Curation
from keysync_jax.data_pipeline.prepare.sound import load_sound
from keysync_jax.data_pipeline.prepare.work import WorkFolder, file_digest
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.media import audio, video
from keysync_jax.media.crop import Crop, extract

FRAMES = 300
CURATION = Curation(crop_size=64)


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """A talker of twelve seconds with a keyframe each second or so, landmarks beside it."""
    folder = tmp_path_factory.mktemp("long")
    clip = make_clip(21, FRAMES, 96)
    path = encode(folder / "long.mp4", clip.frames, clip.samples, options={"g": "24", "bf": "2"})
    np.save(folder / "long.landmarks.npy", clip.landmarks)
    return Item(str(path), "long.mp4", landmarks=str(folder / "long.landmarks.npy"))


def part(item, start, stop):
    return dataclasses.replace(item, start=start, stop=stop)


@pytest.fixture
def decoded(monkeypatch):
    """Grows by one per picture that any reader takes from its decoder."""
    taken = []
    honest = video.VideoReader._checked

    def checked(self, *args):
        for picture in honest(self, *args):
            taken.append(picture.pts)
            yield picture

    monkeypatch.setattr(video.VideoReader, "_checked", checked)
    return taken


def test_a_part_is_what_it_is_without_a_table(long_video, monkeypatch):
    """Frames, landmarks and fingerprints as from readers that know no keyframes and decode everything."""
    item = part(long_video, 6.02, 8.5)
    quick = analyse(item, CURATION, Tools(None, {}, FrameTables()))
    honest = video.read
    monkeypatch.setattr(video, "read", lambda path, info=None, start=0, keyframes=(), note_keyframes=False: honest(path, info, start))
    slow = analyse(item, CURATION, Tools(None, {}, FrameTables()))
    (kept,) = quick.candidates
    assert (kept.first, kept.num_frames) == (151, 62)
    assert quick.candidates == slow.candidates and quick.drops == slow.drops == []
    for name in (f"sources.{kept.id}", f"landmarks.{kept.id}", f"thumbnail.{kept.id}"):
        np.testing.assert_array_equal(quick.arrays[name], slow.arrays[name])
    assert len(quick.arrays["keyframes"]) > 5 and len(slow.arrays["keyframes"]) == 0


def test_many_parts_cost_one_pass_over_the_file(long_video, tmp_path, decoded):
    folder = WorkFolder(tmp_path / "tables")
    items = [part(long_video, start, start + 1.5) for start in (1.0, 4.0, 7.0, 10.0)]
    tools = Tools(None, {}, FrameTables(folder))
    for item in items:
        assert len(analyse(item, CURATION, tools).candidates) == 1
    clips = 4 * 2 * (38 + 24 + 5)  # two passes over each clip, from the keyframe before it, and what the decoder's threads hold
    assert FRAMES < len(decoded) < FRAMES + clips + 20
    decoded.clear()
    assert len(analyse(items[3], CURATION, Tools(None, {}, FrameTables(folder))).candidates) == 1  # another process, another run
    assert len(decoded) < FRAMES / 2


def test_the_sound_of_a_long_video_is_read_once(long_video, tmp_path, monkeypatch):
    loaded = []
    honest = audio.load_audio
    monkeypatch.setattr(audio, "load_audio", lambda path: loaded.append(path) or honest(path))
    os.utime(long_video.path, (1e9, 1e9))
    first = load_sound(part(long_video, 1.0, 2.0))
    assert load_sound(part(long_video, 3.0, None)) is first and len(loaded) == 1
    np.testing.assert_array_equal(first.samples, honest(long_video.path).samples)
    os.utime(long_video.path, (1e9, 1e9 + 1))
    assert load_sound(part(long_video, 1.0, 2.0)) is not first and len(loaded) == 2
    load_sound(long_video)
    load_sound(long_video)
    assert len(loaded) == 4  # a whole video comes once: its sound is not held


def test_crops_skip_what_lies_between(long_video, decoded):
    whole = [extract(f.rgb(), Crop(8, 8, 80), 64) for f in video.read(long_video.path)]
    with video.read(long_video.path, note_keyframes=True) as reader:
        list(reader)
    decoded.clear()
    crops = features._Crops(long_video, 64, reader.keyframes)
    wanted = [5, 6, 6, 40, 41, 250, 251, 252, 30, 299]
    for number in wanted:
        np.testing.assert_array_equal(crops.at(number, Crop(8, 8, 80)), whole[number])
    crops.close()
    assert len(decoded) < FRAMES
    with pytest.raises(KeySyncError, match="ends before frame 300"):
        crops.at(300, Crop(8, 8, 80))


def test_ranges_and_damage(long_video, tmp_path):
    tools = Tools(None, {}, FrameTables())

    def reasons(item):
        return [d.reason for d in analyse(item, CURATION, tools).drops]

    assert reasons(part(long_video, 11.5, None)) == ["too_short"]
    assert [c.num_frames for c in analyse(part(long_video, 10.0, None), CURATION, tools).candidates] == [50]
    assert reasons(part(long_video, 20.0, 30.0)) == ["no_frames"]
    damaged = tmp_path / "damaged.mkv"
    clip = make_clip(21, FRAMES, 96)
    encode(damaged, clip.frames, clip.samples, options={"g": "24"})
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size * 2 // 3])
    broken = dataclasses.replace(long_video, path=str(damaged))
    assert reasons(part(broken, 6.0, 12.0)) == ["damaged"]


def test_a_table_comes_back_as_it_was(long_video, tmp_path):
    folder = WorkFolder(tmp_path / "tables")
    info = video.probe(long_video.path)
    made = FrameTables(folder)(info)
    held = FrameTables(folder)(info)
    assert made.pts.tolist() == held.pts.tolist() == [f.pts for f in video.read(long_video.path)]
    assert made.keyframes == held.keyframes and made.damage is held.damage is None
    assert [k.index for k in made.keyframes][:2] == [0, 24]
    (name,) = folder.names()
    assert name == file_digest(long_video.path)
    (tmp_path / "tables" / f"{name}.npz").write_bytes(b"broken")
    assert FrameTables(folder)(info).keyframes == made.keyframes


def test_damage_is_placed(tmp_path):
    path = encode(tmp_path / "a.mkv", make_clip(22, 120, 96).frames, None, options={"g": "24"})
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4 : len(data) * 3 // 4 + 40] = bytes(40)
    path.write_bytes(data)
    at, words = frame_table.FrameTables()(video.probe(path)).damage
    assert 24 < at <= 120 and words


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    reads = []
    honest = work.sha256

    def hashed(path):
        reads.append(path)
        return honest(path)

    monkeypatch.setattr(work, "sha256", hashed)
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    settled = time.time_ns() - 10_000_000_000
    first = file_digest(path)
    assert file_digest(path) == first and len(reads) == 2  # just written: its time tells nothing yet
    os.utime(path, ns=(settled, settled))
    assert {file_digest(path) for _ in range(5)} == {first} and len(reads) == 3
    path.write_bytes(b"two")
    os.utime(path, ns=(settled + 1, settled + 1))
    assert file_digest(path) != first
    path.write_bytes(b"three")
    os.utime(path, ns=(settled + 1, settled + 1))
    assert file_digest(path) == honest(path) and len(reads) == 5
    with pytest.raises(FileNotFoundError):
        file_digest(tmp_path / "absent")
