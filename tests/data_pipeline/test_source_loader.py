import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_shards as tiny

from keysync_jax.cli.main import main
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.source import benchmark
from keysync_jax.data_pipeline.source.loader import Batches, BatchSource
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import InterpolationWindows, KeyframeWindows
from keysync_jax.data_pipeline.synthetic.noise_shards import write_noise


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    paths = [tmp_path_factory.mktemp("loader") / name for name in ("one", "two")]
    write_group(paths[0], tiny.group(), tiny.load, tiny.clips((180, 200, 175, 171, 260, 190)))
    write_group(paths[1], tiny.group(), tiny.load, tiny.clips((300, 210)))
    return [str(p) for p in paths]


@pytest.fixture(scope="module")
def reader(roots):
    """Two datasets, every draw switched on."""
    choices = (DatasetChoice(roots[0], weight=2.0), DatasetChoice(roots[1]))
    return WindowReader(SourceConfig(choices, KeyframeWindows(identity="random"), seed=7, flip=True, box_jitter=0.2))


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("hosts", [1, 2, 3, 16])
def test_hosts_together_read_the_same_global_batches(reader, hosts):
    whole = BatchSource(reader, 48)
    parts = [BatchSource(reader, 48, host, hosts) for host in range(hosts)]
    for step in (0, 1, 500):
        expected = whole[step]
        got = [part[step] for part in parts]
        assert all(len(g["known"]) == 48 // hosts for g in got)
        assert equal(expected, {k: np.concatenate([g[k] for g in got]) for k in expected})


def test_a_run_resumed_at_any_step_on_other_hosts_continues_the_sequence(reader):
    """Five steps on one host, three on three hosts from the saved step, then on two: the uninterrupted sequence."""
    with Batches(reader, 6, num_steps=12) as batches:
        whole = list(batches)
    assert len(whole) == 12 and not equal(whole[0], whole[1])
    with Batches(reader, 6) as batches:
        got = [next(batches) for _ in range(5)]
        step = batches.step
    for hosts, steps in ((3, 3), (2, 4)):
        runs = [Batches(reader, 6, first_step=step, host=host, hosts=hosts, threads=host) for host in range(hosts)]
        for _ in range(steps):
            parts = [next(run) for run in runs]
            got.append({k: np.concatenate([p[k] for p in parts]) for k in parts[0]})
        assert {run.step for run in runs} == {step + steps}
        step = runs[0].step
        for run in runs:
            run.close()
    assert step == 12 and all(equal(a, b) for a, b in zip(whole, got, strict=True))


def test_a_run_whose_batch_size_changes_goes_on_with_the_next_sample(reader):
    """Batches of 6, then of 4 on two hosts, then of 9: the samples of an uninterrupted run, none left out, none twice."""
    with Batches(reader, 6, num_steps=8) as batches:
        whole = [batch for batch in batches]
    got, seen, step = [], 0, 0
    for size, hosts, steps in ((6, 1, 2), (4, 2, 3), (9, 1, 2)):
        runs = [Batches(reader, size, step, host, hosts, num_steps=steps, seen=seen) for host in range(hosts)]
        for parts in zip(*runs, strict=True):
            got += parts
        seen, step = seen + steps * size, step + steps
    expected = {k: np.concatenate([batch[k] for batch in whole])[:seen] for k in whole[0]}
    assert seen == 42 and equal(expected, {k: np.concatenate([part[k] for part in got]) for k in expected})


def test_one_pass_visits_every_clip_once(roots):
    reader = WindowReader(SourceConfig((DatasetChoice(roots[0]),), InterpolationWindows(), seed=1))
    with Batches(reader, 3, num_steps=4) as batches:
        seen = [b["clip"].tolist() for b in batches]
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == list(range(6))
    assert seen[:2] != seen[2:]


def test_an_endless_run_goes_on_far_out(reader):
    far = BatchSource(reader, 4, first_step=10**9)
    assert far[0]["frames"].shape == (4, 14) and len(far) > 10**9


def test_threads_and_prefetch_do_not_change_the_order(reader):
    with Batches(reader, 2, threads=0, num_steps=20) as batches:
        plain = [b["frames"] for b in batches]
    with Batches(reader, 2, threads=4, prefetch=7, num_steps=20) as batches:
        threaded = [b["frames"] for b in batches]
    np.testing.assert_array_equal(plain, threaded)


def test_worker_processes_in_a_plain_script(roots, reader, tmp_path):
    """No absl main, no parsed flags: the script must just run, and in the same order, and end by itself."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys
            from keysync_jax.data_pipeline.source.loader import Batches
            from keysync_jax.data_pipeline.source.mixture import DatasetChoice
            from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
            from keysync_jax.data_pipeline.source.windows import KeyframeWindows

            if __name__ == "__main__":
                choices = (DatasetChoice(sys.argv[1], weight=2.0), DatasetChoice(sys.argv[2]))
                reader = WindowReader(SourceConfig(choices, KeyframeWindows(identity="random"), seed=7, flip=True, box_jitter=0.2))
                with Batches(reader, 2, first_step=3, threads=1, workers=2, prefetch=1) as batches:
                    out = [next(batches)["frames"].tolist() for _ in range(4)]
                assert not {"tensorflow", "tensorflow_datasets", "torch"} & set(sys.modules)
                print(json.dumps(out))
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2])])}
    result = subprocess.run([sys.executable, str(script), *roots], capture_output=True, text=True, env=env, timeout=180)
    assert result.returncode == 0, result.stderr
    expected = [BatchSource(reader, 2)[step]["frames"].tolist() for step in range(3, 7)]
    assert json.loads(result.stdout.splitlines()[-1]) == expected


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_record_stops_the_iteration_with_its_name(tmp_path, threads):
    write_group(tmp_path, tiny.group(), tiny.load, tiny.clips((40,)))
    shard = tmp_path / "keysync-train.array_record-00000"
    data = bytearray(shard.read_bytes())
    data[data.index(tiny.latent("clip00", 20).tobytes())] ^= 1
    shard.write_bytes(data)
    source = WindowReader(SourceConfig((DatasetChoice(str(tmp_path)),), InterpolationWindows()))
    with Batches(source, 4, threads=threads) as batches, pytest.raises(KeySyncError, match=f"clip 'clip00' frame 20 .*{shard.name}"):
        for _ in itertools.repeat(None, 50):
            next(batches)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hosts": 4, "host": 0}, "a global batch of 6 does not divide among 4 hosts"),
        ({"hosts": 2, "host": 2}, "this is 2"),
        ({"first_step": -1}, "first step is -1"),
        ({"threads": -1}, "threads -1"),
        ({"prefetch": 0}, "prefetch 0"),
    ],
)
def test_bad_settings(reader, options, message):
    with pytest.raises(KeySyncError, match=message):
        Batches(reader, 6, **options)


def test_benchmark_command(tmp_path, capsys):
    assert main(["data", "benchmark", str(tmp_path / "d"), "--make", "3", "--latent", "4", "--seconds", "0.2", "--batch", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["written"]["records"] == 600 and result["windows"] > 0 and result["windows_per_s"] > 0 and result["latent"] == [4, 4, 4]
    words = ["--make", "1", "--latent", "8", "--jpeg", "--pixels", "3", "--seconds", "0.2", "--batch", "2"]
    assert main(["data", "benchmark", str(tmp_path / "pictures"), *words]) == 0
    assert json.loads(capsys.readouterr().out)["windows"] > 0
    assert (tmp_path / "pictures" / "columns" / "jpeg").is_dir()
    assert main(["data", "benchmark", str(tmp_path / "nothing")]) == 1
    assert "holds no dataset" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("latent", [16, 64])
@pytest.mark.parametrize("stage", ["keyframe", "interpolation"])
def test_two_hundred_windows_per_second_from_twenty_thousand_records(tmp_path, latent, stage):
    written = write_noise(str(tmp_path), 101, latent)
    assert written["records"] >= 20_000
    windows = {"keyframe": KeyframeWindows(), "interpolation": InterpolationWindows()}[stage]
    result = benchmark.measure(WindowReader(SourceConfig((DatasetChoice(str(tmp_path)),), windows)))
    assert result["windows_per_s"] >= 200, result


def test_reading_imports_neither_opencv_nor_a_framework(tmp_path):
    """A worker of a training job that reads shards: every kind of mask, every augmentation, pictures too."""
    clips = tiny.clips((180, 200))
    write_group(tmp_path / "data", tiny.group(), tiny.load, clips)
    write_group(tmp_path / "data", tiny.jpeg_group(), tiny.load_jpeg)
    code = f"""
        import sys
        from keysync_jax.data_pipeline.source.loader import Batches
        from keysync_jax.data_pipeline.source.mixture import DatasetChoice
        from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
        from keysync_jax.data_pipeline.source.windows import KeyframeWindows
        from keysync_jax.config import MaskConfig
        for kind in ("box", "full", "mouth", "heart", "face"):
            choice = (DatasetChoice({str(tmp_path / "data")!r}),)
            config = SourceConfig(choice, KeyframeWindows(), pixel_frames=2, flip=True, box_jitter=0.1, mask=MaskConfig(kind=kind))
            with Batches(WindowReader(config), 2, num_steps=1) as batches:
                (batch,) = list(batches)
            assert batch["mask"].shape == (2, 14, 4, 4, 1) and (kind != "box" or batch["mask"].any())
            assert batch["original_frames"].shape == (2, 2, 32, 32, 3)
        heavy = ("cv2", "torch", "tensorflow", "av", "apache_beam", "mediapipe", "scenedetect")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"
