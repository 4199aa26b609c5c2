"""`keysync prepare` from end to end on six drawn talkers and the broken inputs, with a tiny random model.

The same at full length, with figures: tests/scenarios/prepare_kill.py.
"""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import prepare_kill
import pytest
from bounds import close
from broken_inputs import EXPECTED, write_broken_inputs
from tiny_shards import tree

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline import dataset_layout as layout
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.prepare import analyse as analyse_stage
from keysync_jax.data_pipeline.prepare import work
from keysync_jax.data_pipeline.prepare.groups import plan_features
from keysync_jax.data_pipeline.prepare.inspect_dataset import draw_clip, summary
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import mixed, prepare
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import SourceConfig, WindowReader
from keysync_jax.data_pipeline.source.windows import windows_for
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, synth_dataset

CLIPS, FRAMES = 6, 30
CURATION = Curation(crop_size=128)
SHARD_MB = 0.2  # several shards


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """Folder with `videos` (talkers and broken inputs), `model`, and `whole`: the dataset of an undisturbed run."""
    folder = tmp_path_factory.mktemp("prepare")
    (folder / "model").symlink_to(tiny_model)
    synth_dataset(CLIPS, folder / "videos" / "talkers", SynthSettings(frames=FRAMES, size=128, emotion_share=0.5), quiet=True)
    write_broken_inputs(folder / "videos" / "broken", FRAMES)
    process = prepare_kill.start(folder, folder / "whole", shard_mb=SHARD_MB)
    prepare_kill.finish(process, folder, "whole")
    return folder


def run(place, output, items=None, **target):
    items = read_inputs(place / "videos") if items is None else items
    target = Output(shard_megabytes=SHARD_MB, **target)
    return prepare(items, output, str(place / "model"), CURATION, target, quiet=True)


def test_broken_inputs_are_in_the_dead_letter_and_good_ones_are_used(place):
    prepare_kill.check_broken(place / "whole")
    clips = layout.read_clips(place / "whole")
    assert len(clips) == CLIPS + sum(reason is None for reason in EXPECTED.values())
    for line in (place / "whole" / "dead_letter.jsonl").read_text().splitlines():
        letter = json.loads(line)
        assert letter["path"] and letter["stage"] and letter["reason"] != "internal_error" and letter["detail"]


@pytest.mark.slow
def test_killed_and_restarted_gives_the_same_bytes(place):
    killed = place / "killed"
    process = prepare_kill.start(place, killed, shard_mb=SHARD_MB)
    # Three entries per clip: in the middle of the fourth clip.
    prepare_kill.kill_when(process, lambda: len(list((killed / ".work" / "features").glob("*.json"))) >= 10, "while computing features")
    finished = {p: p.stat().st_mtime_ns for p in (killed / ".work" / "features").glob("*.json")}
    process = prepare_kill.start(place, killed, shard_mb=SHARD_MB)
    prepare_kill.kill_when(process, lambda: any((killed / "checksums").glob("*.json")), "while writing shards")
    prepare_kill.finish(prepare_kill.start(place, killed, shard_mb=SHARD_MB), place, "killed")
    prepare_kill.compare(place / "whole", killed)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in finished.items())  # finished work was not done again
    assert not list(killed.rglob("*.tmp"))


@pytest.mark.slow
def test_two_workers_on_one_core_give_the_same_bytes(place):
    process = prepare_kill.start(place, place / "two", workers=2, shard_mb=SHARD_MB)
    if hasattr(os, "sched_setaffinity"):  # XLA would split sums by the number of cores
        os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
    prepare_kill.finish(process, place, "two")
    prepare_kill.compare(place / "whole", place / "two")


def test_a_second_run_does_nothing_and_damage_is_mended(place):
    copy = place / "again"
    shutil.copytree(place / "whole", copy)
    stamps = {p: p.stat().st_mtime_ns for p in [*copy.glob("*.array_record-*"), *copy.glob("columns/*/*.array_record-*")]}
    damaged = min(p for p in stamps if p.parent == copy)
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    features = next((copy / ".work" / "features").glob("talker_000001*.npz"))
    features.write_bytes(b"")
    run(place, copy)
    assert damaged.read_bytes() == before
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items() if p != damaged)
    prepare_kill.compare(place / "whole", copy)


def test_adding_a_video_and_a_column_redoes_nothing_else(place, tmp_path):
    items = [i for i in read_inputs(place / "videos" / "talkers" / "manifest.csv")]
    output = tmp_path / "grown"
    run(place, output, items[:2], columns=())
    first = tree(output / "checksums")
    shards = {p.name: p.read_bytes() for p in output.glob("*.array_record-*")}
    run(place, output, items[:3], columns=("emotion",))
    assert all((output / name).read_bytes() == data for name, data in shards.items())
    assert first.items() <= tree(output / "checksums").items()
    store = FrameStore(output)
    assert sorted(store.columns) == ["arousal", "audio_hubert", "audio_wavlm", "emotion_known", "landmarks", "latent", "valence"]
    assert [c.batch for c in sorted(store.clips, key=lambda c: c.batch)] == [0, 0, 1]
    for clip in store.clips:
        truth = json.loads((place / "videos" / "talkers" / clip.video.replace(".mp4", ".truth.json")).read_text())
        read = store.read(clip, [0, 7, FRAMES - 1], ["valence", "emotion_known"])
        close(read["valence"], [truth["valence"][i] for i in (0, 7, FRAMES - 1)], 1, scale="each")
        assert all(read["emotion_known"])


def test_adding_the_sound_later_leaves_every_other_file_alone(place, tmp_path):
    items = [i for i in read_inputs(place / "videos" / "talkers" / "manifest.csv")][:2]
    output = tmp_path / "data"

    def files():
        return {n: d for n, d in tree(output).items() if not n.startswith(".work") and n not in ("report.json", "report.html")}

    run(place, output, items, columns=("jpeg", "log_mel"))
    before, stamps = files(), {p: p.stat().st_mtime_ns for p in output.rglob("*.array_record-*")}
    draw_clip(output, items[0].id, tmp_path / "mute.png")
    run(place, output, items, columns=("jpeg", "sound", "log_mel"))
    after = files()
    assert {n: d for n, d in after.items() if not n.startswith("columns/sound/")} == before
    assert len(after) > len(before) and all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    # The report still knows what the first run's work cost.
    assert json.loads((output / "report.json").read_text())["work"]["stages"]["features: latent"]["seconds"] > 0

    draw_clip(output, items[0].id, tmp_path / "voice.png")
    mute, voice = (_pixels(tmp_path / name) for name in ("mute.png", "voice.png"))
    assert (voice[: len(mute)] == mute).all() and len(voice) > len(mute) + 40
    # The waveform below the pictures is as high as the voice is loud at that moment.
    wave = voice[len(mute) :]
    drawn = ((wave[..., 2] - wave[..., 0]) > 60).sum(axis=0)
    lines = (wave.sum(axis=-1) < 200).mean(axis=0) > 0.8  # black, from top to bottom, at the pictures' times
    first, last = np.flatnonzero(lines)[0], np.flatnonzero(drawn)[-1]
    drawn, lines = drawn[first : last + 1], lines[first : last + 1]
    store = FrameStore(output)
    samples = np.concatenate(store.read(store.clips[0], list(range(FRAMES)), ["samples"])["samples"]).astype(float)
    loud = np.array([np.abs(part).max() for part in np.array_split(samples, len(drawn))])
    assert lines.sum() <= 8 and np.corrcoef(drawn[~lines], loud[~lines])[0, 1] > 0.95


def _pixels(path):
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_clip_whose_features_fail_is_reported_and_used_once_it_is_mended(place, tmp_path, monkeypatch):
    from keysync_jax.data_pipeline.prepare import sidecars

    items = [i for i in read_inputs(place / "videos" / "talkers" / "manifest.csv")][:3]
    absent = dataclasses.replace(items[0], emotion=str(tmp_path / "absent.json"))
    honest = sidecars.emotion

    def emotion(item, sources):
        if item.id == items[1].id:
            raise RuntimeError("a fault of ours")
        return honest(item, sources)

    with monkeypatch.context() as patch:
        patch.setattr(sidecars, "emotion", emotion)
        run(place, tmp_path / "data", [absent, *items[1:]], columns=("emotion",))
    letters = [json.loads(line) for line in (tmp_path / "data" / "dead_letter.jsonl").read_text().splitlines()]
    assert [(d["item"], d["stage"], d["reason"]) for d in letters] == [
        (items[0].id, "features", "bad_features"),
        (items[1].id, "features", "internal_error"),
    ]
    assert "absent.json" in letters[0]["detail"] and "a fault of ours" in letters[1]["detail"]
    assert [c.extra["item"] for c in layout.read_clips(tmp_path / "data")] == [items[2].id]
    run(place, tmp_path / "data", items, columns=("emotion",))
    assert (tmp_path / "data" / "dead_letter.jsonl").read_text() == ""
    assert sorted(c.extra["item"] for c in layout.read_clips(tmp_path / "data")) == sorted(i.id for i in items)


@pytest.mark.parametrize("part", ["analyses", "features"])
def test_a_full_disk_ends_the_run_in_one_line(place, tmp_path, monkeypatch, capfd, part):
    items = read_inputs(place / "videos" / "talkers" / "manifest.csv")[:1]
    honest = work._replace

    def replace(path, data):
        if part in path.parts and path.suffix == ".npz":
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(work, "_replace", replace)
        with pytest.raises(KeySyncError, match=r"^\[Errno 28\] No space left on device \(.*data\); the same command goes on"):
            run(place, tmp_path / "data", items, columns=())
    assert "Traceback" not in capfd.readouterr().err
    run(place, tmp_path / "data", items, columns=())
    assert len(FrameStore(tmp_path / "data").clips) == 1 and (tmp_path / "data" / "dead_letter.jsonl").read_text() == ""


def test_a_damaged_network_is_no_clips_fault(place, tmp_path):
    shutil.copytree(place / "model", tmp_path / "model")
    weights = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    os.truncate(weights, 5000)
    items = read_inputs(place / "videos" / "talkers" / "manifest.csv")[:1]
    with pytest.raises(KeySyncError, match=rf"^{weights} .*truncated[^\[]*$"):
        prepare(items, tmp_path / "data", str(tmp_path / "model"), CURATION, Output(columns=()), quiet=True)
    assert not (tmp_path / "data" / "dead_letter.jsonl").exists()


def test_control_c_stops_the_run(place, tmp_path, monkeypatch, capfd):
    def analyse(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyse_stage, "analyse", analyse)
    with pytest.raises(KeyboardInterrupt):
        run(place, tmp_path / "data", read_inputs(place / "videos" / "talkers" / "manifest.csv")[:1], columns=())
    assert "Traceback" not in capfd.readouterr().err


def test_values_are_what_the_networks_say(place):
    """Latents, tokens, sound, landmarks and pictures of a clip, computed here by other means from the video file."""
    import jax
    import jax.numpy as jnp

    from keysync_jax.converters import model_directory
    from keysync_jax.data_pipeline.prepare.item import derived_seed
    from keysync_jax.diffusion.noise import stream_key
    from keysync_jax.encoders.audio_features import AudioFeatures
    from keysync_jax.media import audio, video
    from keysync_jax.media.crop import Crop, extract
    from keysync_jax.models.vae import VAE

    store = FrameStore(place / "whole")
    clip = next(c for c in store.clips if c.video.endswith("talker_000002.mp4"))
    path = place / "videos" / clip.video
    frames = list(range(clip.num_frames))
    stored = store.read(clip, frames, ["latent", "audio_hubert", "audio_wavlm", "audio_log_mel", "samples", "landmarks", "jpeg"])
    model = model_directory.load(place / "model")

    crops = [extract(f.rgb(), Crop(*clip.extra["crop"]), 128) for f in video.read(path)]
    images = jnp.asarray(np.stack(crops[:3]), jnp.float32) / 127.5 - 1
    mean, logvar = VAE(model.vae).apply({"params": model.params("vae")}, images, method="encode_moments")
    key = stream_key(np.uint32(derived_seed(0, "posterior", clip.id)), "posterior")
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, i), mean.shape[1:]) for i in range(3)])
    expected = (mean + jnp.exp(0.5 * logvar) * noise) * model.vae.latent_scale
    # Stored in half precision. Small values are rounded less than the networks, other batches in float32, round them before.
    size = np.abs(expected)
    close(np.stack(stored["latent"][:3]), expected, 1, scale=size + size.max() / 64, dtype=np.float16)

    samples = audio.load_audio(path).samples[: 640 * clip.num_frames]
    for name in ("hubert", "wavlm"):
        tokens = AudioFeatures(model.audio(name), model.params(f"audio/{name}"))(samples)
        size = np.abs(tokens)
        close(np.stack(stored[f"audio_{name}"]), tokens, 1, scale=size + size.max() / 64, dtype=np.float16)
    assert np.stack(stored["audio_log_mel"]).shape == (FRAMES, 2, 80)
    voice = np.stack(stored["samples"])
    assert voice.dtype == np.int16 and voice.shape == (FRAMES, 640) and np.abs(samples).max() > 0.02
    np.testing.assert_allclose(voice.reshape(-1) / 32768, samples, rtol=0, atol=0.5001 / 32768)  # half a step of sixteen bits

    exact = np.load(path.with_name(path.stem + ".landmarks.npy"))
    x0, y0, side = clip.extra["crop"]
    close(np.stack(stored["landmarks"]), (exact - (x0, y0)) * (128 / side), 4, scale=np.abs(exact).max())

    import io

    from PIL import Image

    for frame in (0, FRAMES - 1):
        with Image.open(io.BytesIO(stored["jpeg"][frame])) as image:
            assert np.abs(np.asarray(image).astype(int) - crops[frame]).mean() < 2


@pytest.mark.parametrize(("stage", "encoder"), [("keyframe", "hubert"), ("interpolation", "wavlm")])
def test_both_sources_read_it(place, stage, encoder):
    options = {"min_spacing": 2} if stage == "keyframe" else {}
    choice = DatasetChoice(str(place / "whole"), split=layout.read_clips(place / "whole")[0].split)
    reader = WindowReader(SourceConfig((choice,), windows_for(stage, **options), audio_encoder=encoder, pixel_frames=2))
    batch = reader.read([reader.sample(0, 0, 1)])
    assert batch["known"].shape == (1, 14, 16, 16, 4) and np.isfinite(batch["known"]).all() and batch["known"].std() > 0.01
    assert batch["audio"].shape == (1, 14, 2, 32) and 0.05 < batch["mask"].mean() < 0.6
    assert batch["original_frames"].shape == (1, 2, 128, 128, 3)


def test_plain_tfds_reads_it_without_tensorflow(place):
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"b = tfds.builder_from_directory({str(place / 'whole')!r})\n"
        "split = sorted(b.info.splits)[0]\n"
        "row = b.as_data_source(split)[0]\n"
        "assert row['latent'].shape == (16, 16, 4) and row['landmarks'].shape == (68, 2), row.keys()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_report_and_inspect(place, tmp_path):
    report = json.loads((place / "whole" / "report.json").read_text())
    reasons = {(row["stage"], row["reason"]) for row in report["dropped"]}
    assert reasons >= {("probe", "no_audio"), ("probe", "damaged"), ("faces", "no_face"), ("faces", "several_faces")}
    assert all("OFF" in words for words in report["scorers"].values())
    assert report["inputs"]["(no source)"]["videos"] == CLIPS + len(EXPECTED)
    kept = sum(row["clips"] for row in report["dataset"]["by_split"].values())
    assert kept == len(layout.read_clips(place / "whole"))
    page = (place / "whole" / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") >= kept + 3 and "<script" not in page and "http" not in page
    for words in ("several_faces", "active speaker", "OFF", "<svg", "clips per minute"):
        assert words in page, words
    figures = summary(place / "whole")
    assert sum(s["clips"] for s in figures["splits"].values()) == kept
    assert figures["faces"] == {"sidecar": kept}  # as drawn talkers bring them
    clip = layout.read_clips(place / "whole")[0].id
    draw_clip(place / "whole", clip, tmp_path / "clip.png")
    pixels = _pixels(tmp_path / "clip.png")
    assert pixels.shape[1] > 1000 and ((pixels[..., 0] - pixels[..., 1]) > 60).mean() > 0.02  # the tinted mask is there
    with pytest.raises(KeySyncError, match="no clip"):
        draw_clip(place / "whole", "nobody", tmp_path / "x.png")


def test_landmarks_of_two_networks_in_one_dataset_are_noticed():
    """Clips of older versions don't say, and a landmark file is the user's own: neither is taken for another network."""
    by = [Clip(str(i), 5, extra={"faces": name} if name else {}) for i, name in enumerate(("mediapipe", "sidecar", "mediapipe", ""))]
    assert mixed(by) == ""
    assert "1 by fan and 2 by mediapipe" in mixed([*by, Clip("9", 5, extra={"faces": "fan"})])


def test_names_that_are_odd_or_impossible_stop_nothing(place, tmp_path):
    odd = os.fsdecode(b"caf\xe9.mp4")  # Latin-1, which no UTF-8 text can hold
    talker = place / "videos" / "talkers" / "talker_000000.mp4"
    for name in (odd, "plain.mp4"):
        shutil.copy(talker, tmp_path / name)
        shutil.copy(talker.with_suffix(".landmarks.npy"), (tmp_path / name).with_suffix(".landmarks.npy"))
    paths = [{"path": odd}, {"path": "a\0b.mp4"}, {"path": "plain.mp4", "landmarks": "absent.npy"}, {"path": odd + ".gone"}]
    (tmp_path / "m.json").write_text(json.dumps(paths))
    run(place, tmp_path / "data", read_inputs(tmp_path / "m.json"), columns=())
    (clip,) = FrameStore(tmp_path / "data").clips
    assert clip.video == odd
    letters = {d["path"]: d for d in map(json.loads, (tmp_path / "data" / "dead_letter.jsonl").read_text(encoding="utf-8").splitlines())}
    assert {d["reason"] for d in letters.values()} == {"unreadable"} and len(letters) == 3
    assert letters[str(tmp_path / "plain.mp4")]["detail"] == f"{tmp_path / 'absent.npy'}: No such file or directory"


def test_nothing_left_is_an_error_with_a_report(place, tmp_path):
    items = [i for i in read_inputs(place / "videos" / "broken") if i.name == "zero_bytes.mp4"]
    with pytest.raises(KeySyncError, match="no clip is left of 1 inputs"):
        run(place, tmp_path / "empty", items)
    assert "unreadable" in (tmp_path / "empty" / "report.html").read_text()


def test_columns_follow_the_model(tiny_model):
    plan = plan_features(str(tiny_model), Output(columns=("jpeg", "log_mel", "occluder")), None)
    assert [g.name for g in plan.groups] == ["frames", "jpeg", "audio_log_mel", "occluder"]
    assert [c.name for c in plan.groups[0].columns] == ["latent", "audio_hubert", "audio_wavlm", "landmarks"]
    assert plan.crop_size == 128 and plan.groups[0].info["latent"]["seed"] == 0 and plan.groups[0].info["audio_hubert"]["weights"]
    with pytest.raises(KeySyncError, match="wav2vec2"):
        plan_features(str(tiny_model), Output(columns=("wav2vec2",)), None)
