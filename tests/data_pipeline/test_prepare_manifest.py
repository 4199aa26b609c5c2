"""What a manifest or a public annotation file says, and what becomes of mistakes in it."""

import json
import re

import pytest
from bounds import approx
from broken_inputs import encode

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.synthetic import make_clip


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    for name in ("a.mp4", "sub/b.MKV", "sub/a.mp4", ".hidden.mp4", "notes.txt", "c.wav"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "a.landmarks.npy").write_bytes(b"x")
    (folder / "a.truth.json").write_text("{}")
    return folder


def test_a_folder_is_searched_and_ids_do_not_depend_on_where_it_is(videos, tmp_path):
    items = read_inputs(videos)
    assert sorted(i.name for i in items) == ["a.mp4", "sub/a.mp4", "sub/b.MKV"]
    assert [i.id for i in items] == sorted(i.id for i in items)
    assert len({i.id for i in items}) == 3  # equal stems in two folders
    by_name = {i.name: i for i in items}
    assert by_name["a.mp4"].landmarks.endswith("a.landmarks.npy") and by_name["a.mp4"].emotion.endswith("a.truth.json")
    assert by_name["sub/a.mp4"].landmarks == ""
    moved = tmp_path / "elsewhere"
    videos.rename(moved)
    assert [i.id for i in read_inputs(moved)] == [i.id for i in items]


def test_csv_list_and_json_say_the_same(tmp_path):
    (tmp_path / "m.csv").write_text(
        "Path,speaker,split,source,consent,license,start,stop,box,rating\n"
        "v/x.mp4,ann,train,own,yes,CC0-1.0,1.5,4,0.1 0 0.6 1,5\n"
        "y.mp4,,,,,,,,,\n"
    )
    (tmp_path / "m.json").write_text(
        json.dumps(
            {
                "items": [
                    {
                        "path": "v/x.mp4", "speaker": "ann", "split": "train", "source": "own", "consent": "yes", "licence": "CC0-1.0",
                        "start": 1.5, "stop": 4, "box": [0.1, 0, 0.6, 1], "rating": "5",
                    },
                    "y.mp4",
                ]
            }
        )
    )  # fmt: skip
    (tmp_path / "m.txt").write_text("# two videos\nv/x.mp4\n\ny.mp4\n")
    a, b = read_inputs(tmp_path / "m.csv"), read_inputs(tmp_path / "m.json")
    assert a == b
    x = next(i for i in a if i.name == "v/x.mp4")
    assert (x.speaker, x.split, x.licence, x.start, x.stop) == ("ann", "train", "CC0-1.0", 1.5, 4)
    assert x.box == (0.1, 0, 0.6, 1) and x.extra == {"rating": "5"}
    assert [i.name for i in read_inputs(tmp_path / "m.txt", source="mine")] == ["v/x.mp4", "y.mp4"]
    assert {i.source for i in read_inputs(tmp_path / "m.txt", source="mine")} == {"mine"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "file name,speaker\nx.mp4,ann\n", "no column 'path'"),
        ("m.json", "{", "is not JSON"),
        ("m.json", '{"a": 1}', "must hold a list"),
        ("m.csv", "path,note\nx.mp4," + "z" * 200_000, "is not a CSV file .*field limit"),
        ("m.jsonl", '{"path": "x.mp4"}\n', "is no manifest that is read here"),
    ],
)
def test_mistakes_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(KeySyncError, match=words):
        read_inputs(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "path,start\nx.mp4,soon\n", "line 2"),
        ("m.csv", "path,start,stop\nx.mp4,5,4\n", "no time range"),
        ("m.csv", "path\nx.mp4,ann\n", "line 2 has more fields"),
        ("m.csv", "path,box\nx.mp4,0.5 0 0.1 1\n", "line 2"),
        ("m.csv", "path\nx.mp4\nx.mp4\n", "x.mp4 is listed twice"),
        ("m.json", "[3]", "entry 0"),
        ("m.csv", "path,start,stop\nx.mp4,nan,4\n", "line 2: start and stop are seconds"),
        ("m.csv", "path,start,stop\nx.mp4,0,inf\n", "line 2: start and stop are seconds"),
        ("m.csv", "path,split\nx.mp4,tr/ain\n", "line 2: split 'tr/ain' must be letters"),
        ("m.csv", 'path,note\n\n"x.mp4","two\nlines"\n\ny.mp4,a,b\n', "line 6 has more fields"),
        ("m.json", '[{"path": "x.mp4", "rating": NaN}]', "entry 0 holds NaN"),
        ("m.json", '[{"path": "x.mp4", "landmarks": 3}]', "entry 0: landmarks is 3"),
    ],
)
def test_a_bad_row_costs_that_row(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    (problem,) = [i for i in read_inputs(tmp_path / name) if i.problem]
    assert re.search(words, problem.problem) and problem.reason in ("bad_row", "listed_twice")


def test_good_rows_stand_beside_a_bad_one(tmp_path):
    (tmp_path / "m.csv").write_text("path,start,stop\na.mp4,0,2\nb.mp4,5,4\nc.mp4,1,3\n")
    items = read_inputs(tmp_path / "m.csv")
    assert sorted((i.name, bool(i.problem)) for i in items) == [("a.mp4", False), ("b.mp4", True), ("c.mp4", False)]
    assert len({i.id for i in items}) == 3


@pytest.mark.parametrize(("name", "text"), [("m.csv", "path\r\né.mp4\r\n"), ("m.txt", "é.mp4\r\n"), ("m.json", '["é.mp4"]')])
def test_a_byte_order_mark_is_no_part_of_a_path(tmp_path, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [i.name for i in read_inputs(tmp_path / name)] == ["é.mp4"]


def test_a_speaker_may_be_called_0(tmp_path):
    (tmp_path / "m.json").write_text(
        json.dumps([{"path": f"{i}.mp4", "speaker": i} for i in range(2)] + [{"path": "2.mp4", "speaker": None}])
    )
    assert {i.name: i.speaker for i in read_inputs(tmp_path / "m.json")} == {"0.mp4": "0", "1.mp4": "1", "2.mp4": ""}


def test_nothing_to_read(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UsageError):
            read_inputs(path)


def test_hdtf(tmp_path):
    notes, folder = tmp_path / "HDTF_dataset", tmp_path / "videos"
    notes.mkdir()
    folder.mkdir()
    (notes / "RD_annotion_time.txt").write_text("Radio11.mp4 00:30-01:00 1:01:30-1:02:30\n")
    (notes / "WDA_annotion_time.txt").write_text("CarolynMaloney2.mp4 00:10-00:20\nGone.mp4 00:00-00:05\n")
    (notes / "WDA_crop_wh.txt").write_text("CarolynMaloney2_0.mp4 16 32 4 48\n")
    (notes / "WDA_resolution.txt").write_text("CarolynMaloney2.mp4 64\n")
    clip = make_clip(1, 2, 128)
    encode(folder / "Radio11_0.mp4", clip.frames, clip.samples)
    encode(folder / "Radio11.mp4", clip.frames, clip.samples)
    encode(folder / "WDA_CarolynMaloney2.mp4", clip.frames, clip.samples)
    items = {i.extra["annotation"]: i for i in read_inputs(folder, str(notes))}
    assert sorted(items) == ["RD Radio11_0", "RD Radio11_1", "WDA CarolynMaloney2_0", "WDA Gone_0"]
    assert items["RD Radio11_0"].name == "Radio11_0.mp4" and items["RD Radio11_0"].stop is None  # already cut
    assert (items["RD Radio11_1"].name, items["RD Radio11_1"].start, items["RD Radio11_1"].stop) == ("Radio11.mp4", 3690, 3750)
    carolyn = items["WDA CarolynMaloney2_0"]
    # x 16, width 32, y 4, height 48 in a picture of 64 x 64
    assert carolyn.box == approx((0.25, 0.0625, 0.75, 0.8125)) and carolyn.speaker == "WDA_CarolynMaloney"
    assert items["WDA Gone_0"].name == "Gone.mp4"  # missing: goes to the dead letter later
    assert {i.source for i in items.values()} == {"hdtf"}
    (notes / "WDA_annotion_time.txt").write_text("CarolynMaloney2.mp4 00:20-00:10\n")
    items = {i.extra["annotation"]: i for i in read_inputs(folder, str(notes))}
    assert "ends before it begins" in items["WDA CarolynMaloney2_0"].problem and items["WDA CarolynMaloney2_0"].name == "CarolynMaloney2_0"
    assert not items["RD Radio11_0"].problem


@pytest.mark.parametrize(("file", "source"), [("celebvhq_info.json", "celebv-hq"), ("celebvtext_info.json", "celebv-text")])
def test_celebv(tmp_path, file, source):
    box = {"top": 0.0, "bottom": 0.9, "left": 0.2, "right": 0.7}
    clips = {
        "abc_0": {"ytb_id": "abc", "duration": {"start_sec": 81.62, "end_sec": 86.17}, "bbox": box},
        "abc_1": {"ytb_id": "abc", "duration": {"start_sec": 90, "end_sec": 95}, "bbox": box},
    }
    (tmp_path / file).write_text(json.dumps({"meta_info": {}, "clips": clips}))
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "abc_1.mp4").write_bytes(b"x")
    (folder / "abc.mp4").write_bytes(b"x")
    items = {i.extra["annotation"]: i for i in read_inputs(folder, str(tmp_path / file))}
    assert (items["abc_0"].name, items["abc_0"].start, items["abc_0"].box) == ("abc.mp4", 81.62, (0.2, 0.0, 0.7, 0.9))
    assert (items["abc_1"].name, items["abc_1"].stop, items["abc_1"].box) == ("abc_1.mp4", None, None)
    assert {(i.speaker, i.source) for i in items.values()} == {("abc", source)}
    clips["abc_0"]["duration"]["start_sec"] = float("nan")
    (tmp_path / file).write_text(json.dumps({"clips": clips}))
    problems = {i.extra["annotation"]: i.problem for i in read_inputs(folder, str(tmp_path / file))}
    assert "'abc_0' lacks" in problems["abc_0"] and not problems["abc_1"]
    (tmp_path / file).write_text(json.dumps({"clips": {"abc_0": {"ytb_id": "abc"}}}))
    assert "abc_0" in read_inputs(folder, str(tmp_path / file))[0].problem


@pytest.mark.parametrize("name", ["m.csv", "m.txt", "m.json"])
def test_a_manifest_that_is_not_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00p\x00a")
    with pytest.raises(KeySyncError, match=rf"{name} is not"):
        read_inputs(tmp_path / name)


def test_an_annotation_table_that_is_not_text(videos, tmp_path):
    (tmp_path / "hdtf").mkdir()
    (tmp_path / "hdtf" / "RD_video_url.txt").write_bytes(b"\xff\xfe")
    for file in ("RD_annotion_time.txt", "WRA_annotion_time.txt"):
        (tmp_path / "hdtf" / file).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(KeySyncError, match="is not text in UTF-8"):
        read_inputs(videos, str(tmp_path / "hdtf"))
