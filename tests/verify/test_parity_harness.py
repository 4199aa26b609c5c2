"""The harness must fail when it should: these tests build small cases and spoil the answers."""

import io
import json

import numpy as np
import pytest
import rich.console
import safetensors.numpy
from bounds import approx

from keysync_jax.core.errors import KeySyncError
from keysync_jax.verify import harness as parity


def write_case(folder, name, tensors, tolerances=None, **meta):
    case = folder / name
    case.mkdir(parents=True)
    listing = {key: {"shape": list(value.shape), "dtype": str(value.dtype)} for key, value in tensors.items()}
    content = {"name": name, "tensors": listing, "tolerances": {"per_tensor": tolerances or {}}, **meta}
    (case / "case.json").write_text(json.dumps(content))
    safetensors.numpy.save_file(tensors, case / "io.safetensors")
    return case


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs one case against a runner that returns `got` (or is a function of the case)."""

    def run_(got, tensors, tolerances=None, **meta):
        runner = got if callable(got) else lambda case: got
        monkeypatch.setitem(parity.CASES, "made_up", runner)
        return parity.run_case(parity.load_case(write_case(tmp_path, "made_up", tensors, tolerances, **meta)))

    return run_


STORED = {"in.x": np.float32([1, 2]), "out.y": np.float32([1, 100])}


def test_within_tolerance(run):
    result = run({"out.y": np.float32([1, 100.5])}, STORED, {"y": {"atol": 1.0}})
    assert result.ok
    assert result.ratio == approx(0.5)
    assert result.worst.name == "out.y"


@pytest.mark.parametrize(
    ("got", "reason"),
    [
        ({"out.y": np.float32([1, 101.5])}, ""),
        ({}, "did not return"),
        ({"out.y": np.float32([1])}, "shape"),
        ({"out.y": np.float32([1, np.nan])}, "1 of 2 values are not finite"),
        ({"out.y": np.float32([np.inf, np.nan])}, "2 of 2"),
    ],
)
def test_wrong_answers_fail(run, got, reason):
    result = run(got, STORED, {"y": {"atol": 1.0}})
    assert not result.ok
    assert result.ratio > 1
    assert reason in result.worst.reason


def test_tolerance_per_step(run):
    stored = {"mid.x": np.float32([[1000, 0], [1, 0]])}
    tolerances = {"mid.x": {"atol": 10.0, "atol_per_step": [10.0, 0.1]}}
    assert run({"mid.x": np.float32([[1009, 0], [1, 0]])}, stored, tolerances).ratio == approx(0.9)


def test_tolerance_per_step_is_per_step(run):
    stored = {"mid.x": np.float32([[1000, 0], [1, 0]])}
    tolerances = {"mid.x": {"atol": 10.0, "atol_per_step": [10.0, 0.1]}}
    assert run({"mid.x": np.float32([[1000, 0], [1.5, 0]])}, stored, tolerances).ratio == approx(5)


def test_number_of_steps_must_match(run):
    result = run(STORED, STORED, {"y": {"atol_per_step": [1.0]}})
    assert not result.ok
    assert "1 tolerances" in result.worst.reason


def test_default_tolerance_is_relative_to_the_tensor(run):
    assert run({"out.y": np.float32([1.0019, 100])}, STORED).ratio == pytest.approx(0.95, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "entry", "off", "ok"),
    [
        ((4, 3, 2, 2), {"exact": False, "atol": 1}, 1, True),
        ((4, 3, 2, 2), {"exact": False, "atol": 1}, 2, False),
        ((4, 3, 2, 2), None, 1, True),  # video without an entry
        ((4, 1, 2, 2), None, 1, False),  # masks without an entry
        ((4, 1, 2, 2), {"exact": True}, 1, False),
        ((4, 1, 2, 2), {"exact": True}, 0, True),
    ],
)
def test_eight_bit_tensors(run, shape, entry, off, ok):
    stored = np.full(shape, 7, np.uint8)
    assert run({"out.v": stored - np.uint8(off)}, {"out.v": stored}, {"v": entry} if entry else None).ok is ok


def test_integers_must_stay_integers(run):
    result = run({"out.i": np.float32([1, 2])}, {"out.i": np.array([1, 2])})
    assert not result.ok
    assert "float32" in result.worst.reason


def test_zero_tolerance_allows_equality_only(run):
    assert run({"out.y": STORED["out.y"]}, STORED, {"y": {"atol": 0.0}}).ok


def test_non_finite_reference_vouches_for_nothing(run):
    stored = {"out.y": np.float32([np.inf])}
    assert not run({"out.y": np.float32([1])}, stored, {"y": {"atol": 1.0}}).ok


def test_checks_and_comparisons_of_a_runner(run):
    def runner(case):
        case.compare("norm", 1.0, 1.00001)
        case.check_equal("windows", {"a": [1, (2, 3)]}, {"a": [1, [2, 3]]})
        case.check("refused", True)
        return {"out.y": case.expected["out.y"]}

    result = run(runner, STORED)
    assert result.ok
    assert [c.name for c in result.comparisons] == ["out.y", "norm", "windows", "refused"]


@pytest.mark.parametrize(
    ("got", "expected", "reason"),
    [
        ({"a": [1, 2]}, {"a": [1, 3]}, "value['a'][1] is 2, expected 3"),
        ({"a": [1]}, {"a": [1, 3]}, "1 items, expected 2"),
        ({}, {"a": 1}, "lacks 'a'"),
        ({"a": 1, "b": 2}, {"a": 1}, "unexpected key 'b'"),
        ([1], [True], "is 1, expected True"),
        (None, [], "is None"),
    ],
)
def test_first_difference_is_named(run, got, expected, reason):
    result = run(lambda case: case.check_equal("json", got, expected) or {}, {})
    assert not result.ok
    assert reason in result.worst.reason


def test_nothing_compared_is_a_failure(run):
    result = run({}, {})
    assert not result.ok
    assert "nothing" in result.reason


def test_a_raising_runner_is_a_failed_case(run):
    def runner(case):
        raise KeyError("config.width")

    result = run(runner, STORED)
    assert not result.ok
    assert result.ratio == float("inf")
    assert "KeyError" in result.reason
    assert "config.width" in result.reason


def test_unknown_case_fails_with_the_reason(tmp_path):
    write_case(tmp_path, "never_heard_of", STORED)
    (result,) = parity.run_folder(tmp_path)
    assert not result.ok
    assert "no runner" in result.reason


def test_named_case_must_exist(tmp_path):
    (result,) = parity.run_folder(tmp_path, ["absent"])
    assert not result.ok
    assert "absent" in result.reason


def test_weights_are_filtered_prefixed_and_merged(tmp_path):
    neighbour = tmp_path / "neighbour"
    neighbour.mkdir()
    safetensors.numpy.save_file({"model.w": np.float32([1]), "vae.w": np.float32([2])}, neighbour / "weights.safetensors")
    source = "../neighbour/weights.safetensors"
    files = [{"file": source, "keep_prefix": "model.", "add_prefix": "kf."}, {"file": source, "keep_prefix": "", "add_prefix": ""}]
    case = parity.load_case(write_case(tmp_path, "made_up", STORED, weights_files=files))
    assert {k: v.item() for k, v in case.weights.items()} == {"kf.model.w": 1, "model.w": 1, "vae.w": 2}
    assert case.inputs.keys() == {"x"}
    assert case.expected.keys() == {"out.y"}


def test_missing_weights_name_the_file(tmp_path):
    files = [{"file": "../elsewhere/weights.safetensors", "keep_prefix": "", "add_prefix": ""}]
    case = parity.load_case(write_case(tmp_path, "made_up", STORED, weights_files=files))
    with pytest.raises(KeySyncError, match="elsewhere/weights.safetensors"):
        _ = case.weights


def test_listed_tensors_must_be_there(tmp_path):
    folder = write_case(tmp_path, "made_up", STORED)
    safetensors.numpy.save_file({"in.x": STORED["in.x"]}, folder / "io.safetensors")
    (result,) = parity.run_folder(tmp_path)
    assert not result.ok
    assert "out.y" in result.reason


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("io.safetensors", b"\x08\0\0\0\0\0\0\0{}", "io.safetensors cannot be read"),
        ("io.safetensors", b"", "io.safetensors cannot be read"),
        ("case.json", b"[1]", "case.json is not a JSON object"),
        ("case.json", b"{", "case.json cannot be read"),
    ],
)
def test_a_damaged_case_does_not_hide_the_others(monkeypatch, tmp_path, file, content, words):
    monkeypatch.setitem(parity.CASES, "right", lambda case: {"out.y": case.expected["out.y"]})
    write_case(tmp_path, "right", STORED)
    (write_case(tmp_path, "damaged", STORED) / file).write_bytes(content)
    damaged, right = parity.run_folder(tmp_path)
    assert right.ok and not damaged.ok and words in damaged.reason


def test_verify_says_how_far_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("keysync_jax.core.progress.LINE_SECONDS", 0.0)
    monkeypatch.setitem(parity.CASES, "right", lambda case: {"out.y": case.expected["out.y"]})
    write_case(tmp_path, "right", STORED)
    assert parity.verify(tmp_path) == 0
    assert "cases: 1/1 after" in capsys.readouterr().err


def test_verify_exit_status_and_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(parity.CASES, "right", lambda case: {"out.y": case.expected["out.y"]})
    monkeypatch.setitem(parity.CASES, "wrong", lambda case: {"out.y": case.expected["out.y"] + 1})
    write_case(tmp_path, "right", STORED)
    assert parity.verify(tmp_path) == 0
    assert "1 of 1 cases hold" in capsys.readouterr().out
    write_case(tmp_path, "wrong", STORED)
    assert parity.verify(tmp_path) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 cases hold" in printed
    assert "FAIL wrong out.y: error 1, tolerance 0.002" in printed


def test_verify_needs_a_folder_with_cases(tmp_path, capsys):
    assert parity.verify(tmp_path) == 1
    assert "holds no case" in capsys.readouterr().out
    with pytest.raises(KeySyncError, match="absent"):
        parity.verify(tmp_path / "absent")


def test_one_case_folder_is_enough(monkeypatch, tmp_path):
    monkeypatch.setitem(parity.CASES, "right", lambda case: {"out.y": case.expected["out.y"]})
    assert parity.verify(write_case(tmp_path, "right", STORED)) == 0


def test_table_shows_the_worst_tensor(monkeypatch, tmp_path):
    monkeypatch.setitem(parity.CASES, "wrong", lambda case: {"out.y": case.expected["out.y"] + 1})
    write_case(tmp_path, "wrong", STORED)
    stream = io.StringIO()
    parity.print_table(parity.run_folder(tmp_path), rich.console.Console(file=stream, width=120))
    line = next(line for line in stream.getvalue().splitlines() if "wrong" in line)
    assert "out.y" in line
    assert "500" in line
    assert "FAIL" in line


def test_two_runners_cannot_share_a_name(monkeypatch):
    monkeypatch.setitem(parity.CASES, "schedules", lambda case: {})
    with pytest.raises(ValueError, match="two runners"):
        parity.runner("schedules")(type("f", (), {"__module__": "elsewhere"}))
