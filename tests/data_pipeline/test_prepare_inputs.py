"""Input as people hold it: links, odd names, sound in files of its own, boxes in either unit, copies."""

import json
import shutil

import numpy as np
import pytest
from bounds import approx
from broken_inputs import encode

from keysync_jax.data_pipeline.prepare.boxes import as_fractions
from keysync_jax.data_pipeline.prepare.input_files import find_sound, find_videos
from keysync_jax.data_pipeline.prepare.item import Item
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import without_copies
from keysync_jax.data_pipeline.prepare.sound import load_sound
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.media import audio


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """One talker of four pictures with sound and without."""
    folder, clip = tmp_path_factory.mktemp("films"), make_clip(1, 4, 128)
    encode(folder / "loud.mp4", clip.frames, clip.samples)
    encode(folder / "silent.mp4", clip.frames, None)
    audio.save_wav(folder / "voice.wav", np.full(2560, 0.25, np.float32), 16000)
    return folder


def put(films, kind, *places):
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(films / kind, place)


def test_links_are_followed_once_and_every_file_is_counted(films, tmp_path):
    put(films, "silent.mp4", tmp_path / "disk2" / "ann" / "one.mp4", tmp_path / "raw" / "UPPER.MXF", tmp_path / "raw" / "no_suffix")
    put(films, "silent.mp4", tmp_path / "raw" / "x.m2ts")
    (tmp_path / "raw" / "notes").write_text("no video")
    (tmp_path / "raw" / "a.txt").write_text("no video")
    (tmp_path / "raw" / ".hidden.mp4").write_text("")
    (tmp_path / "raw" / "ann").symlink_to(tmp_path / "disk2" / "ann", target_is_directory=True)
    (tmp_path / "raw" / "again").symlink_to(tmp_path / "raw", target_is_directory=True)
    found = find_videos(tmp_path / "raw")
    assert found.videos == ("UPPER.MXF", "ann/one.mp4", "no_suffix", "x.m2ts")
    assert found.left_out == {".txt": 1, "no suffix": 1, "hidden": 1, "folder met twice": 1}
    told = []
    assert len(read_inputs(tmp_path / "raw", tell=told.append)) == 4
    assert "4 other files and folders were left out" in told[0] and "folder met twice 1" in told[0]


@pytest.mark.parametrize(
    ("picture", "sound"),
    [
        ("a.mp4", "a.wav"),
        ("video_crop/a.mp4", "audio/a.wav"),
        ("a.mp4", "audio/a.wav"),
        ("mp4/id00012/abc/00001.mp4", "aac/id00012/abc/00001.wav"),
    ],
)
def test_sound_in_a_file_of_its_own_is_found(picture, sound, films, tmp_path):
    put(films, "silent.mp4", tmp_path / picture)
    put(films, "voice.wav", tmp_path / sound)
    (item,) = read_inputs(tmp_path)
    assert item.audio == str(tmp_path / sound)
    assert item.speaker == ("id00012" if "id00012" in picture else "")
    assert np.abs(load_sound(item).samples - 0.25).max() <= 1 / 2**15  # a step of 16-bit sound
    put(films, "loud.mp4", tmp_path / picture)
    assert find_sound(tmp_path / picture) == ""  # its own sound counts


def test_a_manifest_names_the_sound(films, tmp_path):
    put(films, "loud.mp4", tmp_path / "v" / "a.mp4")
    put(films, "voice.wav", tmp_path / "s" / "b.wav")
    (tmp_path / "m.csv").write_text("path,audio,speaker\nv/a.mp4,s/b.wav,ann\n")
    (item,) = read_inputs(tmp_path / "m.csv")
    assert item.audio == str(tmp_path / "s" / "b.wav") and item.extra == {}
    assert np.abs(load_sound(item).samples - 0.25).max() <= 1 / 2**15  # a step of 16-bit sound


def test_boxes_are_fractions_or_pixels_and_never_one_for_the_other(films):
    film = films / "silent.mp4"  # 128 x 128
    assert as_fractions("0.1, 0 0.6 1", film) == (0.1, 0, 0.6, 1)
    assert as_fractions([32, 16, 96, 128], film) == approx((0.25, 0.125, 0.75, 1.0))
    for wrong, words in (([320, 16, 960, 128], "neither fractions nor pixels of a picture of 128 x 128"), ([0.5, 0, 0.1, 1], "no area")):
        with pytest.raises(ValueError, match=words):
            as_fractions(wrong, film)


@pytest.mark.parametrize(("box", "fractions"), [((0.0, 0.05, 0.5, 0.95),) * 2, ((0, 8, 64, 120), (0, 0.0625, 0.5, 0.9375))])
@pytest.mark.parametrize("wrapped", [False, True])
def test_celebvtext_in_each_published_form(wrapped, box, fractions, films, tmp_path):
    put(films, "loud.mp4", tmp_path / "raw" / "abc.mp4")
    sides = dict(zip(("left", "top", "right", "bottom"), box, strict=True))
    entry = {"ytb_id": "abc", "duration": {"start_sec": 0.0, "end_sec": 0.12}, "bbox": sides, "version": "v0.1"}
    entries = {"abc_0.mp4": entry, "abc_1.mp4": {**entry, "duration": {"start_sec": 3, "end_sec": 3}}, "abc_2.mp4": {"ytb_id": "abc"}}
    (tmp_path / "celebvtext_info.json").write_text(json.dumps({"clips": entries} if wrapped else entries))
    items = {i.extra["annotation"]: i for i in read_inputs(tmp_path / "raw", str(tmp_path / "celebvtext_info.json"))}
    good = items["abc_0.mp4"]
    assert (good.name, good.speaker, good.stop, good.source) == ("abc.mp4", "abc", 0.12, "celebv-text")
    assert good.box == approx(fractions)
    assert "3 to 3 s" in items["abc_1.mp4"].problem and "lacks" in items["abc_2.mp4"].problem
    put(films, "loud.mp4", tmp_path / "raw" / "abc_0.mp4")  # already cut, under the entry's own name
    items = {i.extra["annotation"]: i for i in read_inputs(tmp_path / "raw", str(tmp_path / "celebvtext_info.json"))}
    assert (items["abc_0.mp4"].name, items["abc_0.mp4"].stop) == ("abc_0.mp4", None)


def test_copies_are_one_clip_and_said(films, tmp_path):
    put(films, "loud.mp4", *(tmp_path / f"take_{i}.mp4" for i in range(3)))
    put(films, "silent.mp4", tmp_path / "other.mp4")
    items = read_inputs(tmp_path)
    sorted_out = without_copies(items)
    assert [i.name for i in sorted_out if not i.problem] == [i.name for i in items if i.name in ("other.mp4", sorted_out[1].name)]
    copies = [i for i in sorted_out if i.problem]
    assert len(copies) == 2 and {i.reason for i in copies} == {"copy"} and all("same bytes as take_" in i.problem for i in copies)
    known = next(i for i in items if i.name == copies[-1].name)
    assert not next(i for i in without_copies(items, {known.id}) if i.name == known.name).problem  # what is prepared already stays
    parts = [Item(str(tmp_path / "take_0.mp4"), "take_0.mp4", start=s, stop=s + 1) for s in (0.0, 1.0)]
    assert without_copies(parts) == parts
