"""Checkpoints by themselves, on small trees: what is kept, what is refused and in which words, and writes that fail."""

import contextlib
import dataclasses
import itertools
import json
import os
import resource
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import object_store
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from keysync_jax.core.errors import KeySyncError
from keysync_jax.training import resume
from keysync_jax.training import state as states
from keysync_jax.training.config import CheckpointConfig, TrainConfig
from keysync_jax.training.store import checkpoints
from keysync_jax.training.store.checkpoints import Checkpoints
from keysync_jax.training.store.checksums import changed, checksums
from keysync_jax.training.trainables import trainable_of

META = {"format": 1, "config": {}}
KEEP = CheckpointConfig(every=1, keep_last=2, keep_every=4)
TX = optax.adamw(optax.constant_schedule(1e-3), mu_dtype=jnp.float32)


def tree(seed, width=3, **more):
    rng = np.random.default_rng(seed)
    return {"block": {"kernel": rng.standard_normal((4, width)).astype(np.float32)}, "bias": np.full(width, seed, np.float32)} | more


def state_of(seed, step, ema=True, **options):
    state = states.create(jax.tree.map(jnp.asarray, tree(seed, **options)), {}, TX, ema)
    return state.replace(step=jnp.int32(step))


def abstract_of(state):
    sharding = NamedSharding(jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


def counters(step):
    return {"step": step, "skipped": 0, "data": "f" * 64, "samples": 2 * step}


def save(saved, seed, step, **options):
    saved.save(state_of(seed, step, **options), counters(step), META)


@contextlib.contextmanager
def file_size_limit(size):
    """The kernel refuses to write more than `size` bytes into any file (EFBIG, as ENOSPC on a full disk)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_saves_items_apart_and_keeps_the_last_and_every_fourth(tmp_path):
    with Checkpoints(tmp_path, KEEP) as saved:
        for step in range(1, 8):
            save(saved, step, step)
        saved.wait()
        assert saved.steps() == [4, 6, 7] and saved.latest() == 7
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "6").iterdir() if p.is_dir()) == [
        "checksums", "counters", "ema", "meta", "opt_state", "params",
    ]  # fmt: skip
    with Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.counters(6) == counters(6) and saved.meta(6) == META
        found, count = saved.restore(6, abstract_of(state_of(0, 0)))
        weights = saved.weights(4, abstract_of(state_of(0, 0).params), ema=True)
    wanted = state_of(6, 6)
    assert jax.tree.structure(found) == jax.tree.structure(wanted) and count["step"] == 6
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    assert np.array_equal(weights["block"]["kernel"], tree(4)["block"]["kernel"])


def test_a_donated_state_is_stored_as_it_was(tmp_path):
    """The step that follows a save overwrites the state's buffers while they are being written."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = state_of(5, 1, width=200_000)
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), state.params)
    with Checkpoints(tmp_path) as saved:
        saved.save(state, counters(1), META)
        for _ in range(5):
            state = step(state)
        saved.wait()
        assert float(state.params["bias"][0]) == -1
        found = saved.weights(1, abstract_of(state).params)
    assert np.array_equal(found["block"]["kernel"], wanted["block"]["kernel"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"width": 5}, r"params, is of another model: bias is \(3,\), not \(5,\); block/kernel is \(4, 3\), not \(4, 5\)"),
        ({"extra": {"scale": np.ones(2, np.float32)}}, "params, is of another model: extra/scale is missing"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_leaf(tmp_path, options, words):
    with Checkpoints(tmp_path) as saved:
        save(saved, 1, 3)
        saved.wait()
        with pytest.raises(KeySyncError, match=f"checkpoint 3 of .*, {words}"):
            saved.restore(3, abstract_of(state_of(0, 0, **options)))
        save(saved, 1, 4, extra={"scale": np.ones(2, np.float32)})
        saved.wait()
        with pytest.raises(KeySyncError, match="another model: extra/scale is unknown"):
            saved.restore(4, abstract_of(state_of(0, 0)))


def test_averaging_may_begin_or_end_at_a_checkpoint(tmp_path):
    said = []
    with Checkpoints(tmp_path, warn=said.append) as saved:
        save(saved, 2, 1, ema=False)
        saved.wait()
        found, _ = saved.restore(1, abstract_of(state_of(0, 0)))
        assert np.array_equal(found.ema["bias"], found.params["bias"]) and "the average starts" in said[0]
        assert found.ema["bias"].unsafe_buffer_pointer() != found.params["bias"].unsafe_buffer_pointer()  # both will be donated
        with pytest.raises(KeySyncError, match="has no averaged weights"):
            saved.weights(1, abstract_of(state_of(0, 0)).params, ema=True)
        save(saved, 3, 2)
        saved.wait()
        assert saved.restore(2, abstract_of(state_of(0, 0, ema=False)))[0].ema is None


def test_damaged_and_missing_checkpoints_say_which_others_there_are(tmp_path):
    with Checkpoints(tmp_path) as saved:
        save(saved, 1, 1)
        save(saved, 2, 2)
        saved.wait()
    data = [p for p in (tmp_path / "checkpoints" / "2" / "params").rglob("*") if p.is_file() and "/d/" in str(p)]
    assert data
    for path in data:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Checkpoints(tmp_path, read_only=True) as saved:
        with pytest.raises(KeySyncError, match=r"checkpoint 2 of .* cannot be read: .*there are 1 ") as error:
            saved.restore(2, abstract_of(state_of(0, 0)))
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)
        with pytest.raises(KeySyncError, match="has no checkpoint of step 9; there are 1, 2"):
            saved.weights(9, abstract_of(state_of(0, 0)).params)
    with pytest.raises(KeySyncError, match="is not a training run"):
        Checkpoints(tmp_path / "nothing", read_only=True)
    with pytest.raises(KeySyncError, match="is not a training run"):
        checkpoints.read_config(tmp_path / "nothing")


def test_a_failing_write_keeps_the_last_good_checkpoint_and_the_next_save_is_tried(tmp_path):
    said = []
    with Checkpoints(tmp_path, CheckpointConfig(every=1, keep_last=1, keep_every=0), warn=said.append) as saved:
        save(saved, 1, 1, width=20_000)
        saved.wait()
        with file_size_limit(4096):
            save(saved, 2, 2, width=20_000)
            with pytest.raises(KeySyncError, match="step 2 could not be written .*File too large.* last good one is step 1; make room"):
                saved.wait()
            assert len(said) == 1 and said[0].startswith("WARNING: the checkpoint of step 2 could not be written") and "\n" not in said[0]
            assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1"] and saved.steps() == [1]
            save(saved, 3, 3, width=20_000)
            while len(said) < 2:
                saved.check()
        save(saved, 4, 4, width=20_000)
        saved.wait()
        assert saved.steps() == [4] and len(said) == 2
        assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]
        found = saved.weights(4, abstract_of(state_of(0, 0, width=20_000)).params)
        assert np.array_equal(found["bias"], np.full(20_000, 4, np.float32))


def test_a_store_that_does_not_answer_costs_one_save(tmp_path, monkeypatch):
    said = []
    with Checkpoints(tmp_path, warn=said.append) as saved:
        save(saved, 1, 1)
        saved.wait()
        with monkeypatch.context() as during:

            def refuse(*_, **__):
                raise object_store.HttpError("503 [try again]")

            during.setattr(checkpoints.ocp.CheckpointManager, "save", refuse)
            during.setattr(checkpoints.epath.Path, "glob", refuse)
            during.setattr(checkpoints.time, "sleep", lambda _: None)
            save(saved, 2, 2)
            assert (
                len(said) == 1 and "step 2 could not be written (503 [try again]); the last good one is step 1; training goes on" in said[0]
            )
        save(saved, 3, 3)
        saved.wait()
        assert saved.steps() == [1, 3]


def test_saves_work_again_once_what_kept_an_old_one_alive_is_gone(tmp_path):
    """A stopped run may still be writing while the next one starts and removes what it finds half-written."""
    left, said, gone = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp" / "params" / "d", [], threading.Event()

    left.mkdir(parents=True)
    for n in range(3000):  # removing these takes a while, in which others appear
        (left / f"old{n}").touch()

    def write():
        for n in itertools.count():
            with contextlib.suppress(OSError):
                left.mkdir(parents=True, exist_ok=True)
                (left / str(n)).touch()
            if gone.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with Checkpoints(tmp_path, warn=said.append) as saved:
            time.sleep(1)  # Orbax cleans up in the background
            gone.set()
            writer.join()
            save(saved, 2, 2)
            saved.check()
            save(saved, 3, 3)
            saved.wait()
            assert saved.latest() == 3
    finally:
        gone.set()
    assert not list((tmp_path / "checkpoints").glob("*tmp*")) and len(said) <= 1


def test_frozen_leaves_appear_whole_or_not_at_all(tmp_path):
    frozen = {"decoder": {"kernel": jnp.arange(50_000, dtype=jnp.float32)}}
    abstract = abstract_of(frozen)
    with pytest.raises(KeySyncError, match="frozen is missing"):
        checkpoints.restore_frozen(tmp_path, abstract)
    with file_size_limit(4096), pytest.raises(KeySyncError, match="frozen weights could not be written to .*File too large"):
        checkpoints.save_frozen(tmp_path, frozen)
    assert not (tmp_path / "frozen").exists()
    (tmp_path / "frozen.orbax-checkpoint-tmp-1").mkdir()  # killed while writing
    checkpoints.save_frozen(tmp_path, jax.tree.map(lambda x: -x, frozen))
    checkpoints.save_frozen(tmp_path, frozen)  # the first start never came to a checkpoint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["frozen"]
    assert np.array_equal(checkpoints.restore_frozen(tmp_path, abstract)["decoder"]["kernel"], frozen["decoder"]["kernel"])
    other = {"decoder": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=abstract["decoder"]["kernel"].sharding)}}
    with pytest.raises(KeySyncError, match="decoder/scale is missing; decoder/kernel is unknown"):
        checkpoints.restore_frozen(tmp_path, other)
    assert checkpoints.restore_frozen(tmp_path / "nothing", {}) == {}
    with pytest.raises(KeySyncError, match="frozen is not what was saved: decoder/kernel; restore it"):
        checkpoints.restore_frozen(tmp_path, abstract, checksums(jax.tree.map(lambda x: x.at[7].add(1), frozen)))


def test_bits_that_flip_on_the_disk_are_noticed(tmp_path):
    state = state_of(1, 1, width=5_000)
    abstract = abstract_of(state)
    with Checkpoints(tmp_path) as saved:
        saved.save(state, counters(1), META)
    wanted = jax.tree.leaves(state.params)
    largest = max((p for p in (tmp_path / "checkpoints" / "1" / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    whole, words = largest.read_bytes(), set()
    for position in range(len(whole) // 20, len(whole), len(whole) // 10):
        largest.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with Checkpoints(tmp_path, read_only=True) as saved:
            try:
                found, _ = saved.restore(1, abstract)
            except KeySyncError as error:
                words |= {word for word in ("params is not what was saved: block/kernel", "cannot be read") if word in str(error)}
            else:  # a byte that nothing reads
                assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(found.params), wanted, strict=True))
    assert "params is not what was saved: block/kernel" in words, "no flip came back as another weight: nothing was tested"
    # As it was before there were checksums: taken as it is.
    largest.write_bytes(whole)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "checksums")
    with Checkpoints(tmp_path, read_only=True) as saved:
        assert np.array_equal(saved.restore(1, abstract)[0].params["block"]["kernel"], state.params["block"]["kernel"])


def test_only_late_reads_of_a_damaged_checkpoint_are_silent(tmp_path):
    heard = []
    with Checkpoints(tmp_path):
        for kind, words in ((RuntimeError, "Event loop is closed"), (RuntimeError, "another"), (ValueError, "Event loop is closed")):
            checkpoints._without_late_reads(heard.append, SimpleNamespace(exc_type=kind, exc_value=kind(words)))
    assert [(found.exc_type, str(found.exc_value)) for found in heard] == [(RuntimeError, "another"), (ValueError, "Event loop is closed")]


def test_checksums_depend_on_every_bit_and_place_and_not_on_the_type_s_width():
    rng = np.random.default_rng(0)
    for dtype in (np.float32, np.int32, np.uint32, jnp.bfloat16, np.int8, np.bool_):
        x = rng.integers(0, 2, (3, 5, 7)).astype(dtype)
        base = checksums({"x": jnp.asarray(x)})["x"]
        assert checksums({"x": jnp.asarray(x.copy())})["x"] == base
        swapped = x.copy()
        first, other = np.argwhere(x == 0)[0], np.argwhere(x != 0)[0]
        swapped[tuple(first)], swapped[tuple(other)] = x[tuple(other)], x[tuple(first)]
        assert checksums({"x": jnp.asarray(swapped)})["x"] != base
    x = rng.standard_normal(11).astype(np.float32)
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32)[4] ^= np.uint32(1 << bit)
        assert changed({"x": jnp.asarray(flipped)}, checksums({"x": jnp.asarray(x)})) == ["x"]


def test_sigterm_is_seen_inside_and_deadly_outside(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with Checkpoints(tmp_path) as saved:
        assert not saved.reached_preemption(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert saved.reached_preemption(2)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_inside_closes_and_is_not_replaced(tmp_path):
    said = []
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, warn=said.append) as saved:
        save(saved, 1, 1)
        1 / 0  # noqa: B018
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]  # the save under way was completed
    with pytest.raises(ZeroDivisionError), file_size_limit(4096), Checkpoints(tmp_path, warn=said.append) as saved:
        save(saved, 2, 2, width=20_000)
        1 / 0  # noqa: B018
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"] and len(said) == 1


def test_a_checkpoint_without_meta_was_made_with_the_recipe_of_the_workdir(tmp_path):
    with Checkpoints(tmp_path) as saved:
        save(saved, 1, 1)
    shutil.rmtree(tmp_path / "checkpoints" / "1" / "meta")
    checkpoints.write_config(tmp_path, {"num_steps": 5})
    with Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.meta(1)["config"] == {"num_steps": 5}
        with pytest.raises(KeySyncError, match="meta of checkpoint 2 .* cannot be read"):
            saved.meta(2)


def test_what_a_run_may_go_on_with():
    config = TrainConfig()
    meta = json.loads(json.dumps(resume.describe(trainable_of(config))))
    assert meta["trained_for"]["audio_encoder"] == "hubert" and meta["trained_for"]["mask"]["kind"] == "box"
    assert meta["trained_for"]["resolution"] == 512
    assert resume.changes(meta, trainable_of(config), "it") == []
    harmless = dataclasses.replace(
        config, num_steps=7, dtype="float32", optimizer=dataclasses.replace(config.optimizer, learning_rate=2e-5),
        mesh=dataclasses.replace(config.mesh, fsdp=2), data=dataclasses.replace(config.data, threads=9),
        stage=dataclasses.replace(config.stage, audio_scale=3.0), vae=dataclasses.replace(config.vae, base_channels=64),
    )  # fmt: skip
    assert sorted(resume.changes(meta, trainable_of(harmless), "it")) == [
        "data.threads 4 -> 9", "dtype bfloat16 -> float32", "mesh.fsdp 1 -> 2", "num_steps 60000 -> 7",
        "optimizer.learning_rate 1e-05 -> 2e-05", "stage.audio_scale 5.0 -> 3.0",
    ]  # fmt: skip
    stage = dataclasses.replace(config.stage, audio_encoder="wavlm", mask=dataclasses.replace(config.stage.mask, kind="mouth"))
    other = dataclasses.replace(config, stage=stage, freeze="none", loss=dataclasses.replace(config.loss, pixel_weight=1.0))
    with pytest.raises(KeySyncError) as error:
        resume.changes(meta, trainable_of(other), "checkpoint 5 of run")
    for words in ("checkpoint 5 of run", "stage.audio_encoder hubert -> wavlm", "stage.mask.kind box -> mouth", "freeze temporal -> none",
                  "loss.pixel_weight 0.0 -> 1.0", "init.kind=run"):  # fmt: skip
        assert words in str(error.value)
    del meta["config"]["optimizer"]["max_skipped"]  # a key that did not exist when the checkpoint was made
    assert resume.changes(meta, trainable_of(config), "it") == []


def test_an_autoencoder_goes_on_at_its_resolution_alone():
    config = TrainConfig(model="vae", resolution=64)
    meta = resume.describe(trainable_of(config))
    frozen = dataclasses.replace(config, freeze="none", stage=dataclasses.replace(config.stage, audio_encoder="wavlm"))
    assert resume.changes(meta, trainable_of(frozen), "it") == ["freeze temporal -> none"]  # an autoencoder is trained as a whole
    with pytest.raises(KeySyncError, match="it is of another model: resolution 64 -> 128; take these back, or start a new run"):
        resume.changes(meta, trainable_of(dataclasses.replace(config, resolution=128)), "it")
