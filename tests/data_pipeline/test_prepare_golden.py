"""Stored features against the reference: videos that carry the golden waveforms go through the whole preparation with golden weights."""

import numpy as np
import pytest
from broken_inputs import encode

from keysync_jax.config import MaskConfig
from keysync_jax.converters import model_directory, sgm
from keysync_jax.data_pipeline.prepare.features import Encoders
from keysync_jax.data_pipeline.prepare.groups import plan_features
from keysync_jax.data_pipeline.prepare.manifest import read_inputs
from keysync_jax.data_pipeline.prepare.run import prepare
from keysync_jax.data_pipeline.prepare.settings import Curation, Output
from keysync_jax.data_pipeline.source.clips import FrameStore
from keysync_jax.data_pipeline.source.latent_masks import latent_masks
from keysync_jax.data_pipeline.synthetic import make_clip
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.models import table
from keysync_jax.models.speech import registry, wavlm
from keysync_jax.verify.harness import load_case

FLOAT16 = 2**-11  # half a step, relative
# Encoder -> the golden waveform of 30 whole frames.
WAVES = {"hubert": "wav_multiple", "wavlm": "wav_even"}


@pytest.fixture(scope="module")
def model(golden_dir, tmp_path_factory):
    """Model directory of the golden cases' encoders and autoencoder."""
    cases = {name: load_case(golden_dir / name) for name in ("hubert", "wavlm", "vae_autoencoding_engine")}
    vae = cases["vae_autoencoding_engine"]
    configs = {
        "vae": sgm.vae_config_from_sgm(vae.config),
        "audio/hubert": registry.config_from_hf(cases["hubert"].config | {"model_type": "hubert"}),
        "audio/wavlm": wavlm.config_from_microsoft(cases["wavlm"].config),
    }
    params = {
        "vae": table.to_flax(sgm.vae_table(configs["vae"]), vae.weights, "vae"),
        "audio/hubert": table.to_flax(registry.audio_table(configs["audio/hubert"]), cases["hubert"].weights, "hubert"),
        "audio/wavlm": table.to_flax(registry.audio_table(configs["audio/wavlm"]), cases["wavlm"].weights, "wavlm"),
    }
    path = tmp_path_factory.mktemp("golden") / "model"
    model_directory.save_params(str(path), configs, params)
    return str(path)


def test_stored_tokens_are_the_references(golden_dir, model, tmp_path):
    (tmp_path / "videos").mkdir()
    for seed, (name, wave) in enumerate(WAVES.items()):
        clip = make_clip(seed, 30, 128)
        encode(tmp_path / "videos" / f"{name}.mkv", clip.frames, load_case(golden_dir / name).inputs[wave], pcm=True)
        np.save(tmp_path / "videos" / f"{name}.landmarks.npy", clip.landmarks)
    items = read_inputs(tmp_path / "videos")
    prepare(items, tmp_path / "data", model, Curation(crop_size=32), Output(columns=(), split_fractions={"train": 1.0}), quiet=True)
    store = FrameStore(tmp_path / "data")
    for name, wave in WAVES.items():
        case = load_case(golden_dir / name)
        expected = case.expected[f"out.{wave}.emb_offline"]
        clip = next(c for c in store.clips if c.video == f"{name}.mkv")
        stored = np.stack(store.read(clip, list(range(30)), [f"audio_{name}"])[f"audio_{name}"])
        assert stored.dtype == np.float16 and stored.shape == expected.shape
        tolerance = case.meta["tolerances"]["per_tensor"][f"{wave}.emb_offline"]["atol"]
        np.testing.assert_allclose(stored.astype(np.float32), expected, rtol=FLOAT16, atol=tolerance)


def test_latents_are_samples_of_the_references_posterior(golden_dir, model):
    import jax

    case = load_case(golden_dir / "vae_autoencoding_engine")
    images = case.inputs["image"].transpose(0, 2, 3, 1)
    mean, logvar = np.split(case.expected["out.moments"].transpose(0, 2, 3, 1), 2, axis=-1)
    plan = plan_features(model, Output(columns=()), 32)
    latents = np.stack(list(Encoders(plan).latents(enumerate(images), seed=7)))
    key = stream_key(np.uint32(7), "posterior")
    noise = np.stack([jax.random.normal(jax.random.fold_in(key, i), mean.shape[1:]) for i in range(len(images))])
    # An error of the moments within the case's tolerance comes through as it is, and of the logarithm times half the noise's part.
    tolerance = case.meta["tolerances"]["per_tensor"]["moments"]["atol"]
    drawn = np.exp(0.5 * logvar) * noise
    size = np.abs(plan.vae.latent_scale) * (1 + 0.5 * np.abs(drawn).max())
    np.testing.assert_allclose(latents, (mean + drawn) * plan.vae.latent_scale, rtol=0, atol=tolerance * size)


def test_masks_from_stored_landmarks_are_the_references(golden_dir):
    case = load_case(golden_dir / "masks")
    compared = 0
    for key, expected in case.expected.items():
        spec, what, *rest = key.removeprefix("out.").split(".")
        if what != "raw" or rest[0] == "heart":  # the reference's heart crosses itself; ours does not
            continue
        size = case.meta["specs"][spec]["H"], case.meta["specs"][spec]["W"]
        config = MaskConfig(kind=rest[0], nose_index=case.meta["nose_index"])
        ours = latent_masks(case.inputs[f"{spec}.landmarks"], size, tuple(case.meta["target_size"]), config)
        np.testing.assert_array_equal(ours[..., 0], expected[:, 0])
        compared += 1
    assert compared >= 8
