"""Single frames for the autoencoder: what is read, in which order, and what is refused."""

import dataclasses

import numpy as np
import pytest

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.source.frames import FrameConfig, FrameReader
from keysync_jax.data_pipeline.source.loader import Batches
from keysync_jax.data_pipeline.synthetic.clip import make_clip
from keysync_jax.data_pipeline.synthetic.dataset import SynthSettings, plan_clip, synth_dataset

SETTINGS = SynthSettings(seed=5, frames=12, size=64, validation_share=0.3, test_share=0.0)


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    synth_dataset(6, folder, SETTINGS, workers=1)
    return folder


def reader(talkers, **options):
    return FrameReader(FrameConfig((str(talkers / "manifest.csv"),), size=64, seed=3, **options))


def test_images_are_frames_of_the_videos(talkers):
    frames = reader(talkers, frames_per_clip=2)
    samples = [frames.sample(0, row, 4) for row in range(4)]
    assert samples[0][1] == samples[1][1] != samples[2][1] == samples[3][1]  # two frames of each of two clips
    batch = frames.read(samples)
    assert batch["images"].shape == (4, 64, 64, 3) and batch["mouth"].shape == (4, 64, 64, 1)
    index = int(frames.paths[samples[0][1]].stem.split("_")[1])
    plan = plan_clip(index, SETTINGS)
    clip = make_clip(plan.identity_seed, frames=12, size=64, audio_seed=plan.audio_seed, motion_seed=plan.motion_seed, options=plan.options)
    errors = np.abs(clip.frames.astype(np.float32) / 127.5 - 1 - batch["images"][0]).mean(axis=(1, 2, 3))
    assert errors.min() < 0.03  # what the codec costs
    lips = clip.landmarks[errors.argmin(), 48:68]
    x, y = lips.mean(axis=0).astype(int)
    assert batch["mouth"][0, y, x, 0] == 1 and batch["mouth"][0, 5, x, 0] == 0  # the lips are marked, the forehead is not


def test_splits_of_a_manifest(talkers):
    train, held_out = reader(talkers), reader(talkers, split="validation")
    assert train.paths and held_out.paths
    assert not set(train.paths) & set(held_out.paths)
    assert len(train.paths) + len(held_out.paths) == 6


def test_crops_are_cut_from_the_frames(talkers):
    whole, cut = reader(talkers), reader(talkers, crop=32)
    sample = whole.sample(0, 0, 1)
    image, crop = whole.read([sample])["images"][0], cut.read([sample])["images"][0]
    assert crop.shape == (32, 32, 3)
    windows = np.lib.stride_tricks.sliding_window_view(image, (32, 32, 3))[:, :, 0]
    assert (windows == crop).all(axis=(2, 3, 4)).sum() == 1


def test_order_is_a_function_of_step_and_seed_alone(talkers):
    with Batches(reader(talkers, crop=32), 4, threads=0) as a:
        first = [next(a) for _ in range(4)]
    with Batches(reader(talkers, crop=32), 4, first_step=2, threads=2) as b:
        np.testing.assert_array_equal(next(b)["images"], first[2]["images"])
    halves = []
    for host in range(2):
        with Batches(reader(talkers, crop=32), 4, first_step=3, host=host, hosts=2, threads=0) as c:
            halves.append(next(c)["images"])
    np.testing.assert_array_equal(np.concatenate(halves), first[3]["images"])
    assert not np.array_equal(first[0]["images"], first[1]["images"])


def test_a_landmark_file_of_another_length_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 64, 64, 3), np.uint8))
    np.save(tmp_path / "a.landmarks.npy", np.ones((3, 68, 2), np.float32))
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbfpath,split\r\na.npy,train\r\n")
    frames = FrameReader(FrameConfig((str(tmp_path / "m.csv"),), size=64))
    with pytest.raises(KeySyncError, match=r"a.npy has 4 frames; a.landmarks.npy has shape \(3, 68, 2\)"):
        frames.read([(0, 0)])


def test_other_shapes_are_cropped_to_the_central_square(talkers):
    frames = reader(talkers)
    wide = np.zeros((64, 96, 3), np.uint8)
    wide[:, 16:80] = 255
    image, mouth = FrameReader._item(frames, wide, None, 0)
    assert image.shape == (64, 64, 3) and (image == 1).all() and not mouth.any()


def test_fingerprint_follows_what_decides_the_order(talkers):
    base = reader(talkers)
    assert base.fingerprint == reader(talkers).fingerprint
    for change in ({"seed": 4}, {"crop": 16}, {"split": "validation"}):
        assert FrameReader(dataclasses.replace(base.config, **change)).fingerprint != base.fingerprint


@pytest.mark.parametrize(
    ("videos", "message"), [((), "no video"), (("nowhere.csv",), "does not exist"), (("wrong.csv",), "no column"), (("empty",), "no video")]
)
def test_bad_sources(tmp_path, monkeypatch, videos, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("file\nx.mp4\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeySyncError, match=message):
        FrameReader(FrameConfig(videos))
