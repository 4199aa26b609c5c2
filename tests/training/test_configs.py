"""Every shipped recipe is a run: it validates, its network exists, and in miniature it does one update."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny
from bounds import close

from keysync_jax.config import StageConfig, UNetConfig, VAEConfig, to_dict
from keysync_jax.converters import model_directory, sgm
from keysync_jax.core.errors import KeySyncError, UsageError
from keysync_jax.data_pipeline.source.windows import windows_for
from keysync_jax.models import table
from keysync_jax.models.freezing import frozen_mask
from keysync_jax.models.stage import abstract_params, abstract_vae_params, init_params, init_vae_params
from keysync_jax.training import lpips, recipes, state
from keysync_jax.training.config import OptimizerConfig, TrainConfig, train_config
from keysync_jax.training.objective import DiffusionObjective, VaeObjective
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.step import make_train_step
from keysync_jax.training.trainables import trainable_of

RECIPES = sorted({name for base in recipes.names() for name in (base, *(f"{base}:{preset}" for preset in recipes.presets(base)))})
# One recipe of each kind is computed; the others, which differ from them in a term or a number, are traced.
COMPUTED = ("keyframe:paper", "interpolation:paper", "ablation_image_keyframes", "ablation_loss:l2_lpips")
DECODER = dataclasses.replace(tiny.VAE, channel_mult=(1, 1), quant_conv=False)


def load(name: str) -> TrainConfig:
    return train_config(recipes.load(name), name)


def miniature(config: TrainConfig) -> TrainConfig:
    """The recipe with small sizes, and without what does not change the program of a step."""
    old = config.stage
    sizes = ("model_channels", "channel_mult", "num_res_blocks", "attention_resolutions", "num_head_channels", "context_dim", "audio_dim")
    unet = dataclasses.replace(
        old.unet, **{name: getattr(tiny.UNET, name) for name in sizes}, num_frames=min(3, old.num_frames),
        adm_in_channels=16 if old.emotion_dim else 0,
    )  # fmt: skip
    stage = StageConfig(
        stage=old.stage, unet=unet, resolution=32, latent_size=16, num_frames=min(3, old.num_frames), audio_feature_dim=8,
        audio_merge=old.audio_merge, audio_linear=old.audio_linear, filler=old.filler, add_indicator=old.add_indicator,
        system=old.system, emotion_dim=8 if old.emotion_dim else 0,
    )  # fmt: skip
    return TrainConfig(
        model=config.model, stage=stage, vae=DECODER, resolution=32, freeze=config.freeze, dtype="float32", remat="none",
        dropout=config.dropout, loss=config.loss, pixel_frames=config.pixel_frames, vae_loss=config.vae_loss,
        optimizer=OptimizerConfig(warmup_steps=0, ema_decay=config.optimizer.ema_decay, clip_norm=config.optimizer.clip_norm),
    )  # fmt: skip


def narrow_lpips() -> lpips.Lpips:
    rng, tensors, channels = np.random.default_rng(5), {}, 3
    for i, group in enumerate(lpips.GROUPS):
        for position in group:
            tensors[f"features.{position}.weight"] = rng.standard_normal((4, channels, 3, 3)) / 4
            tensors[f"features.{position}.bias"] = rng.standard_normal(4)
            channels = 4
        tensors[f"lin{i}.model.1.weight"] = rng.random((1, 4, 1, 1))
    return lpips.from_tensors(tensors, "drawn")


@functools.cache
def update_of(text: str, compiled: bool) -> set[str]:
    """Names of the metrics of one update of a miniature (as JSON): computed, with what is trained moved and nothing else; or traced."""
    config = train_config(json.loads(text))
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
    stage, t, size = config.stage, config.stage.num_frames, config.stage.latent_size
    distance = narrow_lpips() if trainable_of(config).uses_lpips else None
    if config.model == "vae":
        params, frozen = init_vae_params(config.vae, 0), {}
        objective = VaeObjective(config, distance)
        batch = {"images": np.tanh(normal(2, 32, 32, 3)), "mouth": rng.random((2, 32, 32, 1), np.float32)}
    else:
        params, frozen = trainable_of(config).split(init_params(stage, 0, zero_init=False))
        objective = DiffusionObjective(config, DECODER, distance)
        batch = {
            "known": normal(2, t, size, size, 4),
            "audio": normal(2, t, 2, 8),
            **({} if stage.system == "keyface" else {"mask": (rng.random((2, t, size, size, 1)) < 0.7).astype(np.float32)}),
            **({name: np.tanh(normal(2, t)) for name in ("valence", "arousal")} if stage.emotion_dim else {}),
            **({"endpoints": normal(2, 2, size, size, 4)} if stage.stage == "interpolation" else {"identity": normal(2, size, size, 4)}),
        }
        if config.uses_pixels:
            decoder = init_vae_params(DECODER, 1)["first_stage_model"]["decoder"]
            frozen = state.merge(frozen, {"first_stage_model": {"decoder": decoder}})
            batch["original_frames"] = np.tanh(normal(2, config.pixel_frames, 32, 32, 3))
            batch["original_indices"] = np.tile(np.arange(config.pixel_frames, dtype=np.int32), (2, 1))
    tx = make_optimizer(config.optimizer)
    before = state.create(params, frozen, tx, config.optimizer.ema_decay > 0)
    step = make_train_step(objective, tx, config.optimizer, seed=0)
    if not compiled:
        after, metrics = jax.eval_shape(step, before, batch)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after.params) == jax.tree.map(lambda x: (x.shape, x.dtype), before.params)
        return set(metrics)
    after, metrics = jax.jit(step, compiler_options=tiny.QUICK_COMPILE)(before, batch)
    assert metrics["finite"] == 1
    moved = [bool(np.any(a != b)) for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(before.params), strict=True)]
    assert np.mean(moved) > 0.9  # not all: a single audio token leaves nothing to attend to
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before.frozen)
    return set(metrics)


@functools.cache
def shapes_of(stage: StageConfig):
    return abstract_params(stage)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_run(name):
    config = load(name)
    assert train_config(to_dict(config)) == config  # what a run stores in its workdir is the recipe
    if config.model == "vae":
        assert jax.tree.leaves(abstract_vae_params(config.vae))
    else:
        # Neither encoder nor mask nor guidance change the shapes; one network is traced for all that share it.
        stage = config.stage
        shapes = shapes_of(StageConfig(stage.stage, stage.unet, latent_size=stage.latent_size, num_frames=stage.num_frames))
        frozen = [frozen for frozen in jax.tree.leaves(frozen_mask(shapes)) if frozen]
        assert bool(frozen) == config.stage.unet.temporal_layers and config.freeze in ("temporal", "none")
    check_update(config, name in COMPUTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_in_miniature_learns(name):
    """The same for every recipe with numbers; three minutes."""
    check_update(load(name), True)


def check_update(config: TrainConfig, compiled: bool) -> None:
    metrics = update_of(json.dumps(to_dict(miniature(config))), compiled)
    expected = {f"pixel_{kind}" for kind in config.loss.pixel_losses} if config.uses_pixels else set()
    assert {key for key in metrics if key.startswith("pixel_")} == expected


def differences(a: dict, b: dict, prefix: str = "") -> dict:
    out = {}
    for key in a:
        if isinstance(a[key], dict):
            out |= differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            out[prefix + key] = (a[key], b[key])
    return out


def test_what_the_paper_says_and_what_was_released():
    found = {name: differences(to_dict(load(f"{name}:released")), to_dict(load(f"{name}:paper"))) for name in ("keyframe", "interpolation")}
    assert found["keyframe"] == {"dropout.identity_per_frame": (True, False), "loss.mask_pixels": (False, True)}
    assert found["interpolation"] == {
        "stage.audio_encoder": ("wavlm", "hubert"),
        "optimizer.learning_rate": (3e-5, 1e-5),
        "loss.pixel_weight": (0.0, 1.0),
        "loss.mask_pixels": (False, True),
    }
    for name, steps in (("keyframe", 60_000), ("interpolation", 120_000)):
        assert load(name) == load(f"{name}:released")
        paper = load(f"{name}:paper")
        assert (paper.num_steps, paper.data.batch_size, paper.optimizer.warmup_steps) == (steps, 32, 1000)
        assert (paper.dropout.audio, paper.dropout.identity, paper.optimizer.learning_rate) == (0.2, 0.1, 1e-5)
        assert (paper.optimizer.clip_norm, paper.optimizer.ema_decay) == (0, 0)


def test_ablations_change_one_thing():
    paper = to_dict(load("keyframe:paper"))
    changes = lambda name: set(differences(paper, to_dict(load(name))))  # noqa: E731
    assert changes("ablation_one_stage") == {"data.spacing", "data.min_spacing"}
    assert changes("ablation_mask:mouth") == {"stage.mask.kind", "stage.mask.nose_index"}
    for name in ("ablation_mask:box", "ablation_audio:hubert", "ablation_guidance", "ablation_loss"):
        assert changes(name) == set(), name
    for kind in ("hubert", "wavlm", "wav2vec2", "whisper"):
        assert load(f"ablation_audio:{kind}").stage.audio_encoder == kind
    assert changes("ablation_audio:whisper") == {"stage.audio_encoder"}
    assert load("ablation_mask:full_interpolation").stage.stage == "interpolation"
    plain = load("ablation_guidance:plain").stage
    assert plain.audio_scale == plain.identity_scale == 2
    image = load("ablation_image_keyframes")
    assert image.stage.num_frames == 1 and image.data.identity == "random" and not image.stage.unet.temporal_layers


def test_keyfaces_recipes_and_their_ablations():
    first, second = to_dict(load("keyface_keyframe")), to_dict(load("keyface_interpolation"))
    own = lambda base, name: differences(base, to_dict(load(name)))  # noqa: E731
    assert own(first, "keyface_keyframe:authors") == {"loss.pixel_losses": (["l2", "lpips"], ["l2"]), "loss.lower_weight": (3.0, 2.0)}
    assert own(first, "keyface_keyframe:paper") == {}
    assert own(second, "keyface_interpolation:authors") == {"freeze": ("temporal", "none"), "data.batch_size": (32, 64)}
    assert own(first, "ablation_keyface:labels") == {"data.emotion": ("continuous", "labels")}
    assert set(own(first, "ablation_keyface:speech")) == {"stage.audio_encoder", "stage.audio_feature_dim"}
    assert own(second, "ablation_keyface:speech_interpolation")["stage.audio_encoder"] == ("wav2vec2+beats", "wav2vec2")
    assert own(second, "ablation_keyface:even_interpolation") == {"loss.lower_weight": (2.0, 1.0)}
    assert own(second, "ablation_keyface:one_network") == {"stage.guidance.kind": ("auto", "none"), "checkpoint.weak_at": (12000, 0)}
    stage = load("keyface_keyframe").stage
    assert (stage.emotion_dim, stage.unet.label_dim, stage.system) == (256, 1536, "keyface")
    with pytest.raises(KeySyncError, match="data.emotion is 'words'"):
        train_config(recipes.load("keyface_keyframe", ["--config.data.emotion=words"]))


def test_an_image_network_has_no_temporal_layers():
    """Every frame on its own: the others change nothing, and no parameter is left that the temporal rule would freeze."""
    from keysync_jax.diffusion.conditions import Conditions
    from keysync_jax.models.stage import StageModel

    unet = dataclasses.replace(miniature(load("ablation_image_keyframes")).stage.unet, audio_cond_method="both_keyframes")
    stage = StageConfig(unet=unet, latent_size=8, num_frames=2, audio_feature_dim=8)
    params, rng = init_params(stage, 0, zero_init=False), np.random.default_rng(0)
    x, tokens, identity = (rng.standard_normal(shape, np.float32) for shape in ((1, 2, 8, 8, 4), (1, 1, unet.context_dim), (1, 8, 8, 4)))
    tokens = np.repeat(tokens, 2, axis=1)
    call = jax.jit(lambda x: StageModel(stage).apply({"params": params}, x, np.zeros(1, np.float32), Conditions(identity, tokens)))
    first, second = call(x), call(np.stack([x[:, 0], x[:, 1] + 1], axis=1))
    close(second[:, 0], first[:, 0], 8, terms=9 * 32)  # the same program on other frames, of which a vector may hold two
    assert np.abs(first[:, 1] - second[:, 1]).max() > 1e-3
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert not [name for name in names if "time_" in name and "time_embed" not in name]
    assert len(dict(table.to_torch(sgm.stage_table(stage), params))) == len(names)  # it can be exported


def test_windows_of_the_ablations():
    images = windows_for("keyframe", num_frames=1, spacing=13, min_spacing=13)
    assert [images.fit(n)[1] for n in (1, 2, 5)] == [0, 1, 4] and images.frames(3, 13).tolist() == [3]
    consecutive = windows_for("keyframe", num_frames=14, spacing=1, min_spacing=1)
    assert consecutive.fit(20) == (1, 6) and consecutive.frames(2, 1).tolist() == list(range(2, 16))
    with pytest.raises(KeySyncError, match="at least 2 frames"):
        windows_for("interpolation", num_frames=1)


def test_models_that_cannot_dub_say_so():
    stage = StageConfig(audio_encoder="whisper")
    with pytest.raises(KeySyncError, match="keyframe stage was trained on whisper tokens.*cannot dub"):
        model_directory.check("x", {"keyframe": stage, "interpolation": StageConfig("interpolation", UNetConfig(9)), "vae": VAEConfig()})


@pytest.mark.parametrize(
    ("name", "message"),
    [("keyframe:papper", "no preset 'papper'; it has released, paper"), ("demo_vae:x", "it has none"), ("no:x", "no recipe 'no:x'")],
)
def test_presets_that_are_not_there(name, message):
    with pytest.raises(UsageError, match=message):
        recipes.load(name)


def test_a_preset_takes_overrides():
    config = recipes.load("interpolation:paper", ["--config.stage.audio_encoder=wavlm", "--config.data.batch_size=8"])
    assert (config.stage.audio_encoder, config.data.batch_size, config.loss.pixel_weight) == ("wavlm", 8, 1.0)
