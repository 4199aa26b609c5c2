import dataclasses
import shutil

import numpy as np
import pytest
import tiny_shards as tiny
from bounds import approx, close

from keysync_jax.config import MaskConfig, StageConfig
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline import records
from keysync_jax.data_pipeline.records import Column
from keysync_jax.data_pipeline.shard_plan import Piece
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.latent_masks import MIRROR, jitter_landmarks, latent_masks, mirror_landmarks
from keysync_jax.data_pipeline.source.mixture import ClipFilter, DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader, check_stage, source_config
from keysync_jax.data_pipeline.source.windows import InterpolationWindows, KeyframeWindows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Six clips (two long enough for keyframes), their pictures and an occluder column. Do not change it."""
    root = tmp_path_factory.mktemp("reading")
    write_group(root, tiny.group(), tiny.load, tiny.clips())
    write_group(root, tiny.jpeg_group(), tiny.load_jpeg)
    occluder = dataclasses.replace(tiny.jpeg_group(), name="occluder", columns=(Column("occluder", "bool", tiny.LATENT),))
    write_group(root, occluder, lambda p: {"occluder": np.stack([occluded(f) for f in range(p.start, p.stop)])})
    return root


def occluded(frame):
    """The left half of the lower half of the latent grid, in odd frames."""
    cells = np.zeros(tiny.LATENT, bool)
    cells[2:, :2] = frame % 2
    return cells


def reader(root, windows, **options):
    return WindowReader(SourceConfig((DatasetChoice(str(root)),), windows, **options))


def first(reader, **changes):
    return reader.sample(0, 0, 1)._replace(**changes)


def test_keyframe_sample_holds_the_frames_it_names(root):
    source = reader(root, KeyframeWindows(), columns=("valence",))
    for row in range(6):
        sample = source.sample(3, row, 6)
        out = source.read([sample])
        clip, frames = source.clip(sample).id, sample.start + 13 * np.arange(14)
        assert sample.spacing == 13 and frames[-1] <= source.clip(sample).num_frames - 2
        np.testing.assert_array_equal(out["frames"][0], frames)
        np.testing.assert_array_equal(out["known"][0], [tiny.latent(clip, f) for f in frames])
        np.testing.assert_array_equal(out["audio"][0], [tiny.audio(clip, f, 6) for f in frames])
        np.testing.assert_array_equal(out["identity"][0], tiny.latent(clip, frames[0]))
        close(out["valence"][0], frames / 1000, 1, scale="each")
        assert source.stores[out["dataset"][0]].clips[out["clip"][0]].id == clip
        assert {k: (v.shape[1:], v.dtype.name) for k, v in out.items()} == {
            "known": ((14, 4, 4, 4), "float32"), "audio": ((14, 2, 6), "float32"), "mask": ((14, 4, 4, 1), "float32"),
            "identity": ((4, 4, 4), "float32"), "frames": ((14,), "int32"), "dataset": ((), "int32"), "clip": ((), "int32"),
            "valence": ((14,), "float32"),
        }  # fmt: skip


def test_columns_that_are_read_anyway_and_pictures(root):
    source = reader(root, KeyframeWindows(), columns=("latent", "valence", "valence"))
    out = source.read([first(source)])
    np.testing.assert_array_equal(out["latent"], out["known"].astype(np.float16))
    assert out["valence"].shape == (1, 14)
    with pytest.raises(KeySyncError, match="column 'jpeg' holds encoded pictures; pixel_frames delivers them"):
        reader(root, KeyframeWindows(), columns=("jpeg",))


def test_interpolation_sample_is_conditioned_on_its_endpoints(root):
    source = reader(root, InterpolationWindows(), audio_encoder="log_mel")
    samples = [source.sample(0, row, 8) for row in range(8)]
    out = source.read(samples)
    assert out["endpoints"].shape == (8, 2, 4, 4, 4) and len({s.clip for s in samples}) >= 4
    for row, sample in enumerate(samples):
        clip, frames = source.clip(sample).id, np.arange(sample.start, sample.start + 14)
        np.testing.assert_array_equal(out["frames"][row], frames)
        np.testing.assert_array_equal(out["known"][row], [tiny.latent(clip, f) for f in frames])
        np.testing.assert_array_equal(out["endpoints"][row], [tiny.latent(clip, frames[0]), tiny.latent(clip, frames[-1])])
        np.testing.assert_array_equal(out["audio"][row], [tiny.audio(clip, f, 4) for f in frames])


def test_windows_across_a_shard_boundary(root):
    """The long clips lie in several shards; every frame still comes back in its place."""
    store = FrameStore(root)
    assert len(store.groups["frames"].shards) >= 5
    for clip in store.clips:
        frames = list(range(clip.num_frames))[::-1]
        got = store.read(clip, frames, ["latent", "jpeg"])
        np.testing.assert_array_equal(got["latent"], [tiny.latent(clip.id, f) for f in frames])
        assert got["jpeg"] == [tiny.jpeg(clip.id, f) for f in frames]


def test_clips_too_short_for_the_spacing_are_used_on_request(root):
    assert {c.num_frames for c in reader(root, KeyframeWindows()).selections[0].clips} == {175, 180}
    source = reader(root, KeyframeWindows(min_spacing=2))
    assert {c.num_frames for c in source.selections[0].clips} == {175, 180, 40, 60, 33}
    out = source.read([source.sample(0, row, 5) for row in range(5)])
    spacings = {(source.clip(s).num_frames, s.spacing) for s in (source.sample(0, row, 5) for row in range(5))}
    assert spacings == {(175, 13), (180, 13), (40, 2), (60, 4), (33, 2)}
    assert (np.diff(out["frames"], axis=1) == np.diff(out["frames"], axis=1)[:, :1]).all()


@pytest.mark.parametrize("identity", ["first", "clip_first", "random"])
def test_identity_frame(root, identity):
    source = reader(root, KeyframeWindows(identity=identity))
    samples = [source.sample(0, row, 40) for row in range(40)]
    out = source.read(samples)
    expected = [tiny.latent(source.clip(s).id, s.identity) for s in samples]
    np.testing.assert_array_equal(out["identity"], expected)
    chosen = [s.identity for s in samples]
    if identity == "random":
        assert len(set(chosen)) > 30 and max(chosen) > 100
    else:
        assert chosen == [s.start if identity == "first" else 0 for s in samples]


# ------------------------------------------------------------------------------------------------------------------------- masks


def test_box_mask_from_the_stored_landmarks(root):
    source = reader(root, InterpolationWindows())
    mask = source.read([first(source)])["mask"][0, :, :, :, 0]
    # Crop 32, cells of 8 pixels: rows from y = 16 down, columns 8 to 23.
    expected = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(mask, np.broadcast_to(expected, mask.shape))


@pytest.mark.parametrize("kind", ["box", "full", "mouth", "heart", "face"])
def test_every_mask_kind_is_that_of_the_media_module(root, kind):
    from keysync_jax.media.masks import make_mask

    source = reader(root, InterpolationWindows(), mask=MaskConfig(kind=kind))
    sample = first(source)
    points = np.stack([tiny.landmarks("", 0)] * 14)
    np.testing.assert_array_equal(source.read([sample])["mask"][0, ..., 0], make_mask(points, 32, 32, MaskConfig(kind=kind), (4, 4)))


def test_occluded_cells_are_kept(root):
    source = reader(root, InterpolationWindows(), use_occluder=True)
    sample = first(source)
    mask = source.read([sample])["mask"][0, ..., 0]
    odd = np.arange(sample.start, sample.start + 14) % 2 == 1
    assert mask[odd][:, 2:, 1].max() == 0 and mask[~odd][:, 2:, 1].min() == 1 and mask[:, 2:, 2].min() == 1


def test_mirroring_swaps_sides_everywhere(root):
    source = reader(root, KeyframeWindows(identity="clip_first"), use_occluder=True, pixel_frames=2)
    plain, mirrored = (source.read([first(source, mirrored=m)]) for m in (False, True))
    for name in ("known", "mask", "identity", "original_frames"):
        np.testing.assert_array_equal(mirrored[name], plain[name][..., ::-1, :])
        assert name == "identity" or not np.array_equal(mirrored[name], plain[name])
    np.testing.assert_array_equal(mirrored["audio"], plain["audio"])


def test_flip_takes_half_of_the_samples_and_is_off_by_default(root):
    assert not any(reader(root, InterpolationWindows()).sample(0, row, 200).mirrored for row in range(200))
    assert 70 < sum(reader(root, InterpolationWindows(), flip=True).sample(0, row, 200).mirrored for row in range(200)) < 130


def test_mirrored_landmarks_name_the_same_features():
    assert sorted(MIRROR) == list(range(68)) and (MIRROR[MIRROR] == np.arange(68)).all()
    # Jaw tips, outer eye corners, mouth corners and nostrils change places; chin, nose tip and lip centres stay.
    pairs = {0: 16, 17: 26, 36: 45, 37: 44, 39: 42, 41: 46, 48: 54, 60: 64, 31: 35, 50: 52, 59: 55, 67: 65}
    for left, right in pairs.items():
        assert MIRROR[left] == right
    for centre in (8, 27, 30, 33, 51, 57, 62, 66):
        assert MIRROR[centre] == centre
    points = np.random.default_rng(0).random((3, 68, 2)) * 64
    back = mirror_landmarks(mirror_landmarks(points, 64), 64)
    close(back, points, 2, scale=64, dtype=np.float64)
    # The mask of the mirrored face is the mirrored mask.
    for dtype, x in ((np.float32, 10 + np.round(points[..., 0] * 0.5)), (np.float64, 10 + points[..., 0] * 0.5)):
        placed = np.stack([x, points[..., 1]], axis=-1).astype(dtype)
        ours = latent_masks(mirror_landmarks(placed, 64), (64, 64), (64, 64), MaskConfig())
        np.testing.assert_array_equal(ours, latent_masks(placed, (64, 64), (64, 64), MaskConfig())[:, :, ::-1])


def test_box_jitter_moves_the_mask_within_its_bound(root):
    points = np.stack([tiny.landmarks("", 0)] * 2) * 8  # a crop of 256
    moved = jitter_landmarks(points, (256, 256), (0.1, -0.05), 0.2)
    close(moved[..., 1], points[..., 1] - 12.8, 4, scale=256)
    width = np.ptp(points[0, :, 0])
    assert np.ptp(moved[0, :, 0]) == approx(1.2 * width, 4, dtype=np.float32, scale=256)
    assert moved[0, :, 0].mean() == approx(points[0, :, 0].mean() + 25.6, 4, dtype=np.float32, scale=256)
    source = reader(root, InterpolationWindows(), box_jitter=0.3)
    samples = [source.sample(0, row, 60) for row in range(60)]
    draws = np.array([[*s.shift, s.stretch] for s in samples])
    assert np.abs(draws).max() <= 0.3 and (draws.std(axis=0) > 0.1).all()
    masks = source.read(samples)["mask"]
    assert len({m.tobytes() for m in masks}) > 5 and all((m == m[0]).all() for m in masks), "one move for all frames of a window"


# ------------------------------------------------------------------------------------------------------------------------- pixels


def test_only_the_asked_frames_are_decoded_and_they_are_the_right_ones(root, monkeypatch):
    source = reader(root, KeyframeWindows(), pixel_frames=2)
    samples = [source.sample(5, row, 4) for row in range(4)]
    decoded = []
    original = WindowReader._decode_jpeg
    monkeypatch.setattr(WindowReader, "_decode_jpeg", lambda self, *a: decoded.append(a[-1]) or original(self, *a))
    out = source.read(samples)
    assert len(decoded) == 8 and out["original_frames"].shape == (4, 2, 32, 32, 3)
    assert (out["original_indices"] == out["original_indices"][0]).all(), "one choice for all samples of a step"
    assert len({source.sample(step, 0, 4).pixels for step in range(40)}) > 20
    for row, sample in enumerate(samples):
        for k, index in enumerate(sample.pixels):
            frame = sample.start + 13 * index
            expected = tiny.picture(source.clip(sample).id, frame) / 127.5 - 1
            np.testing.assert_allclose(out["original_frames"][row, k], expected, rtol=0, atol=4 / 127.5)  # code values, through JPEG
    everything = reader(root, KeyframeWindows(), pixel_frames=14)
    assert everything.read([everything.sample(0, 0, 1)])["original_indices"].tolist() == [list(range(14))]


# ------------------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "options, message",
    [
        ({"audio_encoder": "wavlm"}, r"no tokens of audio encoder 'wavlm'; it has hubert, log_mel\. Choose one"),
        ({"columns": ("arousal",)}, "no column 'arousal'; it has audio_hubert"),
        ({"pixel_frames": 15}, "pixel_frames is 15; choose 0 to 14"),
        ({"box_jitter": 1.0}, "box_jitter is 1.0"),
        ({"sampling": "often"}, "sampling 'often' is not known"),
    ],
)
def test_what_is_not_there_is_refused_by_name(root, options, message):
    with pytest.raises(KeySyncError, match=message):
        reader(root, InterpolationWindows(), **options)


def test_stage_decides_windows_encoder_and_mask_and_is_checked(root):
    stage = StageConfig(stage="interpolation", audio_encoder="log_mel", audio_feature_dim=4, resolution=32, latent_size=4,
                        mask=MaskConfig(kind="mouth"))  # fmt: skip
    config = source_config(stage, [DatasetChoice(str(root))], seed=3)
    assert config.windows == InterpolationWindows() and config.audio_encoder == "log_mel" and config.mask.kind == "mouth"
    assert source_config(StageConfig(), [DatasetChoice("x")], {"min_spacing": 4}).windows == KeyframeWindows(min_spacing=4)
    source = WindowReader(config)
    check_stage(source, stage)
    wrong = {"latent_size": (64, r"latents of \(4, 4\)"), "resolution": (512, r"of \(32, 32\)"), "audio_feature_dim": (80, "4 numbers")}
    for field, (value, message) in wrong.items():
        with pytest.raises(KeySyncError, match=message):
            check_stage(source, dataclasses.replace(stage, **{field: value}))


def test_mixture_of_datasets(root, tmp_path):
    more = [dataclasses.replace(c, source="more") for c in tiny.clips((50, 60, 70))]
    write_group(tmp_path / "more", tiny.group(), tiny.load, more)
    good = ClipFilter(min_scores={"quality": 0.3})
    choices = (DatasetChoice(str(root), weight=3.0, filter=good), DatasetChoice(str(tmp_path / "more"), weight=1.0))
    source = WindowReader(SourceConfig(choices, InterpolationWindows(), seed=1))
    samples = [source.sample(step, row, 8) for step in range(256) for row in range(8)]
    assert np.mean([s.dataset for s in samples]) == pytest.approx(0.25, abs=1 / 1024)  # to one item of a block
    assert {source.clip(s).scores["quality"] for s in samples if s.dataset == 0} == {0.3, 0.4, 0.5}
    assert {source.clip(s).num_frames for s in samples if s.dataset == 1} == {50, 60, 70}
    out = source.read(samples[:16])
    for row, sample in enumerate(samples[:16]):
        np.testing.assert_array_equal(out["known"][row, 0], tiny.latent(source.clip(sample).id, sample.start))

    other = dataclasses.replace(tiny.group(), columns=(records.latent_column(8, 8), *tiny.COLUMNS[1:]))
    write_group(tmp_path / "other", other, lambda p: tiny.load(p) | {"latent": np.zeros((p.stop - p.start, 8, 8, 4))}, more)
    with pytest.raises(KeySyncError, match=r"column 'latent' is float16\[8, 8, 4\] but float16\[4, 4, 4\] in"):
        WindowReader(SourceConfig((choices[0], DatasetChoice(str(tmp_path / "other"))), InterpolationWindows()))


def test_fingerprint_changes_with_what_decides_the_order(root):
    base = reader(root, KeyframeWindows(), seed=1)
    assert base.fingerprint == reader(root, KeyframeWindows(), seed=1, audio_encoder="log_mel").fingerprint
    without = DatasetChoice(str(root), filter=ClipFilter(exclude_clips=("clip14",)))
    others = [
        reader(root, KeyframeWindows(), seed=2), reader(root, KeyframeWindows(min_spacing=2), seed=1),
        reader(root, InterpolationWindows(), seed=1), WindowReader(SourceConfig((without,), KeyframeWindows(), seed=1)),
    ]  # fmt: skip
    assert len({base.fingerprint, *(o.fingerprint for o in others)}) == 5


# -------------------------------------------------------------------------------------------------------------------- damaged data


def write_one(root, change=None, **clip):
    """One clip of 30 frames in one shard; `change` edits the records on their way to disk."""
    original = records.encode_clip
    with pytest.MonkeyPatch.context() as patch:
        if change:
            patch.setattr("keysync_jax.data_pipeline.shards.encode_clip", lambda *a: (change(i, r) for i, r in enumerate(original(*a))))
        write_group(root, tiny.group(), tiny.load, tiny.clips((30,)))
    return reader(root, InterpolationWindows())


def read_all(source):
    clip = source.stores[0].clips[0]
    for frame in range(clip.num_frames):
        source.stores[0].read(clip, [frame], ["latent", "landmarks"])


@pytest.mark.parametrize("column, dtype", [("latent", np.float16), ("landmarks", np.float32)])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_stops_the_run(tmp_path, column, dtype, bad):
    def change(frame, record):
        if frame != 17:
            return record
        example = records._Example.FromString(record)
        stored = example.features.feature[column].bytes_list
        values = np.frombuffer(stored.value[0], dtype).copy()
        values[5] = bad
        stored.value[0] = values.tobytes()
        return example.SerializeToString(deterministic=True)

    with pytest.raises(KeySyncError, match=rf"clip 'clip00' frame 17 \(.*array_record-00000\): column '{column}' is not finite"):
        read_all(write_one(tmp_path, change))


def test_a_misplaced_record_is_noticed(tmp_path):
    values = tiny.load(Piece("clip00", 3, 4))
    third = next(records.encode_clip(tiny.COLUMNS, "clip00", 3, values))

    def change(frame, record):
        return third if frame == 4 else record

    with pytest.raises(KeySyncError, match="clip 'clip00' frame 4 .* holds frame 3 of clip 'clip00'"):
        read_all(write_one(tmp_path, change))


def test_flipped_bits_in_a_shard_name_the_frame(tmp_path):
    source = write_one(tmp_path)
    shard = tmp_path / "keysync-train.array_record-00000"
    data = bytearray(shard.read_bytes())
    place = data.index(tiny.latent("clip00", 21).tobytes())
    data[place + 40] ^= 4
    shard.write_bytes(data)
    with pytest.raises(KeySyncError, match=r"clip 'clip00' frame 21 \(.*\) cannot be read: .*hash mismatch"):
        read_all(source)
    fresh = reader(tmp_path, InterpolationWindows())
    with pytest.raises(KeySyncError, match="clip 'clip00' frame 21"):
        fresh.read([first(fresh, start=10)])
    fresh.read([first(fresh, start=0)])  # frames 0 to 13 are whole


@pytest.mark.parametrize("damage", ["truncate", "empty", "missing", "other"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    source = write_one(tmp_path / "a")
    shard = tmp_path / "a" / "keysync-train.array_record-00000"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-70000])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "missing":
        shard.unlink()
    else:
        write_group(tmp_path / "b", tiny.group(), tiny.load, tiny.clips((20,)))
        shutil.copy(tmp_path / "b" / shard.name, shard)
    with pytest.raises(KeySyncError, match=f"{shard.name} (is missing, truncated|holds 20 of 30 records)"):
        read_all(source)


def test_a_damaged_picture_is_named(root, tmp_path):
    shutil.copytree(root, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "columns" / "jpeg")
    write_group(tmp_path / "data", tiny.jpeg_group(), lambda p: {"jpeg": [b"\xff\xd8\xff broken"] * (p.stop - p.start)})
    source = reader(tmp_path / "data", InterpolationWindows(), pixel_frames=1)
    with pytest.raises(KeySyncError, match="clip 'clip.*' frame .*: the JPEG cannot be decoded"):
        source.read([source.sample(0, 0, 1)])


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("_SUCCESS", None, "is not finished"),
        ("keysync.json", "{}", "not a dataset description"),
        ("keysync.json", '{"format": 2}', "has format 2"),
        ("clips.jsonl", "", "clips.jsonl names 0 frames of split 'train' but the shards hold 508"),
    ],
)
def test_unfinished_or_damaged_metadata(root, tmp_path, file, text, message):
    shutil.copytree(root, tmp_path / "data")
    if text is None:
        (tmp_path / "data" / file).unlink()
    else:
        (tmp_path / "data" / file).write_text(text)
    with pytest.raises(KeySyncError, match=message):
        reader(tmp_path / "data", InterpolationWindows())


def test_no_dataset(tmp_path):
    with pytest.raises(KeySyncError, match="holds no dataset"):
        reader(tmp_path / "nothing", InterpolationWindows())


def test_datasets_made_with_other_weights_are_not_mixed_unless_told(tmp_path):
    """The same sizes, another VAE or another speech encoder: nothing but the record of how they were made shows it."""

    def dataset(name, vae, encoder):
        info = {"latent": {"vae": vae}, "audio_hubert": {"weights": encoder}}
        write_group(tmp_path / name, tiny.group(info=info), tiny.load, tiny.clips((175,)))
        return DatasetChoice(str(tmp_path / name))

    base, same, vae, speech = dataset("a", "1", "2"), dataset("b", "1", "2"), dataset("c", "9", "2"), dataset("d", "1", "8")
    unknown = dataset("e", "", "2")
    for other in (same, unknown):
        WindowReader(SourceConfig((base, other), KeyframeWindows()))
    for other, what in ((vae, r"c was prepared with other weights of the VAE .*than .*a "), (speech, "d was .* speech encoder")):
        with pytest.raises(KeySyncError, match=what):
            WindowReader(SourceConfig((base, other), KeyframeWindows()))
        WindowReader(SourceConfig((base, other), KeyframeWindows(), allow_mismatch=True))
