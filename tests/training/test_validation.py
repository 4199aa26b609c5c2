import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_runs
from bounds import close
from scipy import stats

from keysync_jax.core.errors import KeySyncError
from keysync_jax.data_pipeline.synthetic import make_clip, write_clip
from keysync_jax.models.stage import init_vae_params
from keysync_jax.training import data
from keysync_jax.training.config import DataConfig, DropoutConfig, InitConfig, LogConfig, TrainConfig
from keysync_jax.training.objective import DiffusionObjective, VaeObjective
from keysync_jax.training.state import TrainState
from keysync_jax.training.trainables import trainable_of
from keysync_jax.training.watch import validation
from keysync_jax.training.watch.validation import SEED, Validation, bucket_normals, open_reader


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder with training data only, and one with validation data only."""
    root = tmp_path_factory.mktemp("data")
    return tiny_runs.write_dataset(root / "train"), tiny_runs.write_dataset(root / "held", clips=3, split="validation")


@pytest.fixture(scope="module")
def config(datasets):
    train, held = datasets
    return TrainConfig(
        stage=tiny.INTERPOLATION, dtype="float32", remat="none", freeze="none", init=InitConfig(),
        data=DataConfig(datasets=(train,), validation=held, batch_size=2, threads=0),
        log=LogConfig(validate_every=2, validation_batches=3, samples_every=0), dropout=DropoutConfig(audio=1.0, identity=1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return tiny.one_device()


@pytest.fixture(scope="module")
def state(config):
    params, other = (tiny.params("interpolation", seed) for seed in (0, 1))
    return TrainState(step=jnp.int32(0), params=params, frozen={}, ema=other, opt_state=(), skipped=jnp.int32(0))


@pytest.fixture(scope="module")
def run(config, mesh, state):
    """(validation, what it said, its values at step 2)"""
    said = []
    reader = open_reader(trainable_of(config), said.append)
    found = Validation(trainable_of(config), reader, DiffusionObjective(config), mesh, said.append)
    return found, said, found(2, state)


def test_levels_are_the_medians_of_equally_probable_buckets():
    normals = bucket_normals()
    close(normals, stats.norm.ppf([0.1, 0.3, 0.5, 0.7, 0.9]), 4)


def test_every_level_and_their_mean_are_reported_for_both_sets_of_weights(run):
    found, said, values = run
    assert [f"{s:.3g}" for s in found.sigmas] == ["0.584", "1.45", "2.72", "5.1", "12.7"]
    for prefix in ("val", "val_ema"):
        levels = [values[f"{prefix}/loss_sigma_{s:.3g}"] for s in found.sigmas]
        close(values[f"{prefix}/loss"], np.mean(levels), 8)
        assert len(set(levels)) == 5
        close(values[f"{prefix}/latent"], values[f"{prefix}/loss"], 16)  # the only term here
    assert values["val/loss"] != values["val_ema/loss"]
    assert "validating on 6 windows" in said[0] and "at σ 0.584: " in said[1] and len(said[1]) <= 160


def test_items_and_noise_are_the_same_at_every_step_and_for_every_seed(run, config, mesh, state):
    found, _, values = run
    later = state.replace(step=jnp.int32(77))
    assert found(78, later) == values
    other = dataclasses.replace(config, seed=config.seed + 1)
    reader = open_reader(trainable_of(other), print)
    ours, theirs = (next(iter(validation.Batches(r, 2, 0, threads=0))) for r in (found._reader, reader))
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_a_level_is_the_training_loss_at_that_noise_without_dropout(run, config, state):
    """One batch by hand: the objective's own loss with the level's noise, all conditions kept."""
    found, objective = run[0], DiffusionObjective(config)
    reader = found._reader
    host = data.step_arrays(reader.read([reader.sample(1, row, 2) for row in range(2)]))
    batch = {name: jnp.asarray(value) for name, value in host.items()}
    got = found._evaluate(state.params, {}, batch, np.int32(1))
    drawn = objective.draw(jax.random.fold_in(jax.random.key(SEED), 1), batch)
    assert not drawn["keep_audio"].any()  # training would drop everything here
    kept = {"keep_audio": jnp.ones(2, bool), "keep_identity": jnp.ones(2, bool)}
    loss = jax.jit(objective.loss)
    for level, value in zip(bucket_normals(), got["loss"], strict=True):
        want, _ = loss(state.params, {}, batch, drawn | kept | {"normals": jnp.full(2, level)})
        dropped, _ = loss(state.params, {}, batch, drawn | {"normals": jnp.full(2, level)})
        close(value, want, 32, wrong=dropped)  # two programs of some thirty layers; conditions dropped would be seen


def test_of_several_datasets_those_with_the_split_are_validated_on(config, datasets):
    said = []
    both = dataclasses.replace(config, data=dataclasses.replace(config.data, datasets=datasets, weights=(0.5, 0.5), validation=""))
    reader = open_reader(trainable_of(both), said.append)
    assert [str(store.root) for store in reader.stores] == [str(datasets[1])]
    assert len(said) == 1 and said[0].startswith("validation leaves out 1 of 2 datasets") and str(datasets[0]) in said[0]


def test_without_a_validation_split_it_is_off_and_says_so_once(config, datasets):
    said = []
    missing = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=""))
    assert open_reader(trainable_of(missing), said.append) is None
    assert len(said) == 1 and said[0].startswith("no validation and no sample pictures") and "validation" in said[0]
    named = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=datasets[0]))
    with pytest.raises(KeySyncError):
        open_reader(trainable_of(named), said.append)
    off = dataclasses.replace(missing, log=LogConfig(validate_every=0, samples_every=0))
    assert open_reader(trainable_of(off), said.append) is None and len(said) == 1
    empty = dataclasses.replace(missing, data=dataclasses.replace(missing.data, validation_split=""))
    assert open_reader(trainable_of(empty), said.append) is None and "validation_split is empty" in said[1]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    rows = ["path,split"]
    for i in range(3):
        write_clip(make_clip(i, frames=4, size=64), folder / f"{i}.mp4")
        rows.append(f"{i}.mp4,{'validation' if i else 'train'}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_an_autoencoder_is_validated_on_whole_frames(videos, mesh):
    vae = dataclasses.replace(tiny.VAE, channel_mult=(1,))
    config = TrainConfig(
        model="vae", vae=vae, resolution=32, dtype="float32",
        data=DataConfig(datasets=(str(videos / "manifest.csv"),), batch_size=2, frames_per_clip=2, crop=16, threads=0),
        log=LogConfig(validate_every=1, validation_batches=2),
    )  # fmt: skip
    said = []
    reader = open_reader(trainable_of(config), said.append)
    assert {p.name for p in reader.paths} == {"1.mp4", "2.mp4"} and not said
    found = Validation(trainable_of(config), reader, VaeObjective(config), mesh, said.append)
    state = TrainState(jnp.int32(0), init_vae_params(vae, 0), {}, None, (), jnp.int32(0))
    values = found(1, state)
    assert values == found(9, state)
    assert set(values) == {f"val/{name}" for name in ("loss", "l1", "kl", "l1_mouth", "latent_std")}
    assert all(np.isfinite(v) for v in values.values()) and values["val/l1"] > 0

    # The same by hand, from the pixels: the first batch has both frames of one video.
    objective = VaeObjective(config)
    loss, parts = jax.jit(objective.loss), []
    for number in range(2):
        batch = jax.tree.map(jnp.asarray, reader.read([reader.sample(number, row, 2) for row in range(2)]))
        assert batch["images"].shape == (2, 32, 32, 3)
        drawn = objective.draw(jax.random.fold_in(jax.random.key(SEED), number), batch)
        parts.append(float(loss(state.params, {}, batch, drawn)[0]))
    close(values["val/loss"], np.mean(parts), 32, wrong=parts)  # two programs of some twenty layers; either batch alone would be seen


def test_a_folder_of_videos_is_warned_about(videos, mesh):
    config = TrainConfig(
        model="vae", vae=tiny.VAE, resolution=32,
        data=DataConfig(datasets=(str(videos),), batch_size=2),
    )  # fmt: skip
    said = []
    assert open_reader(trainable_of(config), said.append) is not None
    assert len(said) == 1 and "trained on" in said[0]
