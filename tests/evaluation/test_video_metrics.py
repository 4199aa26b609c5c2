"""LipLeak, mouth aspect ratio and sharpness: on landmarks and pictures made by hand, then on a drawn clip's file."""

import argparse
import csv
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from bounds import approx
from PIL import Image

from keysync_jax.cli import evaluate_verbs
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.evaluation import video_metrics, video_report
from keysync_jax.evaluation.lip_metrics_plot import COLOURS, draw_curves, stack
from keysync_jax.evaluation.video_metrics import FrameFigures


def _face(gap, width=40.0, centre_gap=None):
    """Landmarks with inner lips `width` wide and `gap` apart (62-66: `centre_gap`), outer ones 10 wider and 12 further apart."""
    points = np.zeros((68, 2))
    points[60], points[64] = (0, 0), (width, 0)
    for upper, lower, x in ((61, 67, 10), (62, 66, 20), (63, 65, 30)):
        own = centre_gap if upper == 62 and centre_gap is not None else gap
        points[upper], points[lower] = (x, -own / 2), (x, own / 2)
    points[48], points[54] = (-5, 0), (width + 5, 0)
    points[51], points[57] = (20, -gap / 2 - 6), (20, gap / 2 + 6)
    return points


def test_mouth_ratio_by_its_three_definitions():
    face = _face(8, centre_gap=14)
    assert video_metrics.mouth_ratio(face) == approx((8 + 14 + 8) / 3 / 40)
    assert video_metrics.mouth_ratio(face, "inner centre") == approx(14 / 40)
    assert video_metrics.mouth_ratio(face, "outer") == approx(20 / 50)
    assert video_metrics.mouth_ratio(_face(0)) == 0
    angle = np.array([[0.8, -0.6], [0.6, 0.8]])
    assert video_metrics.mouth_ratio(3.7 * face @ angle + 100) == approx(video_metrics.mouth_ratio(face))
    with pytest.raises(UsageError, match="no mouth aspect ratio called 'lips'"):
        video_metrics.mouth_ratio(face, "lips")


def test_lip_leak_counts_frames_above_the_threshold():
    ratios = video_metrics.mouth_ratio(np.stack([_face(g) for g in (0, 4, 9.9, 10, 10.1, 16, 20, 30)]))
    assert video_metrics.lip_leak(ratios) == 4 / 8  # ten of forty is exactly .25, which is not above
    assert video_metrics.lip_leak(np.append(ratios, [np.nan] * 5)) == 4 / 8
    sweep = [video_metrics.lip_leak(ratios, bound) for bound in video_metrics.SWEEP]
    assert sweep == sorted(sweep, reverse=True) and sweep[0] > sweep[-1]
    assert video_metrics.lip_leak(np.zeros(9)) == 0
    with pytest.raises(KeySyncError, match="no frame has a face"):
        video_metrics.lip_leak(np.full(4, np.nan))


def test_variance_of_laplacian():
    point = np.zeros((9, 9))
    point[4, 4] = 1
    values = np.zeros(81)
    values[:5] = (-4, 1, 1, 1, 1)
    assert video_metrics.laplacian_variance(point) == approx(values.var())
    assert video_metrics.laplacian_variance(np.full((9, 9), 77)) == 0
    edge = np.zeros((5, 5))
    edge[:, 0] = 3  # mirrored without repeating the border: the neighbour beyond column 0 is column 1
    expected = np.zeros((5, 5))
    expected[:, 0], expected[:, 1] = -6, 3
    assert video_metrics.laplacian_variance(edge) == approx(expected.var())
    noise = np.random.default_rng(0).uniform(0, 255, (32, 32))
    blurred = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3
    assert video_metrics.laplacian_variance(blurred) < 0.5 * video_metrics.laplacian_variance(noise)


def test_gray_is_what_eight_bit_gray_is():
    rgb = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]]], np.uint8)
    np.testing.assert_array_equal(video_metrics.to_gray(rgb), [[76, 150, 29, 18]])


def _figures(ratios):
    ratios = np.asarray(ratios, float)
    flat = np.ones(len(ratios))
    return FrameFigures(np.arange(len(ratios)) / 25, dict.fromkeys(video_metrics.RATIOS, ratios), 2 * flat, 3 * flat)


def test_comparison_uses_frames_with_a_face_in_both():
    known = np.array([0.1, 0.3, 0.4, 0.3, 0.2, 0.15, 0.35, 0.5])
    ours, theirs = _figures([*known[:2], np.nan, *known[2:], 0.2]), _figures([*2 * known[:2], 0.9, *2 * known[2:]])
    both = video_metrics.compare(ours, theirs)
    assert both["frames_compared"] == 8 and both["frames_apart"] == 1
    assert both["ratio_r"] == approx(1) and both["ratio_difference"] == approx(known.mean())
    assert both["open_difference"] == approx(5 / 8 - 7 / 8)  # over the frames that are compared
    short = video_metrics.compare(_figures(known[:7]), theirs)
    assert short["frames_compared"] == 7 and np.isnan(short["ratio_r"])  # too few to correlate
    with pytest.raises(KeySyncError, match="fewer than two frames"):
        video_metrics.compare(_figures([0.1, np.nan, np.nan]), theirs)


def test_the_table_names_the_file_as_it_is(capsys):
    summary = video_metrics.summarize(_figures([0.1, 0.3]))
    video_report._show({"path": "take [final].mp4", "audio_silent": False, "generated": summary}, "inner", 0.25)
    assert "take [final].mp4 (inner lips" in " ".join(capsys.readouterr().out.split())


def test_comparison_goes_by_time_where_the_rates_differ():
    ratios = np.random.default_rng(0).random(50)
    slow = _figures(ratios)
    twice = _figures(np.repeat(ratios, 2))._replace(time=np.arange(100) / 50 + 3.0)  # its clock starts elsewhere
    for first, second, frames in ((slow, twice, 50), (twice, slow, 100)):
        both = video_metrics.compare(first, second)
        assert (both["frames_compared"], both["frames_apart"]) == (frames, 0)
        assert both["ratio_r"] == approx(1) and both["ratio_difference"] == approx(0, scale=1)
    short = video_metrics.compare(slow, twice._replace(**{n: getattr(twice, n)[:40] for n in ("time", "sharpness", "mouth_sharpness")},
                                                       ratios={n: v[:40] for n, v in twice.ratios.items()}))  # fmt: skip
    assert short["frames_apart"] == 30 and short["frames_compared"] == 20


def test_curves_of_different_rates_share_one_time_axis():
    values = np.concatenate([np.zeros(50), np.ones(50)])
    times = [np.arange(100) / 50 + 0.01, np.arange(100) / 25 + 0.02]
    picture = np.asarray(draw_curves([("a", values), ("b", values)], 4.0, "x", 500, 120, left=0, right=0, times=times))
    ends = [np.flatnonzero((picture == colour).all(-1)[22:].any(0)).max() for colour in COLOURS[:2]]
    assert ends[0] == pytest.approx(250, abs=4) and ends[1] > 490


def test_curves_are_drawn_where_the_values_are():
    half = np.concatenate([np.zeros(50), np.ones(50)])
    picture = np.asarray(draw_curves([("a", half), ("b", np.full(100, np.nan))], 4, "x", 500, 120))
    inked = (picture == COLOURS[0]).all(-1)[22:]  # below the legend
    left, right = inked[:, 100:280], inked[:, 310:]
    assert np.flatnonzero(left.any(1)).mean() > np.flatnonzero(right.any(1)).mean() + 50
    assert not (picture == COLOURS[1]).all(-1)[22:].any()
    assert stack([Image.new("RGB", (10, 4)), Image.new("RGB", (8, 3))]).size == (10, 7)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("judged") / "talker.mp4"
    clip = make_clip(11, frames=24, size=256)
    write_clip(clip, path)
    return path, clip


def test_outputs_that_cannot_be_are_refused_before_the_work(video, tmp_path):
    path, _ = video
    before = path.read_bytes()
    for words, message in (
        (("-o", path), "named twice"),
        (("-o", tmp_path / "a.json", "--series", tmp_path / "a.json"), "named twice"),
        (("-o", tmp_path), "is a folder"),
        (("-o", os.devnull), "is no ordinary file"),
    ):
        with pytest.raises(UsageError, match=message):
            _command("--video", path, *words)
    assert path.read_bytes() == before
    with pytest.raises(UsageError, match="--microbatch is 0"):
        _command("--talkers", "--model", "demo", "--microbatch", 0)
    with pytest.raises(UsageError, match="--gate judges one guidance"):
        _command("--talkers", "--model", "demo", "--gate", "--guidance-grid", "1/1,2/2")


def test_outputs_are_whole_or_as_they_were(tmp_path, monkeypatch):
    table, series, plot = (tmp_path / name for name in ("a.json", "a.csv", "a.png"))
    for path in (table, series, plot):
        path.write_text("before")

    def full(path, *args, **kwargs):
        Path(path).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")  # as a full disk says it: without a name

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(KeySyncError, match=r"a\.json: the disk is full"):
            evaluate_verbs._write(str(table), {})
    with monkeypatch.context() as patch:
        patch.setattr(video_metrics.csv, "writer", lambda file, **_: full(file.name))
        with pytest.raises(KeySyncError, match=r"a\.csv: the disk is full"):
            video_metrics.write_series(series, _figures([0.1, 0.2]))
    figures = _figures(np.linspace(0, 1, 20))
    monkeypatch.setattr(video_report, "_read", lambda *_: figures)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda picture, path: full(path))
        with pytest.raises(KeySyncError, match=r"a\.png: the disk is full"):
            video_report.evaluate_video("x.mp4", plot=plot)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(("a.json", "a.csv", "a.png"), "before")
    video_report.evaluate_video("x.mp4", plot=plot, series=series)
    assert Image.open(plot).size == (480, 200) and len(series.read_text().splitlines()) == 21


def _command(*words):
    parser = argparse.ArgumentParser()
    evaluate_verbs.add_evaluate(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, words)])
    return args.run(args)


def test_command_on_a_video_with_known_mouth(video, tmp_path, capsys):
    path, clip = video
    files = [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    assert _command("--video", path, "--reference", path, "--audio-silent", "-o", files[0], "--series", files[1], "--plot", files[2],
                    "--quiet") == 0  # fmt: skip
    report = json.loads(files[0].read_text())
    exact = video_metrics.mouth_ratio(clip.landmarks)
    # The detector misjudges a frame or three of this clip, where the mouth is a shade above or below the threshold.
    assert report["lip_leak"] == report["generated"]["open"] == pytest.approx((exact > 0.25).mean(), abs=0.13)
    assert report["comparison"]["ratio_r"] == 1 and report["comparison"]["sharpness_difference"] == 0
    assert list(report["generated"]["sweep"].values()) == sorted(report["generated"]["sweep"].values(), reverse=True)
    rows = list(csv.DictReader(files[1].open()))
    assert len(rows) == 24 and [float(r["time"]) for r in rows[:2]] == [0.0, 0.04]
    seen = [(float(r["ratio_inner"]), e) for r, e in zip(rows, exact, strict=True) if r["ratio_inner"]]
    assert len(seen) >= 20 and np.corrcoef(np.array(seen).T)[0, 1] > 0.9
    assert Image.open(files[2]).width >= 190
    assert "LipLeak" in capsys.readouterr().out


def test_bad_input_gets_one_clear_line(video, tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("minutes of a meeting\n" * 40)
    for words, message in (
        (["--video", tmp_path / "nowhere.mp4"], "nowhere.mp4"),
        (["--video", text], "notes.mp4"),
        (["--video", video[0], "--threshold", "3"], "--threshold 3"),
        (["--video", video[0], "--series", tmp_path / "a.txt"], r"write \.csv or \.json"),
        (["--video", video[0], "--plot", tmp_path / "a.gif"], r"write a \.png"),
        (["--video", video[0], "--series", tmp_path / "no" / "a.csv"], "does not exist; create it"),
    ):
        with pytest.raises(KeySyncError, match=message) as caught:
            _command(*words, "--quiet")
        assert "\n" not in str(caught.value)
