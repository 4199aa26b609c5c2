import dataclasses
import io
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
import object_store
import pytest
import tiny
import tiny_runs
from bounds import approx
from etils import epath
from PIL import Image

from keysync_jax.converters import model_directory
from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.models.stage import init_vae_params
from keysync_jax.training.config import CheckpointConfig, DataConfig, InitConfig, LogConfig, OptimizerConfig, TrainConfig
from keysync_jax.training.loop import train
from keysync_jax.training.state import TrainState
from keysync_jax.training.trainables import trainable_of
from keysync_jax.training.watch import pictures
from keysync_jax.training.watch.metrics import MetricLog, read_metrics
from keysync_jax.training.watch.pictures import Item
from keysync_jax.training.watch.samples import Samples
from keysync_jax.training.watch.validation import open_reader


def make_samples(config, mesh, workdir):
    trainable = trainable_of(config)
    return Samples(trainable, open_reader(trainable, print), mesh, MetricLog(workdir, tensorboard=False), workdir)


FRAMES = tiny.FRAMES


@pytest.fixture(scope="module")
def mesh():
    return tiny.one_device()


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return TrainConfig(
        stage=tiny.KEYFRAME, dtype="float32", remat="none", freeze="none", num_steps=4,
        data=DataConfig(
            datasets=(tiny_runs.write_dataset(root / "train", clips=3),), batch_size=2, threads=0, min_spacing=2,
            validation=tiny_runs.write_dataset(root / "held", clips=3, split="validation"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0, ema_decay=0.9),
        checkpoint=CheckpointConfig(every=100), log=LogConfig(every=2, validate_every=2, validation_batches=1, samples_every=4, samples=2),
    )  # fmt: skip


def weights(params, ema=None):
    return TrainState(step=jnp.int32(0), params=params, frozen={}, ema=ema, opt_state=(), skipped=jnp.int32(0))


def frames_of(path) -> tuple[list[np.ndarray], Fraction]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)], stream.average_rate


def test_the_region_is_tinted_and_nothing_else():
    frames = np.full((2, 8, 8, 3), 100, np.uint8)
    masks = np.zeros((2, 4, 4, 1), np.float32)
    masks[:, 2:] = 1
    out = pictures.tint(frames, masks)
    assert (out[:, :4] == 100).all() and (out[:, 4:, :, 0] == 165).all() and (out[:, 4:, :, 1:] == 75).all()


def test_latents_are_shown_in_the_colours_of_the_source():
    source = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    shown = pictures.preview(source, source, side=16)
    assert shown.shape == (2, 16, 16, 3) and shown.min() == 0 and shown.max() == 255
    shifted = pictures.preview(source + 10, source, side=16)
    assert (shifted == 255).all()


def test_a_grid_holds_every_frame_of_every_row():
    red, blue = (np.full((3, 10, 20, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))
    items = [Item((("source", red), ("generated", blue)))] * 2
    image = pictures.grid("step 5", items, [0.0, 0.5, 1.0], cell=40)
    for colour in ([255, 0, 0], [0, 0, 255]):
        assert (image == colour).all(-1).sum() == 2 * 3 * 40 * 20
    assert Image.open(io.BytesIO(pictures.png(image))).size == image.shape[1::-1]


def test_a_clip_is_repeated_until_it_can_be_watched(tmp_path):
    ramp = np.stack([np.full((9, 15, 3), 60 * i, np.uint8) for i in range(4)])
    items = [Item((("source", ramp), ("region", 255 - ramp), ("generated", ramp[::-1])))] * 2
    (tmp_path / "a.mp4").write_bytes(pictures.clip(items, Fraction(4), (0, 2)))
    frames, rate = frames_of(tmp_path / "a.mp4")
    assert rate == 4 and len(frames) == 8 and frames[0].shape == (18, 30, 3)
    levels = [[float(f[4, 4].mean()), float(f[14, 20].mean())] for f in frames]
    # Lossy video of the studio range: a code value or two of YUV are up to four of RGB. The next frame is off by sixty.
    np.testing.assert_allclose(levels, [[60 * (i % 4), 180 - 60 * (i % 4)] for i in range(8)], atol=4)
    (tmp_path / "b.mp4").write_bytes(pictures.clip(items, Fraction(25, 13)))
    frames, rate = frames_of(tmp_path / "b.mp4")
    assert rate == Fraction(25, 13) and len(frames) == 4 and frames[0].shape == (28, 30, 3)


@pytest.fixture(scope="module")
def vae_directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "vae"
    model_directory.save_params(path, {"vae": tiny.VAE}, {"vae": init_vae_params(tiny.VAE, 0)})
    return str(path)


@pytest.fixture(scope="module")
def drawn(config, mesh, vae_directory, tmp_path_factory):
    """(sampler, its folder, what it returned for the averaged weights)"""
    folder = tmp_path_factory.mktemp("drawn")
    config = dataclasses.replace(config, init=InitConfig(vae=vae_directory))
    samples = make_samples(config, mesh, folder)
    good = tiny.params()
    broken = jax.tree.map(lambda x: x * np.nan, good)
    return samples, folder, samples(12, weights(broken, ema=good)), good, broken


def test_windows_are_generated_decoded_and_written(drawn):
    samples, folder, values, good, _ = drawn
    image = Image.open(folder / "samples" / "00000012.png")
    assert image.width == 92 + FRAMES * 115
    frames, rate = frames_of(folder / "samples" / "00000012.mp4")
    assert rate == Fraction(25, 13) and len(frames) >= FRAMES and frames[0].shape == (128, 128, 3)  # two items, source over generated
    assert 0 < values["samples/l1_mask"] < 1
    items, error = samples._make(good, {})
    assert error == values["samples/l1_mask"]
    for item in items:
        (_, source), (_, region), (_, generated) = item.rows
        assert source.shape == generated.shape == (FRAMES, 64, 64, 3)
        changed = (source != region).any(-1)
        assert changed.any() and not changed.all() and (source != generated).any()
    # The picture of the log is that of the weights, whatever the step is called; other weights draw others.
    first = (folder / "samples" / "00000012.png").read_bytes()
    samples(12, weights(good))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first)))[44:], np.asarray(Image.open(folder / "samples" / "00000012.png"))[44:])
    other, _ = samples._make(tiny.params(seed=1), {})
    assert any((a.rows[2][1] != b.rows[2][1]).any() for a, b in zip(items, other, strict=True))


def test_a_store_that_takes_no_pictures_does_not_end_the_run(drawn, tmp_path, monkeypatch, capsys):
    samples, _, _, good, _ = drawn
    object_store.mount(tmp_path, monkeypatch)
    monkeypatch.setattr(samples, "_folder", epath.Path("gs://bucket/run/samples"))
    with object_store.refusing(monkeypatch):
        assert samples(14, weights(good))["samples/l1_mask"] > 0
    said = capsys.readouterr().err
    assert "gs://bucket/run/samples cannot be written" in said and "HttpError: 503 [try again]); the run goes on" in said
    samples(15, weights(good))
    assert [path.name for path in (tmp_path / "bucket" / "run" / "samples").iterdir() if path.suffix == ".png"] == ["00000015.png"]


def test_what_is_not_finite_is_said_and_not_drawn(drawn, capsys):
    samples, folder, _, _, broken = drawn
    assert samples(13, weights(broken)) == {}
    assert "not finite" in capsys.readouterr().err and not (folder / "samples" / "00000013.png").exists()


def test_the_latents_themselves_stay_the_source_outside_the_mask(config, mesh, tmp_path, capsys):
    samples = make_samples(config, mesh, tmp_path)
    assert "config.init.vae" in capsys.readouterr().err  # without a VAE there are previews
    batch = {**samples._make._batch}
    params = tiny.params()
    source, generated, finite = samples._make._generate(params, {}, {}, batch)
    mask = np.broadcast_to(batch["mask"], source.shape) == 1
    assert finite and mask.any() and not mask.all()
    np.testing.assert_array_equal(np.asarray(generated)[~mask], batch["known"][~mask])
    assert np.abs(np.asarray(generated) - batch["known"])[mask].mean() > 0.1
    items, error = samples._make(params, {})
    assert items[0].rows[0][1].shape == (FRAMES, 128, 128, 3) and 0 < error < 1


def test_a_model_directory_that_is_gone_costs_the_faces_alone(config, mesh, tmp_path, capsys):
    gone = str(tmp_path / "gone")
    config = dataclasses.replace(config, init=InitConfig(kind="model", path=gone))
    samples = make_samples(config, mesh, tmp_path)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{gone} is gone" in printed and "sample pictures show latents" in printed
    assert samples._make._vae is None


def test_a_vae_that_does_not_fit_is_refused(config, mesh, tmp_path):
    wrong = dataclasses.replace(tiny.VAE, channel_mult=(1, 1, 1))
    model_directory.save_params(tmp_path / "vae", {"vae": wrong}, {"vae": init_vae_params(wrong, 0)})
    config = dataclasses.replace(config, init=InitConfig(vae=str(tmp_path / "vae")))
    with pytest.raises(KeySyncError, match="resolution 64"):
        make_samples(config, mesh, tmp_path)


@pytest.mark.parametrize("arrays", [False, True])
def test_an_autoencoder_shows_the_beginnings_of_videos(arrays, mesh, tmp_path):
    rows, suffix = ["path,split"], ".npy" if arrays else ".mp4"
    for i in range(2):
        write_clip(make_clip(i, frames=5 + 20 * i, size=64), tmp_path / f"{i}{suffix}")
        rows.append(f"{i}{suffix},validation")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    vae = dataclasses.replace(tiny.VAE, channel_mult=(1, 1))
    config = TrainConfig(
        model="vae", vae=vae, resolution=32, dtype="float32", log=LogConfig(samples=2),
        data=DataConfig(datasets=(str(tmp_path / "manifest.csv"),), validation=str(tmp_path / "manifest.csv"), batch_size=2),
    )  # fmt: skip
    samples = make_samples(config, mesh, tmp_path)
    params = init_vae_params(vae, 0)
    values = samples(7, weights(params))
    items, error = samples._make(params, {})
    assert values == {"samples/l1": error} and 0 < error < 1
    source = [item.rows[0][1] for item in items]
    assert all(s.shape == (14, 32, 32, 3) for s in source)
    still = [bool((s[5:] == s[4]).all()) for s in source]
    assert sorted(still) == [False, True]  # the clip of five frames stands still
    frames, rate = frames_of(tmp_path / "samples" / "00000007.mp4")
    assert rate == 25 and len(frames) == 56 and frames[0].shape == (64, 64, 3)


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_being_watched(config, tmp_path):
    train(config, str(tmp_path / "watched"), profile_steps=(1, 2))
    alone = dataclasses.replace(config, log=LogConfig(every=1, validate_every=0, samples_every=0))
    train(alone, str(tmp_path / "alone"))
    assert tiny_runs.assert_equal_runs(tmp_path / "watched", tmp_path / "alone", 4) > 10

    rows, single = read_metrics(tmp_path / "watched"), read_metrics(tmp_path / "alone")
    assert list(rows) == [2, 4] and {"loss", "val/loss", "val_ema/loss", "tflops_per_s", "data_wait", "eta_s"} <= rows[2].keys()
    assert rows[2]["loss"] == approx((single[1]["loss"] + single[2]["loss"]) / 2, 4, dtype=np.float32)
    assert "samples/l1_mask" in rows[4] and "samples/l1_mask" not in rows[2]
    for name in ("samples/00000004.png", "samples/00000004.mp4", "curve.png", "profile"):
        assert (tmp_path / "watched" / name).exists(), name
    assert not (tmp_path / "alone" / "samples").exists() and not (tmp_path / "alone" / "curve.png").exists()
