"""The benchmark: what it counts is what is there, what it reports is complete, and it needs no data reader."""

import json
import subprocess
import sys

import jax
import pytest

from keysync_jax import bench, bench_cli
from keysync_jax.errors import KeySyncError
from keysync_jax.models.stage import abstract_params
from keysync_jax.training import flops


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
    assert train["clips_per_s"] == pytest.approx(1 / seconds["median"])
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


def test_a_budget_ends_the_set(capsys):
    report = bench.run_all([bench.Case()], budget=-1.0)
    assert report["results"] == [] and report["skipped"] == [bench.Case().title]
    assert "not run" in capsys.readouterr().out


def test_the_set_for_a_gpu_covers_what_matters():
    cases = bench.gpu_set()
    assert {case.task for case in cases} == {"unet", "train", "attention"} and {case.size for case in cases} == {"full"}
    assert {case.dtype for case in cases} == {"bfloat16"} and all(case.repeats >= 20 for case in cases)
    assert {case.attention for case in cases if case.task == "attention"} == {"auto", "xla"}
    assert any(case.pixels for case in cases) and len({case.remat for case in cases}) >= 3
    assert bench_cli.main(["gpu"]) == 2  # a CPU cannot run it


def test_unknown_settings():
    for wrong in ({"size": "huge"}, {"remat": "some"}, {"task": "vae"}, {"repeats": 0}):
        with pytest.raises(KeySyncError, match="bench"):
            bench.Case(**wrong)


def test_it_needs_neither_readers_nor_media():
    """A bare accelerator machine has JAX, Flax and Optax, and little else."""
    code = (
        "import sys\n"
        "for name in ('ml_collections', 'grain', 'av', 'cv2', 'orbax', 'soundfile', 'soxr', 'tensorflow', 'torch', 'apache_beam'):\n"
        "    sys.modules[name] = None\n"
        "from keysync_jax import bench, bench_cli\n"
        "bench.gpu_set()\n"
        "print(sorted(name for name in sys.modules if name.startswith(('data_pipeline', 'converters', 'keysync_jax.media'))))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "[]"
