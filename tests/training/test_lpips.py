"""The perceptual distance equals PyTorch's on a stored case, is read from PyTorch's files, and reaches the losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import close
from lpips_case import FILE, images, weights

from keysync_jax.converters import torch_write
from keysync_jax.converters.lazy import LazyTensor, Tensors
from keysync_jax.core.errors import KeySyncError
from keysync_jax.diffusion.loss import LossConfig, PixelTargets, prediction_loss
from keysync_jax.training import lpips
from keysync_jax.training.config import TrainConfig, VaeLossConfig
from keysync_jax.training.trainables import trainable_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The two files, as torchvision and LPIPS publish them (the classifier's tensors are there too)."""
    path = tmp_path_factory.mktemp("vgg")
    tensors = weights()
    classifier = {"classifier.0.bias": np.zeros(3, np.float32)}
    parts = {
        "vgg16-397923af.pth": {k: v for k, v in tensors.items() if k.startswith("features")} | classifier,
        "vgg.pth": {k: v for k, v in tensors.items() if k.startswith("lin")},
    }
    for name, part in parts.items():
        lazy = {key: LazyTensor(value.shape, value.dtype, lambda value=value: value) for key, value in part.items()}
        torch_write.write(path / name, Tensors(lazy, name), wrapper=None)
    return path


@pytest.fixture(scope="module")
def distance(folder) -> lpips.Lpips:
    return lpips.load(folder)


def test_values_and_gradient_equal_torch(distance):
    first, second = images()
    value, pull = jax.vjp(jax.jit(distance), first, second)
    stored = np.load(FILE)
    # Thirteen convolutions, sums over a picture, and the way back.
    close(value, stored["value"], 32)
    gradient, _ = pull(jnp.ones(2))
    close(gradient, stored["gradient"], 16, terms=9 * 12, wrong=np.roll(stored["gradient"], 1, axis=1))
    close(distance(second, first), value, 8)


def test_equal_images_have_no_distance_and_no_gradient(distance):
    first, _ = images()
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(distance(x, first)))(first)
    assert value == 0 and not np.any(gradient)


def test_pixels_without_any_feature_have_a_finite_gradient(distance):
    """Where no channel answers, the length is zero and its square root has no derivative."""
    dark = tuple(tuple((kernel, bias - 100) for kernel, bias in group) for group in distance.convolutions)
    dead = dataclasses.replace(distance, convolutions=dark)
    first, second = images()
    gradient = jax.grad(lambda x: jnp.sum(dead(x, second)))(first)
    assert np.isfinite(gradient).all()


def test_the_pixel_loss_of_a_stage(distance):
    """Weighted like the other pixel terms; with the mask, it sees the source outside."""
    rng = np.random.default_rng(0)
    frames = np.tanh(rng.standard_normal((2, 1, 32, 32, 3), np.float32))
    denoised = rng.standard_normal((2, 3, 4, 4, 4), np.float32)
    sigma, masks = np.float32([0.5, 2.0]), np.zeros((2, 3, 4, 4, 1), np.float32)
    masks[:, :, 2:] = 1
    decode = lambda z: jnp.tanh(jnp.repeat(jnp.repeat(z[..., :3], 8, axis=-3), 8, axis=-2) * 0.18215)  # noqa: E731
    weight = (sigma**2 + 1) / sigma**2
    for mask in (False, True):
        config = LossConfig(pixel_weight=0.5, pixel_losses=("l2", "lpips"), mask_pixels=mask)
        loss = lambda d, config=config: prediction_loss(  # noqa: E731
            d, denoised, sigma, masks, config, decode=decode, pixels=PixelTargets(jnp.array([1]), frames), lpips=distance
        )
        image = np.array(decode(denoised[:, 1] / 0.18215))
        if mask:
            image[:, :16] = frames[:, 0, :16]
        expected = 0.5 * np.mean(weight * distance(image, frames[:, 0]))
        close(loss(denoised).pixels["lpips"], expected, 32)
        gradient = jax.grad(lambda d, loss=loss: loss(d).pixels["lpips"])(denoised)
        assert np.abs(gradient[:, 1, 2:, :, :3]).max() > 1e-6 and np.isfinite(gradient).all()
        assert not gradient[:, [0, 2]].any()
        assert bool(gradient[:, 1, :2].any()) != mask
    with pytest.raises(KeySyncError, match=r"config\.lpips"):
        prediction_loss(denoised, denoised, sigma, masks, config, decode=decode, pixels=PixelTargets(jnp.array([1]), frames))


def test_the_loop_builds_it_from_the_recipe(folder):
    config = TrainConfig(model="vae", vae_loss=VaeLossConfig(lpips_weight=0.1), lpips=str(folder))
    trainable = trainable_of(config)
    assert trainable.uses_lpips and trainable.objective(config.vae, lpips.load(config.lpips))
    assert not trainable_of(TrainConfig(loss=LossConfig(pixel_losses=("lpips",)))).uses_lpips  # its weight is 0


def test_wrong_files(folder, tmp_path):
    with pytest.raises(KeySyncError, match=r"config\.lpips"):
        lpips.load("")
    with pytest.raises(KeySyncError, match="holds no weights"):
        lpips.load(tmp_path)
    with pytest.raises(KeySyncError, match="has no tensor lin0"):
        lpips.load(folder / "vgg16-397923af.pth")
    wide = weights() | {"features.2.weight": np.zeros((6, 5, 3, 3), np.float32)}
    with pytest.raises(KeySyncError, match=r"features\.2\.weight is \(6, 5, 3, 3\), not \(O, 6, 3, 3\)"):
        lpips.from_tensors(wide, "drawn")
