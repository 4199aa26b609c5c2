"""What the model makes of a few held-out items, as pictures and clips that are the same from step to step but for the weights.

    WORKDIR/samples/STEP.png   source, region to regenerate, generated; the autoencoder: source, decoded
    WORKDIR/samples/STEP.mp4   the same in motion

A stage generates whole windows with the sampler and the guidance recommended for it. Windows keep their own voice, so that a perfect
model would give the source back.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageOps

from keysync_jax.config import GuidanceConfig, StageConfig, VAEConfig
from keysync_jax.core.clock import FRAME_RATE
from keysync_jax.data_pipeline.source.frames import FrameReader
from keysync_jax.data_pipeline.source.loader import Reader
from keysync_jax.data_pipeline.source.sample import WindowReader
from keysync_jax.diffusion import guidance, sampler, schedules
from keysync_jax.diffusion.noise import stream_key
from keysync_jax.models import conditioning
from keysync_jax.models.stage import StageModel
from keysync_jax.models.vae import VAE
from keysync_jax.parallel.sharding import data_share, global_batch
from keysync_jax.training import data
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.start.stage_vae import located
from keysync_jax.training.state import TrainState, Tree, merge
from keysync_jax.training.store.workdir import beside_training
from keysync_jax.training.trainable import SampleMaker, Say, Trainable
from keysync_jax.training.watch import pictures
from keysync_jax.training.watch.metrics import MetricLog
from keysync_jax.training.watch.pictures import Item
from keysync_jax.training.watch.validation import SEED, shards

SAMPLES = "samples"
_VIDEO_FRAMES = 14  # frames of each video that an autoencoder is shown


class Samples:
    """Makes the pictures; every process takes part, process 0 writes."""

    def __init__(
        self,
        trainable: Trainable,
        reader: Reader,
        mesh: Mesh,
        log: MetricLog,
        workdir: epath.PathLike,
        vae: VAEConfig | None = None,
    ):
        """Args:
          trainable: of the run.
          reader: validation data.
          mesh: of the run.
          log: where to say what is done.
          workdir: where `samples` goes.
          vae: config of the autoencoder whose decoder is among the frozen leaves, None if there is none.

        Raises:
          KeySyncError: `config.init.vae` names no model directory with a VAE, or one that does not fit the stage.
        """
        self._log, self._folder = log, epath.Path(workdir) / SAMPLES
        self._make = trainable.samples(reader, mesh, log.say, vae)
        self._compiled = False

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Writes the pictures of `state`'s averaged weights (or of its parameters where none are kept).

        Returns:
          `samples/l1_mask` (autoencoder: `samples/l1`), mean absolute error against the source in [0, 1]; {} if nothing was made.
        """
        make = self._make
        if make is None:
            return {}
        begin = time.perf_counter()
        self._log.say(f"{step:>7}  {make.what}{'' if self._compiled else ', compiling first'} …")
        weights = state.params if state.ema is None else state.ema
        try:
            items, error = make(weights, state.frozen)
        except jax.errors.JaxRuntimeError as problem:
            if "RESOURCE_EXHAUSTED" not in str(problem):
                raise
            self._log.say("[yellow]no memory for sample pictures beside the training; they are off from now on[/yellow]")
            self._make = None
            return {}
        self._compiled = True
        if not items:
            self._log.say(f"[red]{step:>7}  what was generated is not finite; no sample pictures[/red]")
            return {}
        name = "averaged weights" if state.ema is not None else "weights"
        values = {f"samples/{make.error}": error}
        title = f"step {step}, {name}, {make.caption}; {make.error} {error:.4f}"
        if jax.process_index() == 0:
            self._write(step, title, items, make)
        path, seconds = self._folder / _file(step, "png"), time.perf_counter() - begin
        self._log.say(f"{step:>7}  samples: {make.error} {error:.4f}, {path}  ({seconds:.0f} s)")
        return values

    def _write(self, step: int, title: str, items: Sequence[Item], make: SampleMaker) -> None:
        picture = pictures.grid(title, items, make.times)
        with beside_training(self._folder, self._log.say):
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _file(step, "png")).write_bytes(pictures.png(picture))
            (self._folder / _file(step, "mp4")).write_bytes(pictures.clip(items, make.rate, make.moving_rows))
        self._log.picture(step, "samples", picture)


def _file(step: int, suffix: str) -> str:
    return f"{step:08}.{suffix}"


def _replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _global_rows(mesh: Mesh, arrays: dict[str, np.ndarray], count: int) -> dict[str, jax.Array]:
    """The first `count` rows (all processes have them) as global arrays, filled up by the last row to what the mesh divides."""
    parts, (share, shares) = shards(mesh), data_share(mesh)
    rows = np.minimum(np.arange(-(-count // parts) * parts), count - 1)
    own = np.split(rows, shares)[share]
    return global_batch(mesh, {name: np.ascontiguousarray(value[own]) for name, value in arrays.items()})


def _decode_frames(model: VAE, params: Tree, latents: jax.Array) -> jax.Array:
    """Raw latents `[B, T, h, w, C]` to pictures `[B, T, H, W, 3]` uint8, each frame alone, one frame of every video at a time."""

    def decode(z: jax.Array) -> jax.Array:
        image = model.apply({"params": params}, z[:, None], method="decode")[:, 0]
        return jnp.round(127.5 * (jnp.clip(image, -1, 1) + 1)).astype(jnp.uint8)

    return jnp.moveaxis(jax.lax.map(decode, jnp.moveaxis(latents, 1, 0)), 0, 1)


class StageSamples(SampleMaker):
    """Windows of a diffusion stage."""

    error = "l1_mask"
    moving_rows = (0, 2)

    def __init__(self, config: TrainConfig, reader: WindowReader, mesh: Mesh, say: Say, vae: VAEConfig | None):
        stage, count = config.stage, config.log.samples
        self._mesh, self._count = mesh, count
        found = reader.read([reader.sample(0, row, count) for row in range(count)])
        self._batch = {name: data.step_arrays(found)[name] for name in conditioning.batch_shapes(stage)}
        self._batch["index"] = np.arange(count, dtype=np.int32)
        spacing = reader.config.windows.spacing
        self.rate, self.times = Fraction(FRAME_RATE, spacing), [spacing * i / FRAME_RATE for i in range(stage.num_frames)]
        self.what = f"generating {count} windows of {stage.num_frames} frames"
        kind = [] if stage.guidance.kind == GuidanceConfig.kind else [stage.guidance.kind]
        words = [*kind, *(f"{name} {number:g}" for name, number in stage.guidance_numbers.items())]
        words = ["none"] if isinstance(_rule(stage), guidance.NoGuidance) else words
        self.caption = f"guidance {' '.join(words)}, {config.log.sample_steps} steps"
        # Whose decoder draws: the one that the pixel loss decodes with, else the one of the model directory.
        self._decoder: Tree | None = None
        self._vae, self._frozen_decoder = vae, vae is not None
        if vae is None:
            try:
                self._vae, self._decoder = _decoder_of(config)
            except FileNotFoundError as missing:  # a run that goes on needs the sources of its first weights no more
                say(f"[yellow]{missing} is gone[/yellow]")
        if self._vae is None:
            say("sample pictures show latents (three channels as colours): name a model directory with a VAE in config.init.vae for faces")
        generate = _window_generator(config, self._vae, count)
        self._generate = jax.jit(generate, out_shardings=_replicated(mesh))

    def __call__(self, params: Tree, frozen: Tree) -> tuple[list[Item], float]:
        decoder: Any = {}
        if self._frozen_decoder:
            decoder = {"first_stage_model": frozen["first_stage_model"]}
        elif self._decoder is not None:
            # On the devices only while it is needed: between two samplings the memory belongs to the training.
            decoder = jax.device_put(self._decoder, _replicated(self._mesh))
        own = {name: tree for name, tree in frozen.items() if name != "first_stage_model"}
        rows = _global_rows(self._mesh, self._batch, self._count)
        source, generated, finite = jax.device_get(self._generate(params, own, decoder, rows))
        if not finite:
            return [], float("nan")
        masks = self._batch.get("mask", np.ones((*self._batch["known"].shape[:-1], 1), np.float32))  # without one, all is generated
        if self._vae is None:
            pairs = [(pictures.preview(s, s), pictures.preview(g, s)) for s, g in zip(source, generated, strict=True)]
            source, generated = (np.stack(side) for side in zip(*pairs, strict=True))
        items = [
            Item((("source", s), ("region", pictures.tint(s, m)), ("generated", g)))
            for s, g, m in zip(source, generated, masks, strict=True)
        ]
        return items, _masked_error(source, generated, masks)


def _rule(stage: StageConfig) -> guidance.Guidance:
    """The stage's guidance; none where it asks a second network, which is not there while one is trained."""
    rule = guidance.of_stage(stage).needed()
    return rule if all(branch.network == guidance.MAIN for branch in rule.branches) else guidance.NoGuidance()


def _window_generator(config: TrainConfig, vae: VAEConfig | None, count: int) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """`(params, frozen, decoder, batch) -> (source, generated, finite)` of the first `count` windows: pictures `[n, T, H, W, 3]` uint8, or
    scaled latents without a VAE."""
    stage = config.stage
    model = StageModel(stage, dtype=jnp.dtype(config.dtype), attention=config.attention)
    sigmas = schedules.ays_sigmas(config.log.sample_steps)
    rule = _rule(stage)

    def generate(params: Tree, frozen: Tree, decoder: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        variables = {"params": merge(params, frozen)}
        conditions = conditioning.conditions(model, variables, batch)
        key, shape = stream_key(SEED, stage.stage), batch["known"].shape[1:]
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(batch["index"])
        latents = sampler.sample(functools.partial(model.apply, variables), noise, sigmas, conditions, rule)
        source, finite = batch["known"], jnp.isfinite(latents[:count]).all()
        if vae is None:
            return source[:count], latents[:count], finite
        both = jnp.concatenate([source, latents], axis=1) / stage.latent_scale
        frames = _decode_frames(VAE(vae, attention=config.attention), decoder, both)[:count]
        return frames[:, : stage.num_frames], frames[:, stage.num_frames :], finite

    return generate


def _masked_error(source: np.ndarray, generated: np.ndarray, masks: np.ndarray) -> float:
    """Mean absolute difference of pictures `[n, T, H, W, 3]` uint8 where the masks are 1, in [0, 1]."""
    height, width = (source.shape[i] // masks.shape[i] for i in (2, 3))
    weight = np.repeat(np.repeat(masks, height, axis=2), width, axis=3)
    difference = np.abs(source.astype(np.float32) - generated) / 255
    return float((difference * weight).sum() / max(3 * weight.sum(), 1))


def _decoder_of(config: TrainConfig) -> tuple[VAEConfig | None, Tree | None]:
    """The VAE of the model directory that the config names, its config and the decoder's parameters; (None, None) if it names none.

    Raises:
      FileNotFoundError: the directory is not there.
    """
    from keysync_jax.converters import model_directory

    init = located(config.init)
    path = init.vae or (init.path if init.kind == "model" else "")
    if not path:
        return None, None
    if not path.startswith("hub:") and not epath.Path(path).exists():
        raise FileNotFoundError(path)
    directory = model_directory.load(path, complete=False)
    if not init.vae and "vae" not in directory.parts:
        return None, None
    vae = directory.vae
    parts = {"vae": vae, config.stage.stage: config.stage}
    model_directory.check(f"config.stage and the VAE of {path}", parts, complete=False)
    tree = directory.params("vae")["first_stage_model"]
    return vae, {"first_stage_model": {name: tree[name] for name in ("decoder", "post_quant_conv") if name in tree}}


class AutoencoderSamples(SampleMaker):
    """The beginnings of a few videos, encoded (to the mode) and decoded."""

    error = "l1"
    moving_rows = (0, 1)
    rate = Fraction(FRAME_RATE)
    caption = "each frame alone"

    def __init__(self, config: TrainConfig, reader: FrameReader, mesh: Mesh, say: Say, vae: VAEConfig | None):
        count, per_video = config.log.samples, reader.config.frames_per_clip
        self._mesh, self._count = mesh, count
        videos = [reader.sample(0, row * per_video, 1)[1] for row in range(count)]
        self._images = np.stack([_beginning(reader, video) for video in videos])
        self.times = [i / FRAME_RATE for i in range(_VIDEO_FRAMES)]
        self.what = f"decoding {count} videos of {_VIDEO_FRAMES} frames"
        model = VAE(config.vae, dtype=jnp.dtype(config.dtype), attention=config.attention)

        def reconstruct(params: Tree, frozen: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            variables = merge(params, frozen)

            def one(images: jax.Array) -> tuple[jax.Array, jax.Array]:
                mean, _ = model.apply({"params": variables}, images.astype(jnp.float32) / 127.5 - 1, method="encode_moments")
                return _decode_frames(model, variables, mean[:, None])[:, 0], jnp.isfinite(mean).all()

            decoded, finite = jax.lax.map(one, jnp.moveaxis(batch["images"], 1, 0))
            return jnp.moveaxis(decoded, 0, 1)[:count], finite.all()

        self._reconstruct = jax.jit(reconstruct, out_shardings=_replicated(mesh))

    def __call__(self, params: Tree, frozen: Tree) -> tuple[list[Item], float]:
        rows = _global_rows(self._mesh, {"images": self._images}, self._count)
        decoded, finite = jax.device_get(self._reconstruct(params, frozen, rows))
        if not finite:
            return [], float("nan")
        error = float(np.abs(self._images.astype(np.float32) - decoded).mean() / 255)
        return [Item((("source", a), ("decoded", b))) for a, b in zip(self._images, decoded, strict=True)], error


def _beginning(reader: FrameReader, number: int) -> np.ndarray:
    """The first frames of a video `[T, S, S, 3]` uint8, its central square resized; a shorter one stands still at its end."""
    from keysync_jax.media import video

    size, path = reader.config.size, reader.paths[number]
    if path.suffix == ".npy":  # frames as they are, as `keysync data synth --arrays` writes them
        frames = list(np.load(path, mmap_mode="r")[:_VIDEO_FRAMES])
    else:
        with video.read(path) as opened:
            frames = [frame.rgb() for frame in itertools.islice(opened, _VIDEO_FRAMES)]
    squares = [np.asarray(ImageOps.fit(Image.fromarray(frame), (size, size), Image.Resampling.BOX)) for frame in frames]
    return np.stack(squares + [squares[-1]] * (_VIDEO_FRAMES - len(squares)))
