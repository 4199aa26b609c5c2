"""From a batch to conditions to the network: the names that training, sample pictures, generation and parity share."""

import dataclasses

import jax
import numpy as np
import pytest
from bounds import close
from tiny import CONFIG, INTERPOLATION, KEYFRAME

from keysync_jax.models.conditioning import batch_shapes, conditions
from keysync_jax.models.stage import StageModel, abstract_params, init_params
from keysync_jax.training.trainables import trainable_of

VECTOR = dataclasses.replace(KEYFRAME, unet=dataclasses.replace(KEYFRAME.unet, adm_in_channels=6))


def batch_of(stage, size=2):
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((size, *shape), np.float32) for name, shape in batch_shapes(stage).items()}


@pytest.mark.parametrize("stage", [KEYFRAME, INTERPOLATION, VECTOR], ids=["keyframe", "interpolation", "vector"])
def test_a_batch_becomes_conditions(stage):
    model, variables, batch = StageModel(stage), {"params": init_params(stage, 0, zero_init=False)}, batch_of(stage)
    got = conditions(model, variables, batch | {"index": np.arange(2)})  # other arrays of a batch are nobody's business here
    latents = batch["identity"] if stage.stage == "keyframe" else np.concatenate([*batch["endpoints"].swapaxes(0, 1)], axis=-1)
    close(got.concat, latents / stage.latent_scale, 2, scale="each", wrong=latents)
    np.testing.assert_array_equal(got.crossattn, model.apply(variables, batch["audio"], method="embed_audio"))
    np.testing.assert_array_equal(got.gt, batch["known"])
    np.testing.assert_array_equal(got.masks, batch["mask"])
    if stage is VECTOR:
        np.testing.assert_array_equal(got.vector, batch["vector"])
    else:
        assert got.vector is None
    without_mask = {name: value for name, value in batch.items() if name != "mask"}
    assert conditions(model, variables, without_mask)[2:4] == (None, None)


def test_shapes_of_a_batch_stand_once():
    planned = trainable_of(CONFIG).batch_shapes(3)
    assert {name: planned[name].shape[1:] for name in batch_shapes(KEYFRAME)} == batch_shapes(KEYFRAME)
    assert batch_shapes(INTERPOLATION)["endpoints"] == (2, *batch_shapes(KEYFRAME)["identity"])


def test_a_vector_reaches_the_network():
    """One for all frames or one per frame, in front of the audio in the label path; the parameters have room for it."""
    label = abstract_params(VECTOR)["model"]["diffusion_model"]["label_emb_0_0"]["kernel"]
    assert label.shape[0] == KEYFRAME.unet.label_dim + 6
    model, variables = StageModel(VECTOR), {"params": init_params(VECTOR, 0, zero_init=False)}
    call = jax.jit(lambda given: model.apply(variables, given.gt, np.zeros(2, np.float32), given))
    batch = batch_of(VECTOR)
    per_frame = conditions(model, variables, batch)
    first = np.asarray(call(per_frame))
    raised = batch["vector"] + np.eye(1, VECTOR.num_frames, dtype=np.float32)[..., None]  # of the first frame
    changed = np.asarray(call(per_frame._replace(vector=raised)))
    assert np.abs(changed - first)[:, 0].max() > 1e-3
    whole = np.asarray(call(per_frame._replace(vector=batch["vector"][:, 0])))
    repeated = np.repeat(batch["vector"][:, :1], VECTOR.num_frames, axis=1)
    np.testing.assert_array_equal(whole, call(per_frame._replace(vector=repeated)))
