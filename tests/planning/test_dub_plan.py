"""`keysync plan --dub` and `keysync doctor`."""

import json

import pytest

from keysync_jax.cli.main import main
from keysync_jax.converters.initialize import configurations
from keysync_jax.core.errors import UsageError
from keysync_jax.planning import doctor
from keysync_jax.planning.dub_plan import make_dub_plan
from keysync_jax.planning.recipe_plan import parse_topology


def test_a_plan_counts_windows_as_a_dub_does_and_scales_with_the_video():
    stages, vae, _ = configurations("tiny")
    one = make_dub_plan([10.0], stages, vae, parse_topology("h200"), price=3.6)
    many = make_dub_plan([10.0] * 3, stages, vae, parse_topology("h200x3"), price=3.6)
    # 250 frames: keyframes at every 13th frame from 0 to 260, which is 20 segments; 21 keyframes, 13 new ones in a window.
    assert (one.windows["interpolation"], one.windows["keyframe"], one.evaluations["keyframe"]) == (20, 2, 33)
    assert many.flops == pytest.approx(3 * one.flops) and many.seconds == pytest.approx(one.seconds) and many.segments == 60
    assert one.cost == pytest.approx(3.6 * one.seconds / 3600) and one.fits is True
    assert many.device_bytes == one.device_bytes > 0 and many.scratch_bytes == one.scratch_bytes == 2 * 4 * 4 * 16 * 16 * 250
    with pytest.raises(UsageError, match="above 0"):
        make_dub_plan([0.0], stages, vae, parse_topology("cpu"))


def test_the_command_takes_seconds_or_a_list(tiny_model, talker, tmp_path, capsys):
    (tmp_path / "jobs.csv").write_text(f"id,video,audio\na,{talker}/clip.mp4,{talker}/voice.wav\nb,gone.mp4,{talker}/voice.wav\n")
    assert main(["plan", "--dub", str(tmp_path / "jobs.csv"), "--model", str(tiny_model), "--topology", "v5e:2x2", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("b: left out:") and json.loads(out[out.index("{") :])["video_seconds"] == pytest.approx(1.2)
    assert main(["plan", "--dub", "1.2", "--model", str(tiny_model), "--topology", "cpu:8"]) == 0
    assert "1 clips, 1.2 s of video on cpu:8" in capsys.readouterr().out
    assert main(["plan", "--topology", "h200"]) == 2


def test_doctor_finds_nothing_wrong_here_and_says_what_is_wrong_elsewhere(tiny_model, tmp_path, capsys, monkeypatch):
    assert main(["doctor", "--model", str(tiny_model), "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a dub can run here" in out and "random" in out and "codecs" in out
    monkeypatch.setattr(doctor.face_models, "is_here", lambda: False)
    assert main(["doctor", "--model", str(tmp_path / "none"), "--json"]) == 1
    found = {row["what"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["face models"]["fix"] == "keysync fetch faces" and found["model"]["state"] == "bad"
