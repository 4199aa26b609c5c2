"""What clips become beside each other on fake devices: `python rounds_worker.py OUT.npz NETWORK`, in a process that has eight of them.

NETWORK is "unet", a small U-Net through the whole sampler, or "small", a few layers with the operations that mix numbers of one row
(convolution, matrix product, normalisation), which compile in no time. For every microbatch and number of devices, five short clips are
made alone, together, in another order, and with one of them spoilt. All arrays are stored, as `DEVICES/MICROBATCH/CASE/CLIP`, beside the
number of device calls that the clips took together.
"""

import sys

from keysync_jax.core import cpu

cpu.prepare()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from keysync_jax.config import StageConfig, UNetConfig  # noqa: E402
from keysync_jax.diffusion.guidance import AudioIdentityGuidance  # noqa: E402
from keysync_jax.inference import two_stage  # noqa: E402
from keysync_jax.inference.engine import StageSampler  # noqa: E402
from keysync_jax.inference.phases import PhaseProgress  # noqa: E402
from keysync_jax.inference.window_plan import make_plan  # noqa: E402
from keysync_jax.models.stage import init_params  # noqa: E402
from keysync_jax.parallel.mesh import data_mesh  # noqa: E402

T, SIDE, BANDS = 3, 8, 8
CLIPS, SPOILT = 5, 2
CASES = {"together": range(CLIPS), "shuffled": (3, 0, 4, 2, 1), "spoilt": range(CLIPS)}


def stage() -> StageConfig:
    unet = UNetConfig(
        in_channels=8, model_channels=32, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_head_channels=32,
        context_dim=32, audio_dim=32, num_frames=T,
    )  # fmt: skip
    return StageConfig(unet=unet, resolution=64, latent_size=SIDE, num_frames=T, audio_encoder="log_mel", audio_feature_dim=BANDS)


class SmallStage(StageSampler):
    """Three layers in the place of noise, network and sampler; the guidance scales what the audio adds."""

    def _sample(self, params, _, windows):
        own = params["main"]
        seeds = jnp.broadcast_to(windows.seed[:, None, None, None, None] / 10, windows.known.shape)
        identity = jnp.broadcast_to(windows.latents[:, None], windows.known.shape)
        x = jnp.concatenate([seeds, windows.known * (1 - windows.mask), identity], -1)
        x = jax.lax.conv_general_dilated(
            x.reshape(-1, *x.shape[2:]), own["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        ).reshape(*x.shape[:4], -1)
        audio = windows.audio.reshape(*windows.audio.shape[:2], -1) @ own["audio"]["kernel"]
        x = x + (windows.guidance.audio[:, None, None] * audio)[:, :, None, None]
        x = (x - x.mean((1, 2, 3), keepdims=True)) / (x.std((1, 2, 3), keepdims=True) + 1e-5)
        return windows.known + windows.mask * (jax.nn.silu(x) @ own["out"]["kernel"])


def small_params() -> dict:
    rng = np.random.default_rng(0)
    shapes = {"conv": (3, 3, 12, 48), "audio": (2 * BANDS, 48), "out": (48, 4)}
    return {name: {"kernel": rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[:-1]))} for name, shape in shapes.items()}


def clip(number: int, spoilt: bool = False) -> two_stage.Clip:
    """A clip of one keyframe window, unlike the others in content, seed and scales."""
    rng = np.random.default_rng(number)
    known = rng.standard_normal((T, SIDE, SIDE, 4), np.float32)
    if spoilt:
        known[0, 2, 3] = np.nan
    audio = {"log_mel": rng.standard_normal((T, 2, BANDS), np.float32)}
    stretch = two_stage.Stretch(make_plan(T, T), audio, lambda frames: known[frames], rng.random((T, SIDE, SIDE)) < 0.5, lambda *_: None)
    guidance = AudioIdentityGuidance(np.float32(1.5 + number), np.float32(2 - 0.3 * number))
    return two_stage.Clip([stretch], 10 + number, 10, {"keyframe": guidance})


def keyframes(sampler: StageSampler, numbers, spoilt: int | None = None) -> dict[int, np.ndarray | str]:
    clips = {number: clip(number, number == spoilt) for number in numbers}
    two_stage.generate({"keyframe": sampler}, list(clips.values()), PhaseProgress())
    return {number: str(c.error) if c.error else np.stack(list(c.stretches[0].keyframes.values())) for number, c in clips.items()}


def main(path: str, network: str) -> None:
    config = stage()
    kind, params = (SmallStage, small_params()) if network == "small" else (StageSampler, init_params(config, 0, zero_init=False, gain=0.5))
    stored: dict[str, np.ndarray] = {}
    for devices in (1, 8):
        for microbatch in (1, 2, 3):
            at = f"{devices}/{microbatch}"
            sampler = kind(config, params, data_mesh(jax.devices()[:devices]), microbatch=microbatch)
            made = {"alone": {number: keyframes(sampler, [number])[number] for number in range(CLIPS)}}
            before = sampler.calls
            for case, numbers in CASES.items():
                made[case] = keyframes(sampler, numbers, SPOILT if case == "spoilt" else None)
                stored.setdefault(f"{at}/calls", np.array(sampler.calls - before))
            stored |= {f"{at}/{case}/{number}": np.asarray(value) for case, clips in made.items() for number, value in clips.items()}
    np.savez(path, **stored)


if __name__ == "__main__":
    main(*sys.argv[1:])
