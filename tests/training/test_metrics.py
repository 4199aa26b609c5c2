import contextlib
import functools
import json
import resource
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import object_store
import pytest
from bounds import approx
from etils import epath

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.training import profiling
from keysync_jax.training.config import DataConfig, TrainConfig
from keysync_jax.training.export import model_card
from keysync_jax.training.profiling import ProfileWindow, Speed, parse_profile_steps
from keysync_jax.training.store import jsonl
from keysync_jax.training.trainables import trainable_of
from keysync_jax.training.watch import metrics
from keysync_jax.training.watch.metrics import LINE_WIDTH, Meter, MetricLog, due, duration, line, read_metrics
from keysync_jax.training.watch.pictures import draw_curve
from keysync_jax.training.watch.watchers import Watch


class Clock:
    """Stands in for `time` in the module: stands still until told."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", clock.perf_counter)
    return clock


def step_metrics(loss, finite=1.0, **more):
    return {"loss": loss, "grad_norm": 2 * loss, "learning_rate": loss, "finite": finite, "skipped": 1.0 - finite} | more


def test_an_interval_is_averaged_and_bad_steps_are_left_out(clock):
    meter = Meter(100, 200, 32, Speed(4e12, 8, 100e12, "X bf16"))
    for loss in (1.0, 2.0, 6.0):
        meter.add(step_metrics(loss))
    meter.add(step_metrics(float("nan"), finite=0.0, learning_rate=7.0))
    meter.waited(0.5)
    clock.now += 1.0
    with meter.paused():
        clock.now += 10.0
    clock.now += 1.0
    values = meter.take(104)
    assert values["loss"] == 3.0 and values["grad_norm"] == 6.0
    assert values["learning_rate"] == 7.0 and values["skipped"] == 1.0 and values["nonfinite"] == 1
    assert values["steps_per_s"] == 2.0 and values["clips_per_s"] == 64.0  # the ten seconds of validation are not training
    assert values["data_wait"] == 0.25
    assert values["tflops_per_s"] == 1.0 and values["mfu"] == approx(0.01)
    # 96 steps at 2 per second, and of all time one sixth was training.
    assert values["eta_s"] == approx(48 * 6)

    meter.add(step_metrics(5.0))
    clock.now += 2.0
    values = meter.take(105)
    assert values["loss"] == 5.0 and values["nonfinite"] == 0 and values["data_wait"] == 0 and values["steps_per_s"] == 0.5


def test_an_interval_of_bad_steps_only_has_no_loss(clock):
    meter = Meter(0, 10, 1)
    meter.add(step_metrics(float("inf"), finite=0.0))
    clock.now += 1
    values = meter.take(1)
    assert "loss" not in values and values["nonfinite"] == 1 and "mfu" not in values
    assert "not finite 1" in line(1, values, meter)


def test_the_line_says_everything_and_stays_readable(clock, monkeypatch):
    monkeypatch.setattr(metrics, "memory", lambda: profiling.Memory(41.23, True))
    meter = Meter(11_950, 60_000, 32, Speed(1.5e15, 8, 989e12, "H200 bf16"))
    meter.add(step_metrics(0.12345, latent=0.0912, pixel_l2=0.0322))
    clock.now += 33.0
    values = meter.take(12_000)
    text = line(12_000, values, meter)
    assert text.startswith("12000/60000  loss 0.1235  latent 0.0912  pixel_l2 0.0322")
    for part in ("1.52 steps/s", "48.5 clips/s", "284 TFLOP/s/chip", "MFU 28.7% (H200 bf16)", "data 0%", "ETA 8:48:00"):
        assert part in text, part
    assert "41.2 GiB" in text and len(text) <= LINE_WIDTH

    assert "grad" not in text and "lr" not in text  # the first to go; the file has them
    meter.speed = None
    few = {name: value for name, value in values.items() if name not in ("tflops_per_s", "mfu")}
    assert "grad 0.247" in line(12_000, few, meter)
    meter.speed = Speed(1.5e15, 8, 989e12, "H200 bf16")
    crowded = values | {f"some_long_term_{i}": 1 / 3 for i in range(9)}
    text = line(12_000, crowded, meter)
    assert len(text) <= LINE_WIDTH
    assert all(part in text for part in ("loss", "MFU", "ETA", "41.2 GiB", "data", "steps/s")) and "some_long_term_8" not in text


def test_the_time_left_is_written_for_people():
    assert [duration(s) for s in (0, 61.4, 3 * 3600 + 5, 2 * 86400 + 3600)] == ["0:00:00", "0:01:01", "3:00:05", "2 d 1:00:00"]
    assert [due(s, 4) for s in (3, 4, 8)] == [False, True, True] and not due(4, 0)


def test_the_file_holds_all_values_and_survives_a_kill(tmp_path):
    log = MetricLog(tmp_path, tensorboard=False)
    log.write(5, {"loss": 1.5, "bad": float("nan")})
    log.close()
    path = tmp_path / "metrics.jsonl"
    row = json.loads(path.read_text())
    assert row["step"] == 5 and row["loss"] == 1.5 and row["bad"] is None and row["time"] > 1e9
    with path.open("a") as file:
        file.write('{"step": 10, "lo')  # killed here
    log = MetricLog(tmp_path, tensorboard=False)
    log.write(5, {"loss": 1.25})  # resumed
    log.write(5, {"val/loss": 9.0})
    rows = read_metrics(tmp_path)
    assert list(rows) == [5] and rows[5]["loss"] == 1.25 and rows[5]["val/loss"] == 9.0


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    log = MetricLog(tmp_path, tensorboard=False)
    (tmp_path / "metrics.jsonl").mkdir()  # stands for a disk that takes nothing
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_an_object_store_keeps_all_lines_also_after_a_resume(tmp_path, monkeypatch):
    object_store.mount(tmp_path, monkeypatch)
    with epath.Path("gs://bucket/x").open("w") as file:
        file.write("old")
    with epath.Path("gs://bucket/x").open("a") as file:
        file.write("new")
    assert (tmp_path / "bucket" / "x").read_text() == "new"  # the stand-in is as forgetful as the original

    for start in (0, 2):  # a run and its resumption, two lines each
        log = MetricLog("gs://bucket/run", tensorboard=False)
        for step in (start + 1, start + 2):
            log.write(step, {"loss": 1 / step})
            assert list(read_metrics("gs://bucket/run")) == list(range(1, step + 1))  # at once, not when the run ends
        log.close()
        model_card.record_command("gs://bucket/run", f"keysync train {start}", "2026-01-01T00:00:00")
    run = tmp_path / "bucket" / "run"
    assert [row["loss"] for row in read_metrics("gs://bucket/run").values()] == [1, 1 / 2, 1 / 3, 1 / 4]
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    commands = jsonl.read("gs://bucket/run/commands.jsonl")
    assert [row["command"] for row in commands] == ["keysync train 0", "keysync train 2"]
    assert draw_curve("gs://bucket/run") and (run / "curve.png").stat().st_size > 1000

    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # written on a disk, cut there, and moved to the store
    MetricLog("gs://bucket/run", tensorboard=False).write(11, {"loss": 0.0})
    assert list(read_metrics("gs://bucket/run")) == [1, 2, 3, 4, 11]


def test_a_store_that_does_not_answer_costs_no_lines(tmp_path, monkeypatch, capsys):
    object_store.mount(tmp_path, monkeypatch)
    log = MetricLog("gs://bucket/run", tensorboard=False)
    log.write(1, {"loss": 1.0})
    with object_store.refusing(monkeypatch):
        log.write(2, {"loss": 1.0})
        log.write(3, {"loss": 1.0})
        with pytest.raises(OSError, match=r"gs://bucket/run/metrics.jsonl: HttpError: 503"):  # or what is there would be overwritten
            MetricLog("gs://bucket/run", tensorboard=False)
    error = capsys.readouterr().err
    assert error.count("cannot be written") == 1 and "HttpError: 503 [try again]" in error
    log.write(4, {"loss": 1.0})
    assert list(read_metrics("gs://bucket/run")) == [1, 2, 3, 4]


def test_a_store_that_does_not_answer_costs_the_curve_and_not_the_run(tmp_path, monkeypatch, capsys):
    object_store.mount(tmp_path, monkeypatch)
    log = MetricLog("gs://bucket/run", tensorboard=False)
    log.write(1, {"loss": 1.0})
    config = TrainConfig(data=DataConfig(validation_split=""))  # no data are opened
    watch = Watch(trainable_of(config), mesh=None, objective=None, vae=None, log=log, workdir="gs://bucket/run")
    with object_store.refusing(monkeypatch):
        watch.curve()
    error = capsys.readouterr().err
    assert "gs://bucket/run/curve.png cannot be written" in error and "HttpError: 503 [try again]); the run goes on" in error
    watch.curve()
    assert (tmp_path / "bucket" / "run" / "curve.png").stat().st_size > 1000


def test_brackets_of_paths_and_errors_are_said_as_they_are(tmp_path, capsys):
    log = MetricLog(tmp_path, tensorboard=False)
    for text in ("weights: model runs/[a]", "no room [/in/here]", "[red]bad [os_error_code='28'][/red]"):
        log.say(text)
    assert capsys.readouterr().err.splitlines() == ["weights: model runs/[a]", "no room [/in/here]", "bad [os_error_code='28']"]


def test_only_process_zero_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log = MetricLog(tmp_path / "run", tensorboard=True, wandb=True)
    log.say("hello")
    log.write(1, {"loss": 1.0})
    log.picture(1, "samples", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_tensorboard_is_optional_and_missed_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 1.0})
    log.write(2, {"loss": 1.0})
    assert capsys.readouterr().err.count("pip install 'keysync-jax[log]'") == 1
    assert len(read_metrics(tmp_path)) == 2


class FakeWriter:
    """Stands in for tensorboardX's, which is not part of the test environment."""

    made: list = []

    def __init__(self, prefix):
        self.prefix, self.events, self.flushed, self.problem = prefix, [], 0, None
        self.made.append(self)

    def write_event(self, event):
        if self.problem:
            raise self.problem
        self.events.append((event["step"], *event["summary"]))

    def flush(self):
        self.flushed = len(self.events)

    def close(self):
        self.prefix = None


@pytest.fixture
def writers(monkeypatch):
    """The writers that were made, with tensorboardX replaced by the parts of it that are used."""
    summary = types.SimpleNamespace(
        scalar=lambda name, value: (name, value), image=lambda name, image, dataformats: (name, image.shape, dataformats)
    )
    modules = {
        "tensorboardX": {"summary": summary},
        "tensorboardX.event_file_writer": {"EventsWriter": FakeWriter},
        "tensorboardX.record_writer": {"directory_check": lambda folder: None},
        "tensorboardX.proto": {},
        "tensorboardX.proto.event_pb2": {"Event": dict},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    monkeypatch.setattr(FakeWriter, "made", [])
    return FakeWriter.made


def test_tensorboard_gets_scalars_and_pictures(tmp_path, writers):
    log = MetricLog(tmp_path)
    (writer,) = writers
    assert writer.prefix == f"{tmp_path}/tensorboard/events"
    log.write(3, {"loss": np.float32(0.5), "val/loss": 2})
    assert writer.events == [(3, "loss", 0.5), (3, "val/loss", 2.0)] and writer.flushed == 2  # at once
    log.picture(3, "samples", np.zeros((4, 6, 3), np.uint8))
    log.close()
    assert writer.events[2:] == [(3, "samples", (4, 6, 3), "HWC")] and writer.flushed == 3 and writer.prefix is None


def test_a_store_that_refuses_tensorboard_does_not_end_the_run(tmp_path, writers, capsys):
    log = MetricLog(tmp_path)
    log.write(1, {"loss": 1.0})
    writers[0].problem = RuntimeError("503")  # google's clients have errors of their own
    for step in (2, 3):
        log.write(step, {"loss": 1.0})
        log.picture(step, "samples", np.zeros((4, 6, 3), np.uint8))
    log.close()
    assert capsys.readouterr().err.count("tensorboard cannot be written") == 1
    assert list(read_metrics(tmp_path)) == [1, 2, 3] and len(writers[0].events) == 1


def test_a_full_disk_costs_tensorboard_and_neither_ends_nor_stops_the_run(tmp_path, capsys):
    log = MetricLog(tmp_path)  # with the real tensorboardX, whose own writer thread would die, and values would wait for it for ever
    log.write(1, {"loss": 1.0})
    (events,) = (tmp_path / "tensorboard").iterdir()
    size, whole = events.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert b"loss" in events.read_bytes()  # a process that is killed here has told what it knew
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, whole[1]))
        for step in range(2, 20):
            log.write(step, {f"part_{i}": 1.0 for i in range(12)})
            log.picture(step, "samples", np.zeros((64, 64, 3), np.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
    log.close()
    assert capsys.readouterr().err.count("File too large); the run goes on without it") == 2  # metrics.jsonl, tensorboard


def test_tensorboard_that_lacks_something_else_says_what(tmp_path, writers, monkeypatch, capsys):
    def refuse(prefix):
        raise ImportError("`google-cloud-storage` must be installed in order to use the 'gs://' protocol")

    monkeypatch.setattr(sys.modules["tensorboardX.event_file_writer"], "EventsWriter", refuse)
    MetricLog(tmp_path).write(1, {"loss": 1.0})
    assert "no TensorBoard: `google-cloud-storage` must be installed" in capsys.readouterr().err


def test_wandb_is_refused_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="config.log.wandb is on but wandb is not installed"):
        MetricLog(tmp_path, tensorboard=False, wandb=True)


def test_wandb_continues_the_run_of_a_workdir(tmp_path, monkeypatch):
    runs = []

    class Run:
        def __init__(self, **options):
            self.options, self.logged = options, []
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.logged.append("finished")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run, Error=RuntimeError))
    for _ in range(2):
        log = MetricLog(tmp_path, tensorboard=False, wandb=True, run={"seed": 1})
        log.write(7, {"loss": 1.0})
        log.close()
    assert runs[0].options["id"] == runs[1].options["id"] and runs[0].options["resume"] == "allow"
    assert runs[0].options["config"] == {"seed": 1}
    assert runs[0].logged == [(7, {"loss": 1.0}), "finished"]


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_an_error_of_wandb_is_one_line_and_ends_no_run(tmp_path, monkeypatch, capsys, call):
    class WandbError(Exception):
        pass

    class Run:
        def __init__(self, **options):
            self.do("init")

        def do(self, name, *_, **__):
            if name == call:
                raise WandbError("api_key not configured\n  (no-tty)")

        log = functools.partialmethod(do, "log")
        finish = functools.partialmethod(do, "finish")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Run, Error=WandbError))
    if call == "init":
        with pytest.raises(KeySyncError, match=r"wandb does not begin a run: api_key not configured \(no-tty\); log in with"):
            MetricLog(tmp_path, tensorboard=False, wandb=True)
        return
    log = MetricLog(tmp_path, tensorboard=False, wandb=True)
    for step in (1, 2):
        log.write(step, {"loss": 1.0})
    log.close()
    assert capsys.readouterr().err.count("wandb: api_key not configured (no-tty); the run goes on without it") == 1
    assert list(read_metrics(tmp_path)) == [1, 2]


def test_memory_is_of_the_device_where_it_counts_and_of_the_process_elsewhere(monkeypatch):
    class Device:
        def __init__(self, stats):
            self.memory_stats = lambda: stats

    monkeypatch.setattr(jax, "local_devices", lambda: [Device({"peak_bytes_in_use": n}) for n in (2**30, 3 * 2**30)])
    assert profiling.memory() == (3.0, True)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None)])
    gib, on_device = profiling.memory()
    assert not on_device and 0.05 < gib < 64


def test_profile_steps_are_read(tmp_path):
    assert parse_profile_steps("10:12") == (10, 12)
    for text in ("10", "a:b", "12:10", "5:5", "-1:3", ""):
        with pytest.raises(UsageError, match="--profile_steps"):
            parse_profile_steps(text)


def test_the_profiler_records_its_window(tmp_path):
    said = []
    window = ProfileWindow(tmp_path, (2, 4), said.append)
    x = jnp.ones((8, 8))
    for done in range(6):
        with window.step(done):
            x = jnp.tanh(x)
        window.after(done + 1, x)
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0
    assert len(said) == 2 and said[0].startswith("recording steps 3 to 4")
    window.close()  # nothing is open any more
    assert len(said) == 2


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path):
    (tmp_path / "profile").write_text("a file where a folder must be")
    said, x = [], jnp.ones((8, 8))
    window = ProfileWindow(tmp_path, (0, 1), said.append)
    try:
        for done in range(3):
            with window.step(done):
                x = jnp.tanh(x)
            window.after(done + 1, x)
    finally:
        with contextlib.suppress(Exception):
            jax.profiler.stop_trace()  # not another test's
    assert len(said) == 2 and "profile cannot be written" in said[1] and said[1].endswith("the run goes on without it[/red]")


def test_curves_are_drawn_from_the_log(tmp_path):
    assert draw_curve(tmp_path) is None
    log = MetricLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0 / step})
    single = draw_curve(tmp_path).read_bytes()
    log.write(3, {"val/loss": 0.5, "val/loss_sigma_0.58": 0.4, "val/loss_sigma_12.6": 0.7})
    both = draw_curve(tmp_path).read_bytes()
    assert single.startswith(b"\x89PNG") and both.startswith(b"\x89PNG")
    assert np.frombuffer(both[16:20], ">u4")[0] > np.frombuffer(single[16:20], ">u4")[0]  # the levels stand beside the losses
