"""The list of a batch: what is read, and what is refused before any work."""

import json
import os
from pathlib import Path

import pytest

from keysync_jax.batch.job_list import Job, check_outputs, read_jobs
from keysync_jax.cli.batch_verbs import dub_columns
from keysync_jax.cli.main import main
from keysync_jax.core.errors import UsageError


def read(path, text):
    path.write_text(text, encoding="utf-8")
    return read_jobs([path], dub_columns())


def test_a_table_has_every_option_of_dub_under_its_flags_name(tmp_path):
    jobs = read(
        tmp_path / "jobs.csv",
        "video,voice,seed,lossless,face choice,audio-scale,licence note,consent,mismatch mode,time range\n"
        "a.mp4,a.wav,7,yes,left,3.5,CC-BY,signed,silence,1.5:4\n"
        "\n"
        "sub/b.mov,/abs/de.wav,,false,,,,,,\n",
    )
    assert [(job.id, job.output) for job in jobs] == [("a", "a.mp4"), ("b-de", "b-de.mp4")]
    assert jobs[0].video == str(tmp_path / "a.mp4") and jobs[1].audio == "/abs/de.wav"
    assert {name: jobs[0].options[name] for name in ("seed", "lossless", "face", "audio_scale", "mismatch", "range")} == {
        "seed": 7, "lossless": True, "face": "left", "audio_scale": 3.5, "mismatch": "silence", "range": "1.5:4"}  # fmt: skip
    assert jobs[1].options["seed"] == 23 and jobs[1].options["lossless"] is False
    assert (jobs[0].licence, jobs[0].consent) == ("CC-BY", "signed")


def test_json_lines_and_semicolons_give_the_same(tmp_path):
    rows = [{"id": "x", "video": "a.mp4", "audio": "a.wav", "lossless": True, "seed": 4, "crf": None, "face": [3, 4]}]
    lines = read(tmp_path / "jobs.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    table = read(tmp_path / "jobs.csv", "\ufeffid;video;audio;lossless;seed;face\nx;a.mp4;a.wav;1;4;3,4\n")
    assert [job.options for job in lines] == [job.options for job in table] and lines[0].options["face"] == "3,4"


def test_a_wrong_value_fails_its_row_alone(tmp_path):
    rows = "a.mp4,a.wav,abc,\nb.mp4,b.wav,-5,\nc.mp4,c.wav,1,maybe\nd.mp4,d.wav,1,no\n"
    jobs = read(tmp_path / "jobs.csv", f"video,audio,seed,lossless\n{rows}")
    assert ["seed" in jobs[0].error, "--seed -5" in jobs[1].error, "true or false" in jobs[2].error, jobs[3].error] == [
        True,
        True,
        True,
        "",
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        ("video,audio,sede\na.mp4,a.wav,1\n", "line 2: there is no column 'sede'"),
        ("video,audio,kind\na.mp4,a.wav,sing\n", "line 2: kind 'sing'"),
        ("video,audio,occlusion\na.mp4,a.wav,auto\n", "no --occlusion yet"),
        ("video,audio,voice:1\na.mp4,a.wav,b.wav\n", "no --voice:1 yet"),
        ("video,audio\na.mp4\n", "line 2 has no audio"),
        ("video,audio\na.mp4,a.wav,more\n", "more fields"),
        ("id,video,audio\nx,a.mp4,a.wav\nx,b.mp4,b.wav\n", "2 items share one id 'x'"),
        ("video,audio\n", "names no item"),
    ],
)
def test_what_is_no_list_is_refused_by_name(tmp_path, text, words):
    with pytest.raises(UsageError, match=words):
        read(tmp_path / "jobs.csv", text)


def test_empty_cells_of_options_to_come_are_no_harm(tmp_path):
    assert len(read(tmp_path / "jobs.csv", "video,audio,mismatch,range,voice:2\na.mp4,a.wav,,,\n")) == 1


def test_folders_pair_by_name_or_say_all_that_does_not(tmp_path):
    for name in ("videos/a.mp4", "videos/sub/b.mov", "voices/a.wav", "voices/sub/b.mp3", "videos/.hidden", "voices/readme.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folders = [tmp_path / "videos", tmp_path / "voices"]
    jobs = read_jobs(folders, dub_columns())
    assert [(job.id, job.output, Path(job.audio).name) for job in jobs] == [("a", "a.mp4", "a.wav"), ("sub/b", "sub/b.mp4", "b.mp3")]
    (tmp_path / "voices" / "c.wav").touch()
    (tmp_path / "videos" / "d.mp4").touch()
    with pytest.raises(UsageError, match=r"d.mp4 has no voice; .*c.wav has no video"):
        read_jobs(folders, dub_columns())
    (tmp_path / "voices" / "a.flac").touch()
    with pytest.raises(UsageError, match=r"not clear: .*a.flac and a.wav"):
        read_jobs(folders, dub_columns())


def job(output, name="x", video="/in/v.mp4"):
    return Job(name, video, "/in/a.wav", output, where=f"line of {name}")


@pytest.mark.parametrize(
    "output", ["../x.mp4", "a/../../x.mp4", "/etc/x.mp4", "link/x.mp4", "report.jsonl", ".keysync-batch/x.mp4", "there"]
)
def test_no_output_leaves_its_folder_or_takes_a_name_of_ours(tmp_path, output):
    out = tmp_path / "out"
    (out / "there").mkdir(parents=True)
    (out / "link").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="line of x"):
        check_outputs([job(output)], out)


def test_outputs_are_shared_by_nobody_and_replace_no_input(tmp_path):
    out = tmp_path / "out"
    (out / "real").mkdir(parents=True)
    (out / "alias").symlink_to(out / "real")
    check_outputs([job("real/x.mp4"), job("y.mp4", "y")], out)
    for first, second in [("x.mp4", "x.mp4"), ("x.mp4", "X.mp4"), ("real/x.mp4", "alias/x.mp4"), ("x.mp4", "./x.mp4")]:
        with pytest.raises(UsageError, match="2 items share one output"):
            check_outputs([job(first), job(second, "y")], out)
    with pytest.raises(UsageError, match="folder of another"):
        check_outputs([job("x.mp4"), job("x.mp4/y.mp4", "y")], out)
    os.symlink(out / "v.mp4", tmp_path / "v.mp4")
    with pytest.raises(UsageError, match="would replace an input of line of y"):
        check_outputs([job("v.mp4"), job("y.mp4", "y", str(tmp_path / "v.mp4"))], out)


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "jobs.csv").write_text("video,audio,output\na.mp4,a.wav,../../etc/x.mp4\n")
    for words in (
        ["batch", str(tmp_path / "jobs.csv"), "-o", str(tmp_path / "out"), "--model", "demo"],
        ["batch", str(tmp_path / "jobs.csv"), "-o", str(tmp_path / "out"), "--model", "demo", "--seed", "-1"],
        ["batch", str(tmp_path / "jobs.csv"), "-o", str(tmp_path / "out"), "--model", "demo", "--shard", "8/8"],
        ["batch", "-o", str(tmp_path / "out")],
    ):
        assert main(words) == 2
        assert capsys.readouterr().err.count("keysync: error:") == 1
    assert main(["batch", "--status", str(tmp_path)]) == 1
    assert "holds no batch" in capsys.readouterr().err and not (tmp_path / "out").exists()
