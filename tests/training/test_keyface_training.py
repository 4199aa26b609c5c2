"""Training of KeyFace's stages: emotion from the data, no mask and no landmarks, and an early checkpoint as the worse network."""

import dataclasses

import numpy as np
import pytest
import tiny
import tiny_keyface

from keysync_jax.converters import model_directory, sgm
from keysync_jax.data_pipeline.clip_index import Clip
from keysync_jax.data_pipeline.dataset_layout import make_group
from keysync_jax.data_pipeline.records import Column, audio_column, latent_column, record_bytes
from keysync_jax.data_pipeline.shards import write_group
from keysync_jax.data_pipeline.source.mixture import DatasetChoice
from keysync_jax.data_pipeline.source.sample import EMOTION_CLASSES, WindowReader, labelled, source_config
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.models import conditioning
from keysync_jax.models.stage import init_params
from keysync_jax.training.config import CheckpointConfig, DataConfig, InitConfig, LogConfig, OptimizerConfig, TrainConfig
from keysync_jax.training.export.export_run import export
from keysync_jax.training.loop import train
from keysync_jax.training.start import initial
from keysync_jax.training.store.checkpoints import Checkpoints
from keysync_jax.training.trainables import read_run, trainable_of

COLUMNS = (
    latent_column(tiny.LATENT, tiny.LATENT), audio_column("log_mel", tiny.MELS), Column("valence", "float32", ()),
    Column("arousal", "float32", ()), Column("emotion_known", "bool", ()),
)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Two clips without landmarks; of the second one the emotion is not known, though its columns are not zero."""

    def load(piece):
        rng, frames = np.random.default_rng(piece.start), np.arange(piece.start, piece.stop)
        return {
            "latent": rng.standard_normal((len(frames), tiny.LATENT, tiny.LATENT, 4)).astype(np.float16),
            "audio_log_mel": rng.standard_normal((len(frames), 2, tiny.MELS)).astype(np.float16),
            "valence": (frames / 60).astype(np.float32),
            "arousal": (-frames / 120).astype(np.float32),
            "emotion_known": np.full(len(frames), piece.clip == "known"),
        }

    root, size = tmp_path_factory.mktemp("felt") / "data", record_bytes(COLUMNS)
    group = make_group(COLUMNS, (tiny.SIZE, tiny.SIZE), size, size * 100)
    write_group(str(root), group, load, [Clip(name, 60, split="train", speaker=name, source="tiny") for name in ("known", "unknown")])
    return str(root)


def reader(dataset, stage=tiny_keyface.KEYFRAME, **options):
    return WindowReader(source_config(stage, [DatasetChoice(dataset)], **options))


def test_windows_carry_the_emotion_of_their_frames_and_no_mask(dataset):
    source = reader(dataset)
    batch = source.read([source.sample(0, row, 8) for row in range(8)])
    assert "mask" not in batch and set(conditioning.batch_shapes(tiny_keyface.KEYFRAME)) <= set(batch)
    known = np.array([source.stores[0].clips[clip].id == "known" for clip in batch["clip"]])
    assert known.any() and not known.all()
    expected = np.where(known[:, None], batch["frames"] / 60, 0)
    np.testing.assert_allclose(batch["valence"], expected, atol=1e-6)
    np.testing.assert_allclose(batch["arousal"], -expected / 2, atol=1e-6)
    assert "valence" not in reader(dataset, tiny_keyface.INTERPOLATION).read([source.sample(0, 0, 1)])


def test_labels_are_the_nearest_of_eight_classes(dataset):
    felt = np.array([[0.9, 0.0, -0.7, 0.05], [0.6, 0.8, -0.2, 0.0]], np.float32)
    np.testing.assert_allclose(labelled(felt), np.array([EMOTION_CLASSES[i] for i in (1, 3, 2, 0)]).T)
    source = reader(dataset, emotion="labels")
    batch = source.read([source.sample(0, row, 4) for row in range(4)])
    pairs = np.stack([batch["valence"], batch["arousal"]], axis=-1).reshape(-1, 2)
    assert all(np.abs(np.array(EMOTION_CLASSES, np.float32) - pair).sum(axis=1).min() < 1e-6 for pair in pairs)


def recipe(dataset, **fields):
    return TrainConfig(
        stage=tiny_keyface.INTERPOLATION, num_steps=3, dtype="float32", remat="none", loss=LossConfig(lower_weight=2.0),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0), data=DataConfig(datasets=(dataset,), batch_size=2, threads=1),
        checkpoint=CheckpointConfig(every=1, keep_last=1, keep_every=0, weak_at=1),
        log=LogConfig(every=1, validate_every=0, samples_every=0, tensorboard=False), **fields,
    )  # fmt: skip


def test_an_early_checkpoint_becomes_the_worse_network(dataset, tmp_path):
    assert train(recipe(dataset), str(tmp_path / "run")) == 3
    with Checkpoints(tmp_path / "run", read_only=True) as saved:
        assert saved.steps() == [1, 3]  # the first one is kept though one is all that shall be
    export([tmp_path / "run"], tmp_path / "model")
    directory = model_directory.load(tmp_path / "model", complete=False)
    assert {"interpolation", "interpolation_bad"} <= set(directory.parts)
    weak, early = directory.params("interpolation_bad"), read_run(tmp_path / "run", 1).params
    assert set(weak) == {"model"} and np.array_equal(weak["model"]["learned_mask"], early["model"]["learned_mask"])
    bias = lambda params: params["model"]["diffusion_model"]["out_2"]["bias"]  # noqa: E731
    assert np.array_equal(bias(weak), bias(early)) and (bias(weak) != bias(directory.params("interpolation"))).any()


def test_a_dubbing_stage_is_a_start_and_only_what_is_new_is_drawn(tmp_path):
    config = recipe("unused", init=InitConfig(kind="run", path="there"))
    face = dataclasses.replace(config, stage=tiny_keyface.KEYFRAME)
    params = init_params(tiny.KEYFRAME, 5, zero_init=False)
    tensors = initial.from_params(sgm.stage_table(tiny.KEYFRAME), params, "dubbing")
    started, notes = initial._from_stage(face, tiny.KEYFRAME, tensors, "dubbing")
    own, theirs = started["model"]["diffusion_model"], params["model"]["diffusion_model"]
    assert own["label_emb_0_0"]["kernel"].shape[0] == theirs["label_emb_0_0"]["kernel"].shape[0] + 2 * tiny_keyface.EMOTION
    np.testing.assert_array_equal(own["out_2"]["kernel"], theirs["out_2"]["kernel"])
    linear = "conditioner", "embedders_2", "linear", "kernel"
    assert np.array_equal(_at(started, linear), _at(params, linear))
    assert any("system keysync -> keyface" in note for note in notes) and any("label_emb" in note for note in notes)
    assert trainable_of(face).trained_for()["emotion_dim"] == tiny_keyface.EMOTION


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree
