import concurrent.futures
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import tiny_shards as tiny
from bounds import approx

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.dataset_layout import make_group, read_group
from keysync_jax.data_pipeline.records import Column
from keysync_jax.data_pipeline.shards import finish_group, prepare_group, verify_group, write_group, write_shard
from keysync_jax.data_pipeline.source.clips import FrameStore


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A dataset written once, without interruption, and its bytes. Do not change it."""
    root = tmp_path_factory.mktemp("finished")
    write_group(root, tiny.group(), tiny.load, clip_list())
    return root, tiny.tree(root)


def clip_list():
    return [*tiny.clips(), dataclasses.replace(tiny.clips()[0], id="clip90", speaker="t", split="test")]


def python(code, *args):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), *sys.path])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)


def test_tfds_reads_it_without_tensorflow(finished):
    root, _ = finished
    result = python(
        """
        import json, sys
        import tensorflow_datasets as tfds
        builder = tfds.builder_from_directory(sys.argv[1])
        source = builder.as_data_source("train")
        record = source[45]
        assert "tensorflow" not in sys.modules
        values = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in record.items() if k != "clip"}
        print(json.dumps(dict(splits={k: v.num_examples for k, v in builder.info.splits.items()}, length=len(source),
                              clip=record["clip"].decode(), part=len(builder.as_data_source("train[:50%]")), **values)))
        """,
        root,
    )
    assert result.returncode == 0, result.stderr
    got = json.loads(result.stdout.splitlines()[-1])
    assert got["splits"] == {"train": 508, "test": 40} and got["length"] == 508 and got["part"] == 254
    # Clips lie in the order of their ids: clip00 (40 frames), clip07 (20), ...; record 45 is frame 5 of clip07.
    assert (got["clip"], got["frame"]) == ("clip07", 5)
    np.testing.assert_array_equal(got["latent"], tiny.latent("clip07", 5))
    np.testing.assert_array_equal(got["audio_hubert"], tiny.audio("clip07", 5, 6))
    np.testing.assert_array_equal(got["landmarks"], tiny.landmarks("clip07", 5))
    assert got["valence"] == approx(0.005, 1, dtype=np.float32)


def test_files_and_manifest(finished):
    root, files = finished
    names = set(files)
    assert {"keysync.json", "clips.jsonl", "dataset_info.json", "features.json", "MANIFEST.sha256", "_SUCCESS"} < names
    manifest = dict(reversed(line.split("  ")) for line in files["MANIFEST.sha256"].decode().splitlines())
    assert set(manifest) == {n for n in names if "/" not in n} - {"MANIFEST.sha256", "_SUCCESS"}
    assert all(hashlib.sha256(files[n]).hexdigest() == digest for n, digest in manifest.items())
    assert files["_SUCCESS"].decode().strip() == hashlib.sha256(files["MANIFEST.sha256"]).hexdigest()
    assert verify_group(root) == []
    train = [s.num_records for s in read_group(root).shards if s.split == "train"]
    assert sum(train) == 508 and len(train) == 6 and max(train) <= 112


def test_bytes_do_not_depend_on_the_number_of_workers_or_their_order(finished, tmp_path):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        write_group(tmp_path, tiny.group(), tiny.load, clip_list()[::-1], run=lambda f, shards: pool.map(f, list(shards)[::-1]))
    assert tiny.tree(tmp_path) == finished[1]


KILLED = """
    import os, sys
    from pathlib import Path
    import tiny_shards as tiny
    from keysync_jax.data_pipeline.shards import prepare_group, write_shard
    import test_shards
    root = Path(sys.argv[1])
    pieces = 0
    def load(piece):
        global pieces
        pieces += 1
        if pieces == 5:
            os.kill(os.getpid(), 9)
        return tiny.load(piece)
    plan = prepare_group(root, tiny.group(), test_shards.clip_list())
    for shard in plan.shards:
        write_shard(root, plan.group, shard, load)
"""


def test_killed_and_restarted_gives_the_same_bytes_and_repeats_nothing(finished, tmp_path):
    result = python(KILLED, tmp_path)
    assert result.returncode == -9, result.stderr
    done = [p.name for p in (tmp_path / "checksums").iterdir()]
    assert done and any(p.name.endswith(".tmp") for p in tmp_path.iterdir()), "the kill must have hit an unfinished shard"
    assert not (tmp_path / "_SUCCESS").exists()
    with pytest.raises(KeySyncError, match="holds no dataset"):
        FrameStore(tmp_path)

    loaded = []
    plan = prepare_group(tmp_path, tiny.group(), clip_list())
    written = [write_shard(tmp_path, plan.group, s, lambda p: loaded.append(p) or tiny.load(p)) for s in plan.shards]
    assert [w.shard.file for w in written if w.skipped] == sorted(n.removesuffix(".json") for n in done)
    assert loaded == [p for w, s in zip(written, plan.shards, strict=True) if not w.skipped for p in s.pieces]
    finish_group(tmp_path, plan)
    assert tiny.tree(tmp_path) == finished[1]


def test_a_second_run_writes_nothing(finished, tmp_path):
    write_group(tmp_path, tiny.group(), tiny.load, clip_list())
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("keysync-*")}

    def load(piece):
        raise AssertionError(f"{piece} was loaded again")

    write_group(tmp_path, tiny.group(), load, clip_list())
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("keysync-*")} == before
    assert tiny.tree(tmp_path) == finished[1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "record"])
def test_a_damaged_shard_is_noticed_and_written_again(finished, tmp_path, damage):
    write_group(tmp_path, tiny.group(), tiny.load, clip_list())
    shard = tmp_path / "keysync-train.array_record-00002"
    data = bytearray(shard.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif damage == "truncate":
        shard.write_bytes(data[:-1])
    elif damage == "delete":
        shard.unlink()
    else:
        (tmp_path / "checksums" / f"{shard.name}.json").write_text("{")
    assert verify_group(tmp_path) == ([] if damage == "record" else [shard.name])
    loaded = []
    write_group(tmp_path, tiny.group(), lambda p: loaded.append(p.clip) or tiny.load(p), clip_list())
    assert 0 < len(loaded) < 6 and tiny.tree(tmp_path) == finished[1]


def test_added_clips_go_behind_and_nothing_is_rewritten(finished, tmp_path):
    write_group(tmp_path, tiny.group(), tiny.load, clip_list())
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("keysync-*")}
    new = [dataclasses.replace(c, id=f"clip{50 + i}", speaker="new", scores={"quality": 1.0}) for i, c in enumerate(tiny.clips((30, 80)))]
    rescored = dataclasses.replace(clip_list()[0], scores={"quality": 0.9, "sync": 1.5})
    loaded = []
    write_group(tmp_path, tiny.group(frames=999), lambda p: loaded.append(p.clip) or tiny.load(p), [rescored, *new])
    assert sorted(set(loaded)) == ["clip50", "clip51"]
    after = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in tmp_path.glob("keysync-*")}
    assert before.items() < after.items()
    store = FrameStore(tmp_path)
    assert [c.id for c in store.clips if c.split == "train"][-2:] == ["clip50", "clip51"] and len(store.clips) == 9
    by_id = {c.id: c for c in store.clips}
    assert by_id["clip00"].scores == {"quality": 0.9, "sync": 1.5} and by_id["clip07"].scores == {"quality": 0.1}
    np.testing.assert_array_equal(store.read(by_id["clip51"], [79], ["latent"])["latent"][0], tiny.latent("clip51", 79))
    assert read_group(tmp_path).group.frames_per_shard == tiny.group().frames_per_shard


def test_a_changed_fingerprint_rewrites_that_clips_shards_only(tmp_path):
    clips = tiny.clips((100, 100, 100), fingerprint="v1")
    write_group(tmp_path, tiny.group(), tiny.load, clips)
    loaded = []
    changed = [dataclasses.replace(c, fingerprint="v2") if c.id == "clip07" else c for c in clips]
    write_group(tmp_path, tiny.group(), lambda p: loaded.append(p.clip) or tiny.load(p), changed)
    assert loaded == ["clip07"]


def test_a_new_column_touches_no_existing_file_and_lines_up(finished, tmp_path):
    root = tmp_path / "data"
    write_group(root, tiny.group(), tiny.load, clip_list())
    write_group(root, tiny.jpeg_group(), tiny.load_jpeg)
    files = tiny.tree(root)
    assert {n: b for n, b in files.items() if not n.startswith("columns/")} == finished[1]
    store = FrameStore(root)
    assert set(store.columns) == {"latent", "audio_hubert", "audio_log_mel", "landmarks", "valence", "jpeg"}
    assert store.info("jpeg") == {} and store.groups["jpeg"].group.info == {"quality": 95}
    for clip in store.clips:
        frames = [0, clip.num_frames // 2, clip.num_frames - 1]
        got = store.read(clip, frames, ["jpeg", "latent"])
        assert got["jpeg"] == [tiny.jpeg(clip.id, f) for f in frames]
        np.testing.assert_array_equal(got["latent"], [tiny.latent(clip.id, f) for f in frames])
    # The pictures are a tfds dataset of their own.
    result = python(
        """
        import sys, tensorflow_datasets as tfds
        image = tfds.builder_from_directory(sys.argv[1] + "/columns/jpeg").as_data_source("test")[39]["jpeg"]
        assert "tensorflow" not in sys.modules
        print(image.shape, image.dtype, image[0, 0, 0], image[0, -1, 0])
        """,
        root,
    )
    shape, left, right = result.stdout.strip().rpartition(" ")[0], *result.stdout.split()[-2:]
    assert result.returncode == 0 and shape.startswith("(32, 32, 3) uint8"), result.stderr
    assert int(left) == pytest.approx(117, abs=3) and int(right) == pytest.approx(167, abs=3)  # code values, through JPEG


def test_a_group_that_lags_behind_is_refused_until_it_is_written_again(tmp_path):
    write_group(tmp_path, tiny.group(), tiny.load, tiny.clips((40, 30)))
    write_group(tmp_path, tiny.jpeg_group(), tiny.load_jpeg)
    more = [dataclasses.replace(c, id="clip60", speaker="x") for c in tiny.clips((25,))]
    write_group(tmp_path, tiny.group(), tiny.load, more)
    with pytest.raises(KeySyncError, match="column 'jpeg' covers 70 of 95 frames of split 'train'"):
        FrameStore(tmp_path).require("jpeg")
    loaded = []
    write_group(tmp_path, tiny.jpeg_group(), lambda p: loaded.append(p.clip) or tiny.load_jpeg(p))
    assert loaded == ["clip60"]
    FrameStore(tmp_path).require("jpeg")


def test_refusals(finished, tmp_path):
    root, _ = finished
    other = dataclasses.replace(tiny.group(), info={"latent": {"seed": 1}})
    with pytest.raises(KeySyncError, match=r"was made with latent None \(now {'seed': 1}\); use the same"):
        prepare_group(root, other, clip_list())
    # Only what differs is named, however much a group says of itself.
    made = {name: {"seed": 0, "scale": 0.18215, "config": {"layers": 12}} for name in ("latent", "audio_hubert")}
    write_group(tmp_path / "made", dataclasses.replace(tiny.group(), info=made), tiny.load, clip_list())
    now = {"latent": {**made["latent"], "seed": 1}, "audio_hubert": {**made["audio_hubert"], "config": {"layers": 4}}}
    with pytest.raises(KeySyncError, match=r"made with audio_hubert config layers 12 \(now 4\), latent seed 0 \(now 1\); use the same"):
        prepare_group(tmp_path / "made", dataclasses.replace(tiny.group(), info=now), clip_list())
    with pytest.raises(KeySyncError, match="'clip00' is in .* with 40 frames in split 'train' and now comes with 41"):
        prepare_group(root, tiny.group(), [dataclasses.replace(clip_list()[0], num_frames=41)])
    with pytest.raises(KeySyncError, match="clip id 'clip60' occurs twice"):
        prepare_group(root, tiny.group(), [dataclasses.replace(clip_list()[0], id="clip60", speaker="x")] * 2)
    taken = make_group((Column("latent", "float16", (2,)),), tiny.CROP, 100, name="more")
    with pytest.raises(KeySyncError, match="column 'latent' is already in"):
        prepare_group(root, taken)
    with pytest.raises(KeySyncError, match="no clips to write"):
        prepare_group(tmp_path, tiny.group(), [])
    with pytest.raises(KeySyncError, match="does not exist"):
        prepare_group(tmp_path, tiny.jpeg_group())
    with pytest.raises(KeySyncError, match="must contain group_size:1"):
        dataclasses.replace(tiny.group(), writer_options="group_size:16")


@pytest.mark.parametrize("name", ["keysync.json", "clips.jsonl"])
@pytest.mark.parametrize("damage", [b"\xff", b"{}\n", None])
def test_damaged_metadata_are_one_clear_error(finished, tmp_path, name, damage):
    root = tmp_path / "data"
    shutil.copytree(finished[0], root)
    if damage is None:
        (root / name).unlink()
    else:
        (root / name).write_bytes(damage)
    with pytest.raises(KeySyncError, match=name):
        FrameStore(root)


def test_a_damaged_checksum_record_is_written_again(finished, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(finished[0], root)
    record = min((root / "checksums").iterdir())
    record.write_bytes(b"\xff" + record.read_bytes())
    write_group(root, tiny.group(), tiny.load, clip_list())
    assert tiny.tree(root) == finished[1]


def test_a_clip_that_loads_short_stops_the_run_and_leaves_no_file(tmp_path):
    def load(piece):
        values = tiny.load(piece)
        return {k: v[:-1] for k, v in values.items()} if piece.clip == "clip07" else values

    with pytest.raises(KeySyncError, match="clip 'clip07': 29 frames were loaded for frames 0 to 29"):
        write_group(tmp_path, tiny.group(), load, tiny.clips((100, 30)))
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / "_SUCCESS").exists()


def test_finish_refuses_a_missing_shard(tmp_path):
    plan = prepare_group(tmp_path, tiny.group(), tiny.clips())
    assert pickle.loads(pickle.dumps(plan)) == plan, "the plan travels to workers"
    for shard in plan.shards[:-1]:
        write_shard(tmp_path, plan.group, shard, tiny.load)
    with pytest.raises(KeySyncError, match="keysync-train.array_record-0000. has not been written for this plan"):
        finish_group(tmp_path, plan)


def test_shards_of_an_abandoned_plan_are_removed(finished, tmp_path):
    """Interrupted before the index was written, then started with fewer clips: the surplus shards must not stay."""
    plan = prepare_group(tmp_path, tiny.group(frames=30), clip_list())
    for shard in plan.shards:
        write_shard(tmp_path, plan.group, shard, tiny.load)
    write_group(tmp_path, tiny.group(), tiny.load, clip_list())
    assert tiny.tree(tmp_path) == finished[1]


def test_writing_to_an_object_store(finished, monkeypatch):
    """gs:// through epath, with a store in memory in the place of Google's."""
    import fsspec
    from etils.epath import backend
    from fsspec.implementations.memory import MemoryFileSystem

    class Bucket(MemoryFileSystem):
        protocol = "gcs"
        store, pseudo_dirs = {}, [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://").replace("gcs://", "memory://"))

    monkeypatch.setattr(backend.fsspec_backend, "fs", lambda path: Bucket() if str(path).startswith("gs://") else fsspec.filesystem("file"))
    root = "gs://bucket/data"
    write_group(root, tiny.group(), tiny.load, clip_list())
    assert layout.read_clips(root) == layout.read_clips(finished[0])
    stored = {name.removeprefix("/bucket/data/"): file.getvalue() for name, file in Bucket.store.items()}
    assert stored == finished[1]
    assert verify_group(root) == []
