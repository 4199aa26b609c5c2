"""The stages one by one: what is dropped and why, what is measured, what is kept on disk."""

import json
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from bounds import close
from broken_inputs import encode

from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.prepare import quality, scorers, sidecars, torch_scorers
from keysync_jax.data_pipeline.prepare.analyse import Tools, analyse, item_key
from keysync_jax.data_pipeline.prepare.features import int16_sound
from keysync_jax.data_pipeline.prepare.frame_table import FrameTables
from keysync_jax.data_pipeline.prepare.groups import checked_float16
from keysync_jax.data_pipeline.prepare.item import Candidate, ClipWork, Item
from keysync_jax.data_pipeline.prepare.occluder import ClickMasker
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.prepare.spans import Span, cut_long, usable_spans
from keysync_jax.data_pipeline.prepare.work import WorkFolder
from keysync_jax.data_pipeline.synthetic import make_clip

FRAMES = 40
CURATION = Curation(crop_size=64)


@pytest.fixture(scope="module")
def clip():
    return make_clip(11, FRAMES, 128)


@pytest.fixture
def talker(tmp_path, clip):
    path = encode(tmp_path / "talker.mp4", clip.frames, clip.samples)
    np.save(tmp_path / "talker.landmarks.npy", clip.landmarks)
    return Item(str(path), "talker.mp4", landmarks=str(tmp_path / "talker.landmarks.npy"))


def run(item, curation=CURATION, chosen=None):
    return analyse(item, curation, Tools(None, chosen or {}, FrameTables()))


def change(item, **values):
    return Item(**{**vars(item), **values})


def test_a_good_clip_is_kept_with_its_measures(talker, clip):
    result = run(talker)
    assert [d.reason for d in result.drops] == []
    (kept,) = result.candidates
    assert (kept.first, kept.num_frames) == (0, FRAMES)
    assert set(kept.scores) == {"face_size", "jitter", "silence", "sharpness", "brightness"}
    x0, y0, side = kept.crop
    expected = (clip.landmarks - np.array([x0, y0])) * (64 / side)
    close(result.arrays[f"landmarks.{kept.id}"], expected, 4, scale=np.abs(clip.landmarks).max())
    assert result.arrays[f"sources.{kept.id}"].tolist() == list(range(FRAMES))
    assert result.arrays[f"thumbnail.{kept.id}"][:2].tolist() == [0xFF, 0xD8]
    again = run(talker)
    assert again.candidates == result.candidates


def test_the_model_axis_is_25_fps_whatever_the_rate(tmp_path, clip):
    """50 fps: every other picture; the sound of model frame k begins at k / 25 s."""
    doubled = clip.frames.repeat(2, axis=0)
    path = encode(tmp_path / "fast.mp4", doubled, clip.samples, rate=50)
    np.save(tmp_path / "fast.npy", clip.landmarks.repeat(2, axis=0))
    (kept,) = run(Item(str(path), "fast.mp4", landmarks=str(tmp_path / "fast.npy"))).candidates
    assert kept.num_frames == FRAMES
    path = encode(tmp_path / "slow.mp4", clip.frames, clip.samples, rate=10)
    assert [d.reason for d in run(Item(str(path), "slow.mp4")).drops] == ["frame_rate"]


def test_rotation_is_applied(tmp_path, clip):
    """A picture stored on its side with a display matrix gives the same crop as the upright one."""
    stored = np.rot90(clip.frames, axes=(1, 2))
    path = tmp_path / "side.mp4"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"crf": "4", "threads": "1"})
        video.width = video.height = 128
        video.pix_fmt = "yuv444p"
        video.set_display_rotation(-90)
        sound = out.add_stream("aac", rate=16000, layout="mono")
        for i, picture in enumerate(stored):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        for start in range(0, len(clip.samples), 1024):
            frame = av.AudioFrame.from_ndarray(clip.samples[None, start : start + 1024], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
    np.save(tmp_path / "side.npy", clip.landmarks)
    result = run(Item(str(path), "side.mp4", landmarks=str(tmp_path / "side.npy")))
    from keysync_jax.media import video as reader

    frames = [f.rgb() for f in reader.read(path)]
    assert np.abs(frames[0].astype(int) - clip.frames[0]).mean() < 4  # upright again
    assert result.facts["rotation"] in (90, 270) and len(result.candidates) == 1


@pytest.mark.parametrize(
    ("changes", "stage", "reason"),
    [
        ({"min_frames": 50}, "shots", "too_short"),
        ({"min_face": 2.0}, "faces", "small_face"),
        ({"min_sharpness": 1e6}, "checks", "blurred"),
        ({"min_brightness": 250.0}, "checks", "dark"),
        ({"max_brightness": 20.0}, "checks", "bright"),
        ({"max_silence": -0.1}, "checks", "silent"),
        ({"max_jitter": 1e-9}, "checks", "jitter"),
    ],
)
def test_every_check_can_drop(talker, changes, stage, reason):
    result = run(talker, Curation(crop_size=64, **changes))
    assert [(d.stage, d.reason) for d in result.drops] == [(stage, reason)] and not result.candidates
    assert result.drops[0].detail and result.drops[0].seconds == FRAMES / 25


def test_gaps_split_a_clip_and_short_ones_are_filled(talker, clip, tmp_path):
    points = clip.landmarks.copy()
    points[3:5] = np.nan  # two frames: filled
    points[30:38] = np.nan  # eight: a gap that splits
    np.save(talker.landmarks, points)
    result = run(talker)
    assert [(c.first, c.num_frames) for c in result.candidates] == [(0, 30)]
    assert [(d.reason, round(d.seconds * 25)) for d in result.drops] == [("no_face", 8), ("gaps", 2)]
    filled = result.arrays[f"landmarks.{result.candidates[0].id}"]
    assert np.isfinite(filled).all()


def test_rows_of_zeros_are_frames_without_a_face(talker, clip):
    points = clip.landmarks.copy()
    points[30:] = 0
    np.save(talker.landmarks, points)
    result = run(talker)
    assert [(c.first, c.num_frames) for c in result.candidates] == [(0, 30)] and [d.reason for d in result.drops] == ["no_face"]
    np.save(talker.landmarks, np.zeros_like(points))
    assert [(d.stage, d.reason) for d in run(talker).drops] == [("faces", "no_face")]


def test_scores_that_are_not_finite_drop_the_clip(talker, tmp_path):
    result = run(talker, Curation(crop_size=64), {"quality": lambda views: np.full(len(views), np.nan)})
    assert [(d.stage, d.reason) for d in result.drops] == [("quality", "low_quality")]
    sync = {"sync": lambda faces, samples: {"sync_offset": 0.0, "sync_confidence": float("inf")}}
    result = run(talker, Curation(crop_size=64), sync)
    assert [(d.stage, d.reason, d.detail) for d in result.drops] == [("checks", "bad_score", "sync_confidence is inf")]


def test_a_sidecar_that_does_not_fit_is_refused(talker, clip):
    np.save(talker.landmarks, clip.landmarks[:-1])
    assert [(d.stage, d.reason) for d in run(talker).drops] == [("faces", "bad_sidecar")]
    np.save(talker.landmarks, np.array([{}], dtype=object), allow_pickle=True)
    assert [d.reason for d in run(talker).drops] == ["bad_sidecar"]


def test_time_range_and_sound_that_ends_early(talker, clip, tmp_path):
    result = run(change(talker, start=0.4, stop=1.6))
    assert [(c.first, c.num_frames) for c in result.candidates] == [(10, 30)]
    path = encode(tmp_path / "early.mp4", clip.frames, clip.samples[: 30 * 640])
    result = run(change(talker, path=str(path)))
    assert [c.num_frames for c in result.candidates] == [30]


def test_long_shots_are_cut_and_ids_are_stable(talker):
    result = run(talker, Curation(crop_size=64, min_frames=10, max_frames=15))
    assert [(c.first, c.num_frames) for c in result.candidates] == [(0, 13), (13, 13), (26, 14)]
    assert len({c.id for c in result.candidates}) == 3


def test_spans():
    face = np.array([1] * 10 + [0] * 3 + [1] * 30, bool)
    alone = np.ones(43, bool)
    alone[20:22] = False
    spans = usable_spans(face, alone, 8)
    assert spans == [Span(0, 10), Span(10, 13, "no_face"), Span(13, 20, "gaps"), Span(20, 22, "several_faces"), Span(22, 43)]
    assert usable_spans(np.ones(5, bool), np.ones(5, bool), 8) == [Span(0, 5, "too_short")]
    assert usable_spans(np.zeros(0, bool), np.zeros(0, bool), 8) == []
    assert cut_long(Span(5, 25), 10) == [Span(5, 15), Span(15, 25)]


def test_nine_seeded_views_and_the_measures():
    pictures = [np.random.default_rng(i).integers(0, 255, (300, 400, 3), np.uint8) for i in range(3)]
    views = quality.quality_views(pictures, 5)
    assert views.shape == (9, 224, 224, 3)
    np.testing.assert_array_equal(views, quality.quality_views(pictures, 5))
    assert (views != quality.quality_views(pictures, 6)).any()
    assert quality.quality_views([np.zeros((64, 100, 3), np.uint8)], 0).shape == (3, 224, 224, 3)
    sound = np.zeros(640 * 4, np.float32)
    sound[640:1280] = 0.1
    assert quality.silence_share(sound, 4) == 0.75
    with pytest.raises(KeySyncError):
        quality.silence_share(sound, 5)


def _scorer(tmp_path, kind, name, value):
    path = tmp_path / f"{kind}.txt"
    path.write_text(str(value))
    return kind, f"fake_scorers:{name}", str(path)


@pytest.mark.parametrize(
    ("kind", "name", "bad", "good", "reason"),
    [
        ("quality", "Quality", 0.39, 0.41, "low_quality"),
        ("active_speaker", "Speaker", 0.74, 0.76, "not_speaking"),
        ("sync", "Sync", -5.0, -2.0, "out_of_sync"),
    ],
)
def test_scorers_drop_at_their_thresholds(talker, tmp_path, kind, name, bad, good, reason):
    for value, reasons in ((bad, [reason]), (good, [])):
        chosen = {kind: scorers.open_scorer(*_scorer(tmp_path, kind, name, value))}
        result = run(talker, CURATION, chosen)
        assert [d.reason for d in result.drops] == reasons
        # Whatever is dropped has a picture for the report's contact sheet.
        assert all(f"thumbnail.{d.clip or d.item}" in result.arrays for d in result.drops)
        if not reasons:
            assert result.candidates[0].scores[{"sync": "sync_offset"}.get(kind, kind)] == value


def test_scorers_without_weights_are_off_and_say_so(tmp_path):
    words = scorers.in_words([_scorer(tmp_path, "sync", "Sync", 0)])
    assert ": on" in words["sync"] and ": OFF" in words["quality"] and ": OFF" in words["active_speaker"]
    assert scorers.parse("quality=a.pt") == ("quality", "torchscript", "a.pt")
    assert scorers.parse("sync=my.module:Net@w.bin") == ("sync", "my.module:Net", "w.bin")
    for text in ("beauty=a.pt", "quality", "quality="):
        with pytest.raises(UsageError):
            scorers.parse(text)
    with pytest.raises(KeySyncError, match="do not exist"):
        scorers.open_scorer("quality", "torchscript", str(tmp_path / "absent.pt"))
    with pytest.raises(KeySyncError, match="are a folder; give a local file"):
        scorers.open_scorer("quality", "fake_scorers:Quality", str(tmp_path))
    with pytest.raises(UsageError):
        scorers.open_scorer("quality", "nothing", str(tmp_path / "sync.txt"))


def test_sync_offset_and_mfcc():
    rng = np.random.default_rng(0)
    heard = rng.standard_normal((60, 8))
    seen = np.roll(heard, -4, axis=0)  # the sound comes four frames late
    found = torch_scorers.offset(seen, heard)
    assert found["sync_offset"] == 4 and found["sync_confidence"] > 1
    assert torch_scorers.offset(heard, heard)["sync_offset"] == 0
    tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000).astype(np.float32)
    cepstra = torch_scorers.mfcc(np.concatenate([tone, 0 * tone]), 200)
    assert cepstra.shape == (200, 13) and np.isfinite(cepstra).all()
    assert cepstra[:90, 0].min() > cepstra[110:, 0].max()  # energy


def test_the_key_follows_content_not_place(talker, tmp_path):
    key = item_key(talker, CURATION)
    moved = tmp_path / "elsewhere" / "talker.mp4"
    moved.parent.mkdir()
    moved.write_bytes((tmp_path / "talker.mp4").read_bytes())
    assert item_key(change(talker, path=str(moved)), CURATION) == key
    assert item_key(talker, Curation(crop_size=64, min_frames=30)) != key
    assert item_key(change(talker, speaker="ann"), CURATION) == key  # terms may change without new work
    moved.write_bytes(moved.read_bytes() + b"\0")
    assert item_key(change(talker, path=str(moved)), CURATION) != key
    points = np.load(talker.landmarks)
    np.save(talker.landmarks, points + 1)
    assert item_key(talker, CURATION) != key


def test_work_entries_are_whole_or_absent(tmp_path):
    folder = WorkFolder(tmp_path / "work")
    arrays = {"a": np.arange(6).reshape(2, 3), "b": np.zeros(0, np.float32)}
    folder.save("x", "key", {"n": 1}, arrays)
    entry = folder.load("x", "key")
    assert entry.values == {"n": 1} and entry.arrays["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert folder.load("x", "other") is None and folder.has("x", "key") and folder.names() == ["x"]
    data = (tmp_path / "work" / "x.npz").read_bytes()
    folder.save("x", "key", {"n": 1}, arrays)
    assert (tmp_path / "work" / "x.npz").read_bytes() == data  # no time stamps inside
    (tmp_path / "work" / "x.npz").write_bytes(data[:-1] + b"!")
    assert folder.load("x", "key") is None
    (tmp_path / "work" / "x.json").write_text("{")
    assert folder.load("x") is None
    (tmp_path / "work" / "y.json.123.tmp").touch()
    folder.remove_leftovers()
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == ["x.json", "x.npz"]


def test_float16_range():
    assert checked_float16(np.array([1.5, -3.0]), "z").dtype == np.float16
    for bad in (7e4, np.nan, np.inf):
        with pytest.raises(KeySyncError, match="clip 'c'"):
            checked_float16(np.array([0.0, bad]), "clip 'c': latent")


def test_sound_comes_back_as_it_was():
    pcm = np.array([-32768, -32767, -1, 0, 1, 32766, 32767], np.int16)
    assert int16_sound(pcm.astype(np.float32) / 32768).tolist() == pcm.tolist()
    assert int16_sound(np.array([1.0, -1.5, 2.0], np.float32)).tolist() == [32767, -32768, 32767]


def test_sam2_without_what_it_needs_says_so_in_one_line(tmp_path, monkeypatch):
    weights = tmp_path / "model.pt"  # its name says nothing
    with pytest.raises(KeySyncError, match="does not exist"):
        ClickMasker(str(weights))
    weights.touch()
    with pytest.raises(KeySyncError, match="model.pt is empty"):
        ClickMasker(str(weights))
    monkeypatch.setitem(sys.modules, "sam2", None)
    with pytest.raises(KeySyncError, match="sam2==1.1.0"):
        ClickMasker(str(weights), "sam2")


def test_emotion_and_occluder_sidecars(tmp_path):
    sources = np.array([1, 2, 4], np.int32)
    none = sidecars.emotion(Item("v", "v"), sources)
    assert not none["emotion_known"].any() and none["valence"].tolist() == [0, 0, 0]
    (tmp_path / "t.json").write_text(json.dumps({"valence": [0, 0.1, 0.2, 0.3, 0.4], "arousal": [0, -0.1, -0.2, -0.3, -0.4]}))
    known = sidecars.emotion(Item("v", "v", emotion=str(tmp_path / "t.json")), sources)
    close(known["valence"], [0.1, 0.2, 0.4], 1)
    assert known["emotion_known"].all()
    np.savez(tmp_path / "t.npz", valence=np.zeros(3), arousal=np.zeros(3))
    with pytest.raises(KeySyncError, match="at least 5 frames"):
        sidecars.emotion(Item("v", "v", emotion=str(tmp_path / "t.npz")), sources)

    mask = np.zeros((5, 64, 64), bool)
    mask[2, 32:, :] = True
    np.savez(tmp_path / "o.npz", mask=mask)
    work = ClipWork(Candidate("c", 0, 3, (0, 0, 64), {}, ""), sources, np.zeros((3, 68, 2)), ())
    cells = sidecars.occluder(Item("v", "v", occluder=str(tmp_path / "o.npz")), work, (8, 8), 32, None)
    assert cells.shape == (3, 8, 8) and not cells[0].any() and cells[1, 4:].all() and not cells[1, :4].any()
    (tmp_path / "o.json").write_text("{}")
    with pytest.raises(KeySyncError, match="SAM 2"):
        sidecars.occluder(Item("v", "v", occluder=str(tmp_path / "o.json")), work, (8, 8), 32, None)


def test_settings_are_checked():
    for bad in ({"crop_size": 15}, {"min_frames": 1}, {"min_frames": 600}, {"max_frames": 9999}, {"seed": -1}):
        with pytest.raises(UsageError):
            Curation(**bad)
    for bad in ({"columns": ("jpg",)}, {"jpeg_quality": 0}, {"shard_megabytes": 0}):
        with pytest.raises(UsageError):
            Output(**bad)
