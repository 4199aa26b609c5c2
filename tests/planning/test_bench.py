"""The benchmark: what it counts is what is there, what it reports is complete, and it needs no data reader."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from bounds import approx

from keysync_jax.cli import main as cli
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.costs import flops
from keysync_jax.models.attention import attention
from keysync_jax.models.stage import abstract_params
from keysync_jax.planning import bench


def test_the_medium_network_has_59_7_million_parameters():
    unet = abstract_params(bench.SIZES["medium"])["model"]["diffusion_model"]
    assert sum(leaf.size for leaf in jax.tree.leaves(unet)) == 59_721_706
    stage = bench.SIZES["medium"]
    assert (stage.num_frames, stage.latent_size, stage.unet.model_channels) == (14, 32, 64)


@pytest.mark.slow
def test_cases_report_everything(tmp_path, capsys):
    path = tmp_path / "bench.json"
    cases = [
        bench.Case("train", "tiny", remat="full", repeats=3, warmup=1),
        bench.Case("attention", "tiny", repeats=2, warmup=0),
    ]
    report = bench.run_all(cases, path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    environment = report["environment"]
    assert environment["device"] and environment["date"] and environment["versions"]["jax"] == jax.__version__
    train, attention = report["results"]
    seconds = train["seconds"]
    assert 0 < seconds["min"] <= seconds["p10"] <= seconds["median"] <= seconds["p90"] <= seconds["max"] and seconds["repeats"] == 3
    assert train["compile_seconds"] > 0 and train["memory"]["temp"] > 0 and train["memory"]["argument"] > 4 * train["parameters"]
    work = train["flops"]
    assert work["pixels"] == 0 and 1.5 < work["backward"] / work["forward"] < 2.1 and 0.5 < work["recompute"] / work["forward"] <= 1.1
    assert train["clips_per_s"] == approx(1 / seconds["median"])
    # Two products forward and four backward over 4 rows of 64 x 64 logits with a head of 64.
    assert attention["flops"]["model"] == 6 * 2 * 4 * 64 * 64 * 64
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "train, tiny, float32" in lines[0] and "compiled in" in lines[0]


@pytest.mark.slow
def test_the_forward_holds_its_matrices_as_a_dub_does():
    params = bench.program(bench.Case("unet", dtype="bfloat16")).arguments[0]
    kinds = {(path[-1].key, str(leaf.dtype)) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert {kind for kind in kinds if kind[0] in ("kernel", "bias")} == {("kernel", "bfloat16"), ("bias", "float32")}


def test_the_pixel_loss_is_counted_apart():
    plain, pixels = (bench.program(bench.Case("train", "tiny", pixels=with_pixels)) for with_pixels in (False, True))
    without, found = (flops.count_step(jax.make_jaxpr(p.function)(*p.arguments)) for p in (plain, pixels))
    assert found.pixels > 0 and found.pixels_recompute > 0 and without.pixels == 0
    assert found.forward == without.forward


def test_what_ran_is_told_from_what_was_asked_for(capsys):
    (found,) = bench.run_all([bench.Case("attention", "tiny", attention="splash", repeats=1, warmup=0)])["results"]
    assert found["attention"] == {"asked": "splash", "ran": "xla"} and found["case"]["attention"] == "splash"
    assert "attention xla instead of splash" in capsys.readouterr().out
    assert "attention xla (auto)" in bench.Case().title("xla") and "attention cudnn," in bench.Case(attention="cudnn").title("cudnn")


def test_kernels_are_found_in_the_program():
    q = jax.ShapeDtypeStruct((1, 512, 1, 64), jnp.bfloat16)

    def program(implementation):
        loss = jax.checkpoint(lambda q: attention(q, q, q, implementation).astype(jnp.float32).sum())
        return jax.make_jaxpr(jax.grad(jax.jit(loss)))(q)

    assert [bench.attention_of(program(name)) for name in ("splash", "xla")] == ["splash", "xla"]
    assert bench._KERNELS["cudnn"] in flops._RULES  # cannot be traced without a GPU


def test_a_failure_costs_one_measurement_and_the_file_has_all(tmp_path, monkeypatch, capsys):
    path, seen, measure = tmp_path / "bench.json", [], bench._measure
    errors = {
        "spatial 64x64": ValueError("the kernel\ndoes not take it"),
        "audio 64x64": KeySyncError("not finite"),
        "temporal 64x64": AssertionError(),
    }

    def failing(case, suffix, timed):
        seen.append(json.loads(path.read_text())["results"] if path.exists() else [])
        if (error := errors.get(suffix.removeprefix(", "))) is not None:
            raise error
        return measure(case, suffix, timed)

    monkeypatch.setattr(bench, "_measure", failing)
    monkeypatch.setattr(bench, "ATTENTION_SHAPES", dict.fromkeys(bench.ATTENTION_SHAPES, (1, 8, 8, 1)))
    case = bench.Case("attention", "full", repeats=1, warmup=0)
    report = bench.run_all([case, dataclasses.replace(case, size="tiny")], path)
    assert [result.get("error") for result in report["results"]] == [
        "ValueError: the kernel", None, None, "not finite", "AssertionError", None,
    ]  # fmt: skip
    assert [len(results) for results in seen] == [0, 1, 2, 3, 4, 5] and len(json.loads(path.read_text())["results"]) == 6
    assert "spatial 64x64: failed: ValueError: the kernel\n" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["bench.json"]


def test_an_output_that_cannot_be_is_refused_first(tmp_path):
    for wrong in (tmp_path, tmp_path / "none" / "bench.json", os.devnull):
        with pytest.raises(UsageError, match="-o"):
            bench.run_all([], wrong)


def test_a_case_that_hangs_ends_with_the_budget(tmp_path, capsys):
    path, budget, begin = tmp_path / "bench.json", 20.0, time.monotonic()
    slow = bench.Case("attention", repeats=10**9)
    report = bench.run_all([slow, bench.Case()], path, budget)
    assert time.monotonic() - begin < budget and not multiprocessing.active_children()
    assert report["results"] == [] and [skipped["title"] for skipped in report["skipped"]] == [slow.title(), bench.Case().title()]
    assert [skipped["reason"].split(",")[0] for skipped in report["skipped"]] == ["stopped", "not begun"]
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_with_a_budget_the_device_is_left_to_the_cases():
    """A parent that holds the device leaves its cases no memory. Such a setting is refused once JAX has started its devices."""
    code = (
        "import jax\n"
        "from keysync_jax.planning import bench\n"
        "(found,) = bench.run_all([bench.Case('attention', repeats=1, warmup=0)], budget=300)['results']\n"
        "jax.config.update('jax_num_cpu_devices', 2)\n"
        "print('error' in found, jax.device_count())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "False 2"


def test_a_case_that_takes_its_process_down_fails_by_name(monkeypatch):
    monkeypatch.setattr(bench, "_surroundings", _here)
    monkeypatch.setattr(bench, "run", _crashing)
    report = bench.run_all([bench.Case(), bench.Case(dtype="bfloat16"), bench.Case(attention="xla")], budget=300)
    first, killed, raised, after = report["results"]
    assert first["error"] == "a shape before" and after["error"] == "a shape before"
    assert killed["title"] == bench.Case().title() and killed["error"] == "its process ended: Killed"
    assert raised["title"] == bench.Case(dtype="bfloat16").title() and raised["error"] == "RuntimeError: no device"


def _here():
    yield {"platform": "cpu"}


def _crashing(case):
    if case.dtype == "bfloat16":
        raise RuntimeError("no device")
    yield {"title": case.title(), "error": "a shape before"}
    if case.attention == "auto":
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_set_for_a_gpu_covers_what_matters():
    cases = bench.gpu_set()
    assert {case.task for case in cases} == {"unet", "train", "attention"} and {case.size for case in cases} == {"full"}
    assert {case.dtype for case in cases} == {"bfloat16"} and all(case.repeats >= 20 for case in cases)
    assert {case.attention for case in cases if case.task == "attention"} == {"auto", "xla"}
    assert any(case.pixels for case in cases) and len({case.remat for case in cases}) >= 3


def test_the_command_ends_as_every_verb_does(tmp_path, monkeypatch, capsys):
    assert cli.main(["bench", "gpu"]) == 2  # a CPU cannot run it
    assert "accelerator" in capsys.readouterr().err
    for error, text in ((PermissionError(13, "Permission denied", "bench.json"), "bench.json"), (KeyboardInterrupt(), "stopped")):
        monkeypatch.setattr(bench, "_measure", lambda *_, error=error: _raise(error))
        monkeypatch.setattr(bench, "write_text", lambda *_, error=error: _raise(error))
        assert cli.main(["bench", "attention", "-o", str(tmp_path / "bench.json")]) == 1
        assert text in capsys.readouterr().err.splitlines()[-1]
    report = {"results": [], "skipped": [{"title": "unet"}]}
    monkeypatch.setattr(bench, "run_all", lambda *_, **__: report)
    assert cli.main(["bench", "gpu"]) == 1  # nothing was measured
    report["results"] = [{"title": "unet"}]
    assert cli.main(["bench", "gpu"]) == 0  # what the time did not suffice for is no failure


def _raise(error):
    raise error


def test_the_module_prints_one_line_as_the_command_does(tmp_path):
    """A file of which the system says that it cannot be written; no output of a crash, and the same status."""
    module = [sys.executable, "-m", "keysync_jax", "bench"]
    found = subprocess.run([*module, "unet", "--repeats", "0"], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (2, "keysync: error: bench: batch and repeats must be at least 1, warmup at least 0\n")
    name = tmp_path / ("n" * 300)  # longer than a file's name can be
    found = subprocess.run([*module, "attention", "--repeats", "1", "--warmup", "0", "-o", str(name)], capture_output=True, text=True)
    assert found.returncode == 1 and found.stderr.splitlines()[-1].startswith("keysync: error: [Errno"), found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("unet --remat full", "unrecognized arguments: --remat full"),
        ("unet --train-all", "unrecognized arguments: --train-all"),
        ("unet --pixels", "unrecognized arguments: --pixels"),
        ("unet --budget 100", "unrecognized arguments: --budget 100"),
        ("attention --batch 2", "unrecognized arguments: --batch 2"),
        ("attention --size medium", "invalid choice: 'medium' .choose from"),
        ("gpu --size full", "unrecognized arguments: --size full"),
        ("gpu --repeats 3", "unrecognized arguments: --repeats 3"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(given, said, monkeypatch, capsys):
    """Each of the verbs under `bench` has its own flags, so that the parser itself refuses the others."""
    monkeypatch.setattr(bench, "run_all", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *given.split()])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("keysync") and re.search(said, error)


@pytest.mark.parametrize(("given", "said"), [("gpu --budget 5", "--budget 5: .* at least 60"), ("gpu --budget nan", "--budget nan")])
def test_a_budget_that_suffices_for_nothing_is_refused(given, said, monkeypatch, capsys):
    monkeypatch.setattr(bench, "run_all", lambda *_, **__: pytest.fail("it ran"))
    assert cli.main(["bench", *given.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "case"),
    [
        ("unet", bench.Case("unet", repeats=5, warmup=1)),
        ("train --train-all --pixels --batch 2 --warmup 0", bench.Case("train", freeze="none", pixels=True, batch=2, repeats=5, warmup=0)),
        ("attention --size full --attention xla", bench.Case("attention", "full", attention="xla", repeats=5, warmup=1)),
    ],
)
def test_flags_make_the_case(given, case, monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "run_all", lambda cases, output: ran.extend(cases) or {"results": [{}]})
    assert cli.main(["bench", *given.split()]) == 0 and ran == [case]


def test_unknown_settings():
    for wrong in ({"size": "huge"}, {"remat": "some"}, {"task": "vae"}, {"repeats": 0}, {"task": "attention", "size": "medium"}):
        with pytest.raises(KeySyncError, match="bench"):
            bench.Case(**wrong)


def test_it_needs_neither_readers_nor_media():
    """A bare accelerator machine has JAX, Flax and Optax, and little else."""
    code = (
        "import sys\n"
        "for name in ('ml_collections', 'grain', 'av', 'cv2', 'orbax', 'soundfile', 'soxr', 'tensorflow', 'torch', 'apache_beam'):\n"
        "    sys.modules[name] = None\n"
        "from keysync_jax.cli.main import main\n"
        "from keysync_jax.planning import bench\n"
        "bench.gpu_set()\n"
        "rooms = ('keysync_jax.data_pipeline', 'keysync_jax.converters', 'keysync_jax.media')\n"
        "print(sorted(name for name in sys.modules if name.startswith(rooms)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
