"""Judging on drawn talkers: impostors whose verdict is known, and a tiny real model through the whole path."""

import argparse
import dataclasses
import functools
import json
import math
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_talker_model

from keysync_jax import KeySyncPipeline
from keysync_jax.cli import evaluate_verbs
from keysync_jax.cli.main import main
from keysync_jax.config import MaskConfig
from keysync_jax.converters import model_directory
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, plan_clip
from keysync_jax.evaluation import lip_metrics, marks, talkers, talkers_clips, talkers_model, talkers_report
from keysync_jax.evaluation.talkers_model import Scales, TalkerModel, one_stage_windows
from keysync_jax.media import video

PLAIN = Scales((1.0, 1.0), (1.0, 1.0))


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """Impostors look at the clips that the evaluation draws; each is drawn once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(talkers_clips, "held_out", functools.lru_cache(maxsize=None)(talkers_clips.held_out))
        yield


class Impostor:
    """Stands where a model stands and answers with frames of its choice."""

    mode, group, microbatch, steps, dtype = "dub", 8, 1, 10, "none"

    def __init__(self, answer, test):
        self._answer, self._test = answer, test

    def prepare(self, clips, seed):
        return [types.SimpleNamespace(number=number, frames=clip.frames) for number, clip in clips]

    def generate(self, clips, voices, scales, seed, tick):
        self._voices = voices
        return [dict.fromkeys(range(len(clip.frames))) for clip in clips]

    def compose(self, clips, latents):
        for clip, voice in zip(clips, self._voices, strict=True):
            held = talkers_clips.held_out(self._test.split, self._test.seed, clip.number, self._test.frames, self._test.size)
            yield self._answer(held, voice, self._test)

    def seams(self, frames):
        return range(13, frames - 1, 13)

    def outside(self, clip):
        mask = np.ones(clip.frames.shape[:3], bool)
        mask[:, 60:, 20:108] = False
        return mask


def _truth(held, voice, test):
    if voice is held.target.samples:
        return held.target.frames
    return talkers_clips.silent_target(test.split, test.seed, held, talkers_clips.silence_of(held.number)).frames


def _copy(held, voice, test):
    return held.source.frames


def _late(held, voice, test):
    return np.concatenate([held.target.frames[:1]] * 3 + [held.target.frames[:-3]])


def _leaky(held, voice, test):
    return held.target.frames if voice is held.target.samples else held.source.frames


def _first_one_still(held, voice, test):
    return held.target.frames[:1].repeat(test.frames, axis=0) if held.number == 0 else held.target.frames


def _smeared(held, voice, test):
    out = held.source.frames.copy()
    out[:, 60:, 20:108] = 128
    return out


TEST = talkers.TalkerTest(clips=6, silent_clips=3)


def _run(answer, test=TEST):
    directory = types.SimpleNamespace(describe=lambda: {"path": "impostor"})
    return talkers.evaluate(directory, test, Impostor(answer, test), [PLAIN])[0]


@pytest.fixture(scope="module")
def truth():
    return _run(_truth)


def test_a_jump_between_windows_shows_where_they_meet():
    def patchwork(held, voice, test):  # every other window is darker
        frames = held.target.frames.copy()
        frames[np.arange(len(frames)) // 13 % 2 == 1] //= 2
        return frames

    output = _run(patchwork, talkers.TalkerTest(clips=1, silent_clips=0, seconds=2))["columns"]["output"]
    assert output["seam_flicker"] > 2 * output["flicker"] > 2  # it would be equal if all frames counted


def test_the_true_target_passes_every_mark(truth):
    assert all(row["passed"] for row in truth["marks"]) and len(truth["marks"]) == len(marks.TALKERS)
    output = truth["columns"]["output"]
    assert output["opening_r"] > 0.99 and output["silence_open"] <= 0.01 and output["closed"] == 1 and output["flicker"] == 1
    assert output["seam_flicker"] == 1
    assert abs(output["input_leak"]) < 0.02 and abs(output["silence_leak"]) < 0.02
    baseline = truth["columns"]["truth"]
    assert {key: output[key] for key in baseline if key in output} == {key: baseline[key] for key in baseline if key in output}
    assert truth["pooled"]["output"]["opening_r"] > 0.98


def test_copying_the_input_fails():
    report = _run(_copy)
    verdicts = {row["key"]: row["passed"] for row in report["marks"]}
    assert verdicts == {
        "measurer_opening_r": True, "measurer_width_r": True, "opening_r": False, "width_r": False, "lag": False, "closed": False,
        "partial_r": False, "silence_open": False, "silence_input_open": True, "outside_change": True,
    }  # fmt: skip
    assert abs(report["columns"]["output"]["opening_r"]) < 0.35
    # A copy leaks 1; what the measurer adds to a drawn mouth is under a fiftieth, as in the test above.
    assert all(report["columns"]["output"][key] == pytest.approx(1, abs=0.02) for key in ("input_leak", "silence_leak"))
    baseline, output = report["columns"]["copied input"], report["columns"]["output"]
    assert baseline["opening_r"] == output["opening_r"] and baseline["silence_open"] == output["silence_open"] >= 0.4


def test_a_late_mouth_is_found_late():
    report = _run(_late, talkers.TalkerTest(clips=2, silent_clips=0))
    output = report["columns"]["output"]
    assert output["lag"] == output["lag_signed"] == 3 and output["lag_within_1"] == output["lag_missing"] == 0


def test_a_clip_without_a_lag_misses_the_mark():
    report = _run(_first_one_still, talkers.TalkerTest(clips=3, silent_clips=0))
    output = report["columns"]["output"]
    assert [math.isnan(row["lag"] or 0) or row["lag"] for row in report["per_clip"]] == [None, 0, 0]
    assert output["lag"] == output["lag_signed"] == 0 and output["lag_missing"] == 1  # of the two that have one
    assert output["lag_within_1"] == pytest.approx(2 / 3, abs=0.501e-4)  # reports keep four decimals
    assert {row["key"]: row["passed"] for row in report["marks"]}["lag"] is False
    assert report["columns"]["truth"]["lag_missing"] == 0


def test_the_stored_result_of_the_bundled_model_stands():
    stored = json.loads((Path(__file__).parents[2] / "docs" / "measurements" / "talkers_demo.json").read_text())
    column = stored["columns"]["output"]
    clips = [{key: math.nan if value is None else value for key, value in row.items() if key != "clip"} for row in stored["per_clip"]]
    again = marks.clean(talkers.summarize(clips))
    assert {key: again[key] for key in ("lag", "lag_error", "lag_signed", "lag_within_1", "lag_missing")} == {
        "lag": 0, "lag_error": 0, "lag_signed": 0, "lag_within_1": 1, "lag_missing": 0,
    }  # fmt: skip
    assert {key: again[key] for key in ("opening_r", "width_r", "closed", "partial_r")} == pytest.approx(
        {key: column[key] for key in ("opening_r", "width_r", "closed", "partial_r")}, abs=1.01e-4
    )  # the stored mean has four decimals, and so has each clip's figure that is averaged again
    rows = marks.judge(talkers.marks_of(stored), {**stored["columns"]["truth"], **column, "lag_missing": again["lag_missing"]})
    assert rows == stored["marks"] and all(row["passed"] for row in rows) and stored["passed"]


def test_stored_grids_claim_no_pass():
    runs = json.loads((Path(__file__).parents[2] / "docs" / "measurements" / "guidance_demo.json").read_text())["runs"]
    for run in runs:
        test = talkers.TalkerTest(**{key: value for key, value in run["test"].items() if key != "frames"})
        assert run["passed"] is None and run["undecided"] == test.undecided


@pytest.fixture
def small_marks(monkeypatch):
    """As if the marks were for two clips of six seconds."""
    monkeypatch.setattr(marks, "CLIPS", 2)
    monkeypatch.setattr(marks, "SILENT_CLIPS", 2)


def test_a_small_test_passes_nothing(truth, capsys):
    assert truth["passed"] is None and "50 clips of 6 s or more, this test of 6 of 6 s decides nothing" in truth["undecided"]
    talkers_report.show_talkers(truth)
    assert f"all {len(marks.TALKERS)} marks are met; the marks are for 50 clips" in capsys.readouterr().out
    for test, decides in (
        (talkers.TalkerTest(), True),
        (talkers.TalkerTest(clips=49), False),
        (talkers.TalkerTest(seconds=5.9), False),
        (talkers.TalkerTest(silent_clips=23), False),
        (talkers.TalkerTest(silent_clips=0), False),
        (talkers.TalkerTest(silent_clips=0, mode="keyframes"), True),  # whose marks hold none under silence
    ):
        assert (test.undecided is None) == decides


def test_a_test_of_full_size_decides(small_marks):
    test = talkers.TalkerTest(clips=2)
    good, bad = _run(_truth, test), _run(_leaky, test)
    assert (good["passed"], good["undecided"]) == (True, None) and (bad["passed"], bad["undecided"]) == (False, None)


def test_silence_left_out_is_not_measured_and_not_passed(small_marks, capsys):
    report = _run(_truth, talkers.TalkerTest(clips=2, silent_clips=0))
    rows = {row["key"]: (row["figure"], row["passed"]) for row in report["marks"]}
    assert rows["silence_open"] == rows["silence_input_open"] == (None, None) and rows["opening_r"][1]
    assert report["passed"] is None and "this test dubs 0 with silence" in report["undecided"]
    talkers_report.show_talkers(report)
    shown = capsys.readouterr().out
    assert shown.count("not measured") == 3 and "8 of 10 marks are met; not measured: open mouth under silence" in shown
    assert "all 10 marks" not in shown


def test_a_leak_under_silence_is_found(truth):
    report = _run(_leaky)
    assert report["columns"]["output"]["silence_open"] >= 0.4
    assert report["columns"]["output"]["opening_r"] == truth["columns"]["output"]["opening_r"]
    assert set(report["silence"]["kinds"]) == set(talkers_clips.SILENCES)


def test_a_smear_is_neither_closed_nor_silent():
    output = _run(_smeared, talkers.TalkerTest(clips=2, silent_clips=2))["columns"]["output"]
    assert output["found"] == 0 and output["closed"] == 0 and output["silence_open"] == 1


def test_the_loudness_meter_fails(truth):
    meter = truth["columns"]["loudness meter"]
    assert meter["opening_r"] > 0.3 and abs(meter["partial_r"]) < 0.05


def test_held_out_seeds_meet_no_other_set():
    def used(split, seed):
        return {s for number in range(200) for s in talkers_clips.seeds_of(split, seed, number)}

    sets = [used("test", 0), used("validation", 0), used("demo", 0), used("test", 1)]
    plans = [plan_clip(i, SynthSettings(seed=seed)) for seed in (0, 1, 2026) for i in range(200)]
    sets.append({s for plan in plans for s in (plan.identity_seed, plan.audio_seed, plan.motion_seed)} | set(range(100_000)))
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            assert not one & other


def test_a_held_out_clip_is_one_person_with_two_voices():
    clip = talkers_clips.held_out("test", 0, 1, 60, 64)
    again = talkers_clips.held_out.__wrapped__("test", 0, 1, 60, 64)
    np.testing.assert_array_equal(clip.target.frames, again.target.frames)
    assert clip.source.identity == clip.target.identity
    np.testing.assert_array_equal(clip.source.landmarks[:, 17:48], clip.target.landmarks[:, 17:48])  # the jaw moves with the mouth
    assert abs(np.corrcoef(clip.source.samples, clip.target.samples)[0, 1]) < 0.1
    maximum = clip.source.opening.max()
    assert lip_metrics.is_open(clip.source.opening, maximum).mean() >= 0.4
    quiet = talkers_clips.silent_target("test", 0, clip, "digital silence")
    assert not quiet.samples.any() and quiet.opening.max() == 0
    with pytest.raises(UsageError, match="no split called 'train'"):
        talkers_clips.held_out("train", 0, 1)


@pytest.mark.parametrize("frames", [1, 3, 4, 50])
def test_one_stage_makes_every_frame_once(frames):
    windows = one_stage_windows(frames, 4)
    kept = [(w.frames[position], number) for w in windows for position, number in w.kept]
    assert kept == [(f, f) for f in range(frames)]
    assert all(len(w.slots) == 4 and w.slots[0] == (0, None) for w in windows)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_talker_model.make(tmp_path_factory.mktemp("talker_model") / "model")


@pytest.fixture(scope="module")
def small():
    return talkers.TalkerTest(clips=2, silent_clips=1, seconds=0.8, size=64)


@pytest.fixture(scope="module")
def dubbing(tiny, small):
    """Two guidances on the same clips with the same noise."""
    directory = model_directory.load(tiny)
    model = TalkerModel(directory, microbatch=2)
    ticks = []
    scales = [model.own_scales(), Scales((4.0, 1.0), (1.5, 1.0)), model.own_scales()]
    return model, ticks, talkers.evaluate(directory, small, model, scales, lambda: ticks.append(1))


@pytest.fixture(scope="module")
def image_model(tmp_path_factory):
    return tiny_talker_model.make(tmp_path_factory.mktemp("image_model") / "model", image_keyframes=True)


def test_keyframes_made_one_by_one_are_judged(image_model, small):
    directory = model_directory.load(image_model)
    ticks = []
    model = TalkerModel(directory, microbatch=2)
    report = talkers.evaluate(directory, small, model, [model.own_scales()], lambda: ticks.append(1))[0]
    # 20 frames in segments of 4: 8 keyframes, each alone, and 7 segments per dub.
    assert len(ticks) == talkers.total_windows(small, model) == 3 * 15
    assert report["columns"]["output"]["outside_change"] == 0 and report["columns"]["output"]["flicker"] > 1.5
    alone = TalkerModel(directory, "keyframes", microbatch=2)
    assert alone.num_windows(20) == 3  # without a second stage, keyframes stand where the reference puts them: 0, 13, 26
    with pytest.raises(KeySyncError, match="every frame on its own.*--one-stage needs windows"):
        TalkerModel(directory, "one stage")


@pytest.mark.slow
def test_keyframes_made_one_by_one_dub_a_file(image_model, talker, tmp_path):
    result = KeySyncPipeline.from_pretrained(image_model)(talker / "clip.mp4", talker / "voice.wav", tmp_path / "out.mp4")
    assert result.report["frames_dubbed"] == 30 == len(list(video.read(tmp_path / "out.mp4")))


def test_seams_are_where_two_windows_meet(tiny, dubbing):
    assert dubbing[0].seams(20) == (3, 6, 9, 12, 15, 18)  # segments of 4 share their keyframes; nothing follows the last frame
    directory = model_directory.load(tiny)
    assert TalkerModel(directory, "keyframes", microbatch=2).seams(20) == ()
    alone = TalkerModel(directory, "one stage", microbatch=2)
    owner = [i for i, w in enumerate(one_stage_windows(20, alone.keyframe.num_frames)) for _ in w.kept]
    assert len(set(owner)) > 2 and len(owner) == 20
    assert alone.seams(20) == tuple(frame for frame in range(1, 19) if owner[frame - 1] != owner[frame + 1])


def test_a_real_model_runs_through(dubbing, small):
    model, ticks, (first, other, again) = dubbing
    assert len(ticks) == talkers.total_windows(small, model, 3) == 3 * 3 * 10  # 3 keyframe windows and 7 segments per dub
    assert first["columns"]["output"]["outside_change"] == 0
    assert first["columns"]["output"]["flicker"] > 1.5  # a random model's mouth is noise
    assert first["columns"]["output"]["seam_flicker"] > 1.5
    assert first["guidance"] == "1.5/1" and other["guidance"] == "4/1:1.5/1"
    assert first["per_clip"] == again["per_clip"] and first["per_clip"] != other["per_clip"]
    assert [row["clip"] for row in first["per_clip"]] == [0, 1] and len(first["silence"]["per_clip"]) == 1
    assert json.loads(json.dumps(first)) == first


def test_compose_changes_the_mask_and_nothing_else(dubbing, small):
    model = dubbing[0]
    clip = talkers_clips.held_out("test", 0, 0, small.frames, 64)
    prepared = model.prepare([(0, clip.source)], 0)
    plain = np.stack([next(iter(prepared)).known[0]] * 2)
    (frames,) = model.compose(prepared, [{3: plain[0], 7: plain[1]}])
    outside = model.outside(prepared[0])[[3, 7]]
    difference = np.abs(frames.astype(int) - clip.source.frames[[3, 7]]).max(-1)
    assert difference[outside].max() == 0 and difference[~outside].mean() > 5
    # The region is the box under the eyes, and it covers the mouth.
    lips = clip.source.landmarks[3, 48:68].astype(int)
    assert not outside[0][lips[:, 1], lips[:, 0]].any() and outside[0][: int(clip.source.landmarks[3, 27, 1]) - 8].all()


def test_keyframes_only_needs_no_interpolation_stage(tiny, small):
    whole = model_directory.load(tiny)
    parts = {name: part for name, part in whole.parts.items() if name != "interpolation"}
    directory = model_directory.ModelDirectory(whole.path, parts, whole.index)
    model = TalkerModel(directory, "keyframes", microbatch=2)
    test = talkers.TalkerTest(clips=1, silent_clips=0, seconds=0.8, size=64, mode="keyframes")
    report = talkers.evaluate(directory, test, model, [PLAIN])[0]
    assert {row["key"] for row in report["marks"]} == {mark.key for mark in marks.KEYFRAMES}
    clip = model.prepare([(0, talkers_clips.held_out("test", 0, 0, test.frames, 64).source)], 0)
    (found,) = model.generate(clip, [np.zeros(640 * test.frames, np.float32)], PLAIN, 0)
    assert sorted(found) == [0, 3, 6, 9, 12, 15, 18, 19]  # the last one stands for what lies past the end
    with pytest.raises(KeySyncError, match="has no part interpolation"):
        TalkerModel(directory, "dub")


def test_stages_of_different_masks_are_refused_as_by_a_dub(tiny):
    whole = model_directory.load(tiny)
    part = whole.parts["interpolation"]
    other = dataclasses.replace(part, config=dataclasses.replace(part.config, mask=MaskConfig(kind="mouth")))
    directory = model_directory.ModelDirectory(whole.path, {**whole.parts, "interpolation": other}, whole.index)
    with pytest.raises(
        KeySyncError, match=r"different masks \(box at landmark 28 and mouth at landmark 28\); --keyframes-only judges the first"
    ):
        TalkerModel(directory)


class _Faithful:
    """A coder that keeps everything, or everything but the mouth's motion."""

    def __init__(self, *args, frozen=False, **kwargs):
        self._frozen = frozen

    def encode(self, frames, seed):
        return [image for _, image in frames]

    def decode(self, latents):
        return [((latents[0] if self._frozen else image) + 1) / 2 for image in latents]


def test_the_vae_gate(tiny, small_marks, monkeypatch):
    monkeypatch.setattr(marks, "SECONDS", 4)
    directory = model_directory.load(tiny)
    monkeypatch.setattr(talkers, "_resolution", lambda *_: 128)
    monkeypatch.setattr(talkers, "LatentCoder", _Faithful)
    test = talkers.TalkerTest(clips=2, seconds=4)
    good = talkers.evaluate_vae(directory, test)
    assert good["passed"] and good["columns"]["decoded"]["pixel_error"] < 0.01
    monkeypatch.setattr(talkers, "LatentCoder", functools.partial(_Faithful, frozen=True))
    assert talkers.evaluate_vae(directory, test)["passed"] is False


def _command(*words):
    parser = argparse.ArgumentParser()
    evaluate_verbs.add_evaluate(parser.add_subparsers())
    args = parser.parse_args(["evaluate", *map(str, words)])
    return args.run(args)


def test_command_vae_writes_json_and_gates(tiny, tmp_path, small_marks, monkeypatch, capsys):
    small = ["--clips", 1, "--seconds", 0.8, "--size", 64, "--microbatch", 4]
    words = ["--vae", "--model", tiny, *small, "--quiet", "-o", tmp_path / "vae.json"]
    assert _command(*words) == 0  # a missed mark is a result, not an error
    report = json.loads((tmp_path / "vae.json").read_text())
    assert report["kind"] == "vae" and report["columns"]["decoded"]["opening_r"] < 0.9 and report["passed"] is None
    with pytest.raises(UsageError, match="--gate needs a test that can decide: the marks are for 2 clips of 6 s or more"):
        _command(*words, "--gate")
    for name, value in (("CLIPS", 1), ("SILENT_CLIPS", 1), ("SECONDS", 0.8)):
        monkeypatch.setattr(marks, name, value)
    assert _command(*words, "--gate") == 1
    assert json.loads((tmp_path / "vae.json").read_text())["passed"] is False
    assert "marks are missed" in capsys.readouterr().out


def test_command_compares_guidances(tiny, tmp_path, capsys):
    _command(
        "--talkers", "--model", tiny, "--keyframes-only", "--clips", 1, "--silent-clips", 0, "--seconds", 0.8, "--size", 64,
        "--guidance-grid", "5/2,1/1", "-o", tmp_path / "grid.json", "--quiet", "--microbatch", 2,
    )  # fmt: skip
    runs = json.loads((tmp_path / "grid.json").read_text())["runs"]
    assert [run["guidance"] for run in runs] == ["5/2", "1/1"]
    assert all(run["test"]["split"] == "validation" for run in runs)
    assert "best correlation of the opening" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--talkers"], "need --model"),
        (["--vae", "--model", "x", "--guidance-grid", "5/2"], "--guidance-grid does not go with --vae"),
        (["--video", "a.mp4", "--model", "x"], "--model does not go with --video"),
        (["--talkers", "--model", "x", "--plot", "a.png"], "--plot does not go with --talkers"),
        (["--talkers", "--model", "x", "--threshold", "0.25"], "--threshold does not go with --talkers"),
        (["--talkers", "--model", "x", "--ratio", "inner"], "--ratio does not go with --talkers"),
        (["--talkers", "--model", "x", "--face", "largest"], "--face does not go with --talkers"),
        (["--talkers", "--model", "x", "--faces", "mediapipe"], "--faces does not go with --talkers"),
        (["--vae", "--model", "x", "--face-weights", "fan"], "--face-weights does not go with --vae"),
        (["--vae", "--model", "x", "--silent-clips", "0"], "--silent-clips does not go with --vae"),
        (["--video", "a.mp4", "--seconds", "6"], "--seconds does not go with --video"),
        (["--video", "a.mp4", "--seed", "0"], "--seed does not go with --video"),
        (["--video", "a.mp4", "--size", "128"], "--size does not go with --video"),
        (["--talkers", "--model", "x", "--steps", "0"], "--steps is 0; the noise schedule is defined from 10 steps up"),
        (["--talkers", "--model", "x", "--steps", "9"], "--steps is 9"),
        (["--talkers", "--model", "x", "--gate", "--clips", "49"], "--gate needs a test that can decide.* this test of 49"),
        (["--talkers", "--model", "x", "--gate", "--silent-clips", "0"], "--gate needs a test that can decide.* 0 with silence"),
        (["--talkers", "--model", "x", "--split", "test", "--guidance-grid", "5/2"], "validation split"),
        (["--talkers", "--model", "x", "--keyframes-only", "--one-stage"], "contradict"),
        (["--talkers", "--model", "x", "--guidance-grid", "5-2"], "must read like 5/2"),
        (["--talkers", "--model", "x", "--guidance-grid", "5/2:1/1:1/1"], "must read like 5/2"),
        (["--talkers", "--model", "x", "--clips", "0"], "at least 1"),
        (["--talkers", "--model", "x", "--clips", "3", "--silent-clips", "4"], "between 0 and --clips"),
    ],
)
def test_wrong_commands_say_what_is_wrong(words, message, capsys):
    with pytest.raises(UsageError, match=message):
        _command(*words)
    assert main(["evaluate", *words]) == 2
    assert capsys.readouterr().err.startswith("keysync: error: ")


def test_what_does_not_exist_is_named():
    for words, message in (
        (["--talkers", "--model", "nowhere"], "nowhere does not exist"),
        (["--talkers", "--model", "x", "-o", "no/such/folder/a.json"], "does not exist; create it"),
    ):
        with pytest.raises(KeySyncError, match=message):
            _command(*words)


def test_scales_of_both_stages():
    assert talkers_model.Scales((5, 2), (5, 2)).text == "5/2"
    assert [s.text for s in talkers_model.parse_grid("5/2, 2.5/1.5:1/1")] == ["5/2", "2.5/1.5:1/1"]
