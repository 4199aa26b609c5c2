"""The trainer's objectives: the diffusion loss and every gradient against the reference's, conditioning dropout, the autoencoder's loss."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
import tiny
from bounds import close, spread

from keysync_jax.config import StageConfig
from keysync_jax.converters import sgm
from keysync_jax.diffusion.loss import LossConfig
from keysync_jax.models import table
from keysync_jax.models.stage import abstract_params
from keysync_jax.training.config import DropoutConfig, TrainConfig
from keysync_jax.training.objective import DiffusionObjective
from keysync_jax.training.trainables import trainable_of
from keysync_jax.verify import harness as parity
from keysync_jax.verify.case_tools import to_images
from keysync_jax.verify.stage_cases import Engine, build_engine

# The reference's loss settings and how many frames they decode.
VARIANTS = {
    "plain": (LossConfig(), 0),
    "pixel_l2": (LossConfig(pixel_weight=1.0), 1),
    "pixel_l1_l2_n2": (LossConfig(pixel_weight=0.5, pixel_losses=("l1", "l2")), 2),
    "l1_lower": (LossConfig(latent_loss="l1", lower_weight=2.0, upper_weight=0.5), 0),
}


class Reference(NamedTuple):
    """The stored case, the models with its weights, and its batch and random numbers as the trainer has them."""

    case: parity.Case
    engine: Engine
    batch: dict
    drawn: dict

    def setting(self, variant: str):
        """(objective, trained leaves, frozen leaves, batch) of a stored loss; the frozen ones hold the decoder if it is needed."""
        loss, pixel_frames = VARIANTS[variant]
        config = TrainConfig(stage=self.engine.model.config, freeze="none", dtype="float32", remat="none", loss=loss)
        batch, frozen = dict(self.batch), {}
        if pixel_frames:
            chosen = self.case.inputs["randperm"][:pixel_frames].astype(np.int32)
            batch["original_frames"] = to_images(self.case.inputs["original_frames"])[:, chosen]
            batch["original_indices"] = np.tile(chosen, (len(batch["known"]), 1))
            frozen = self.engine.decode_params
        return DiffusionObjective(config, self.engine.vae.config), self.engine.params, frozen, batch

    def check(self, variant: str, value, parts) -> None:
        expected = {n.removeprefix(f"out.{variant}."): x for n, x in self.case.expected.items() if n.startswith(f"out.{variant}.")}
        tolerance = self.case.meta["tolerances"]["per_tensor"]
        latent = f"loss.{VARIANTS[variant][0].latent_loss}"
        got = {"mean": value, latent: parts["latent"]}
        got |= {f"loss.{name}": part for name, part in parts.items() if name.startswith("pixel_")}
        assert set(got) == set(expected) - {"loss.loss"}
        for name, number in got.items():
            atol = tolerance[f"{variant}.{name}"]["atol"]
            np.testing.assert_allclose(number, expected[name].mean(), rtol=0, atol=atol, err_msg=f"{variant}: {name}")


@pytest.fixture(scope="module")
def reference(golden_dir) -> Reference:
    case = parity.load_case(golden_dir / "loss")
    inputs, frames = case.inputs, case.meta["num_video_frames"]
    names = {"known": "latents", "mask": "masks", "identity": "cond_frames"}
    batch = {name: to_images(inputs[stored]) for name, stored in names.items()} | {"audio": inputs["audio_emb"]}
    drawn = {
        "normals": inputs["sigma_normals"],
        "noise": to_images(inputs["noise"]),
        "keep_audio": inputs["bernoulli_audio"],
        "keep_identity": inputs["bernoulli_cond_frames"].reshape(-1, frames),
    }
    return Reference(case, build_engine(case, frames), batch, drawn)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "pixel_l2"])
def test_losses_equal_the_reference(reference, variant):
    objective, *arguments = reference.setting(variant)
    reference.check(variant, *jax.jit(objective.loss)(*arguments, reference.drawn))


def test_loss_and_all_gradients_equal_the_reference(reference):
    """Through the objective that `keysync train` minimises, with the reference's random numbers in place of drawn ones."""
    variant, case, entries = "pixel_l2", reference.case, reference.engine.entries
    objective, *arguments = reference.setting(variant)
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True), compiler_options=tiny.QUICK_COMPILE)
    (value, parts), gradients = step(*arguments, reference.drawn)
    reference.check(variant, value, parts)
    named, norms = dict(table.to_torch(entries, gradients)), case.json("grad_norms.json")[variant]
    assert named.keys() == norms.keys()
    for key, gradient in named.items():
        norm = np.linalg.norm(gradient.astype(np.float64))
        # Two packages' sums over all positions, thirty layers there and back. Where a norm is small, its values cancel.
        close(norm, norms[key], 32, scale=max(norms[key], max(norms.values()) / 64), err_msg=key)
        stored = case.expected.get(f"out.grad.{variant}.{key}")
        if stored is not None:
            atol = case.meta["tolerances"]["per_tensor"][f"grad.{variant}.{key}"]["atol"]
            np.testing.assert_allclose(gradient, stored, rtol=0, atol=atol, err_msg=key)
    assert sum(name.startswith(f"out.grad.{variant}.") for name in case.expected) > 5


def test_what_is_trained_is_what_the_reference_trains(reference):
    engine = reference.engine
    trained, frozen = trainable_of(TrainConfig(stage=engine.model.config)).split(engine.params)
    held = {entry.torch_key for entry in engine.entries if sgm.is_frozen(entry.torch_key)}
    wanted = set(reference.case.json("trainable_after_to_freeze.json"))
    for tree, keys in ((trained, wanted), (frozen, held)):
        entries = [entry for entry in engine.entries if entry.torch_key in keys]
        assert len(jax.tree.leaves(tree)) == len(keys) == len(dict(table.to_torch(entries, tree))) > 0  # each key is found in its tree
    assert len(wanted) + len(held) == len(engine.entries)


def test_the_full_size_recipe_freezes_the_temporal_layers():
    """690 + 2 tensors are trained and 738 frozen in the keyframe stage; the numbers are those of the reference's rules on SVD's network."""
    trained, frozen = trainable_of(TrainConfig()).split(abstract_params(StageConfig()))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert (len(jax.tree.leaves(trained)), size(trained)) == (690 + 2, 868_873_924 + 787_456)
    assert (len(jax.tree.leaves(frozen)), size(frozen)) == (738, 656_076_838)


# -- random numbers and dropout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "per_frame", "shape"),
    [("keyframe", True, (3000, 3)), ("keyframe", False, (3000,)), ("interpolation", True, (3000,)), ("interpolation", False, (3000,))],
)
def test_identity_is_dropped_by_frame_or_by_video(stage, per_frame, shape):
    stage = tiny.STAGES[stage]
    config = TrainConfig(stage=stage, dropout=DropoutConfig(identity_per_frame=per_frame))
    objective = DiffusionObjective(config, None)
    latents = np.zeros((3000, 3, 1, 1, 4), np.float32)
    drawn = objective.draw(jax.random.key(0), {"known": latents})
    assert drawn["keep_identity"].shape == shape and drawn["keep_audio"].shape == (3000,)
    assert abs(np.mean(drawn["keep_identity"]) - 0.9) < spread(0.3, drawn["keep_identity"].size)
    assert abs(np.mean(drawn["keep_audio"]) - 0.8) < spread(0.4, 3000)
    if per_frame and stage.stage == "keyframe":
        assert (drawn["keep_identity"].any(1) & ~drawn["keep_identity"].all(1)).mean() > 0.2  # frames of one video differ
    assert np.corrcoef(drawn["keep_audio"], drawn["keep_identity"].reshape(3000, -1)[:, 0])[0, 1] < 0.1
    sigma = np.exp(config.noise.p_mean + config.noise.p_std * drawn["normals"])
    # A median strays 1.25 times as far as a mean; here the logarithm's, by 1.25 x 1.2 times e.
    assert abs(np.median(sigma) - np.e) < spread(1.25 * 1.2 * np.e, 3000)
    assert abs(drawn["noise"].std() - 1) < spread(1, 2 * drawn["noise"].size)


@pytest.fixture(scope="module")
def small():
    """(function from a batch and random numbers to the loss and the gradient of the audio projection, a batch, its numbers)."""
    config = TrainConfig(stage=tiny.KEYFRAME, freeze="none", dtype="float32", remat="none")
    objective = DiffusionObjective(config)
    batch = tiny.batch(size=2)
    batch["mask"] = np.ones_like(batch["mask"])
    drawn = {
        "normals": np.zeros(2, np.float32),
        "noise": np.random.default_rng(2).standard_normal(batch["known"].shape, np.float32),
        "keep_audio": np.array([True, False]),
        "keep_identity": np.array([[True, True, True, True], [False, True, False, False]]),
    }

    def loss(conditioner, model, batch, drawn):
        return objective.loss({"model": model, "conditioner": conditioner}, {}, batch, drawn)[0]

    run, params = jax.jit(jax.value_and_grad(loss), compiler_options=tiny.QUICK_COMPILE), tiny.params()
    return lambda batch, drawn: run(params["conditioner"], params["model"], batch, drawn), batch, drawn


# Below, losses are compared to the bit: one program, and what is dropped is multiplied by zero before anything is added to it.


def test_dropped_audio_is_zero_tokens(small):
    """Zero after the projection: neither the features nor the projection's bias reach the network."""
    run, batch, drawn = small
    none = drawn | {"keep_audio": np.array([False, False])}
    _, gradient = run(batch, none)
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))
    value, gradient = run(batch, drawn)
    assert np.abs(gradient["embedders_2"]["linear"]["bias"]).max() > 1e-6
    other = batch["audio"][::-1]
    assert run(batch | {"audio": np.stack([batch["audio"][0], other[1]])}, drawn)[0] == value  # the dropped video's
    assert run(batch | {"audio": np.stack([other[0], batch["audio"][1]])}, drawn)[0] != value


def test_a_dropped_identity_is_zero_latents(small):
    run, batch, drawn = small
    value, _ = run(batch, drawn)
    changed = batch | {"identity": np.stack([batch["identity"][0], batch["identity"][1] + 1])}
    assert run(changed, drawn)[0] != value  # one frame of the second video keeps it
    none = drawn | {"keep_identity": np.array([[True] * tiny.FRAMES, [False] * tiny.FRAMES])}
    dropped = run(batch, none)[0]
    assert run(changed, none)[0] == dropped != value
