"""Audio features: a 16 kHz waveform to two encoder tokens per 40 ms video frame.

How sound is prepared and how tokens are aligned with frames, each encoder says in its own file.

Clips of any length run in bounded memory, with the same few compiled shapes:

1. The convolutional part is local. It runs in blocks that overlap by exactly its receptive field, which loses nothing. Its one
   global quantity, the statistics of the norm over time after the first convolution, is taken over the whole clip in a pass before.
   Waveform normalisation, where the encoder wants it, is over the whole clip too.
2. The transformer attends over everything it sees. A clip of up to `window_seconds` is one sequence, padded to one of three lengths
   with the padding masked out. A longer one runs in windows of that length that overlap by twice `context_seconds`; each token
   comes from the window in which it has the most context on its nearer side, at least `context_seconds`.

So a short clip equals the single pass to rounding, and a long one differs from it only by what attention beyond the window would
have contributed. Token i always stands for the same samples: there is no drift.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Generic, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import StageConfig, encoder_names
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.models.speech import registry
from keysync_jax.models.speech.speech_encoder import C, Moments
from keysync_jax.models.speech.waveform import TOKENS_PER_FRAME, num_frames, pair

BLOCK_TOKENS = 300  # the convolutional part's unit of work, 6 s


# From a waveform `[S]` at 16 kHz to features `[F, 2, D]`.
Hearing = Callable[[np.ndarray], np.ndarray]


class TokenWindow(NamedTuple):
    """Tokens `[start, stop)` are encoded together; `[keep_from, keep_to)` of them are taken from this window."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def plan_windows(tokens: int, length: int, context: int, group: int = 1) -> list[TokenWindow]:
    """Windows of exactly `length` tokens, evenly spread over `tokens`, or one shorter window.

    Consecutive windows overlap by at least 2 * context and the cut lies in the middle of the overlap. All are whole groups of tokens.
    """
    if group > 1:
        return [
            TokenWindow(*(group * place for place in window)) for window in plan_windows(tokens // group, length // group, context // group)
        ]
    if tokens <= length:
        return [TokenWindow(0, tokens, 0, tokens)]
    steps = -(-(tokens - length) // (length - 2 * context))
    starts = [(tokens - length) * i // steps for i in range(steps + 1)]
    cuts = [0, *((later + start + length) // 2 for start, later in zip(starts, starts[1:], strict=False)), tokens]
    return [TokenWindow(start, start + length, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def side_by_side(encoder: str, tokens: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tokens that a stage reads, `[F, 2, D]`, from those of each encoder.

    Args:
      encoder: as the stage says it: "hubert", or "hubert+wavlm" for both, joined along the last axis in this order. (A model whose
        encoders are summed instead would say so in another way than by "+", and be joined here.)
      tokens: encoder -> `[F, 2, D']`.
    """
    parts = [tokens[name] for name in encoder_names(encoder)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def encoders_of(stages: Collection[StageConfig]) -> list[str]:
    """The speech encoders that stages need, each once."""
    return sorted({name for stage in stages for name in stage.audio_encoders})


def hear(
    stages: Collection[StageConfig],
    encoders: Mapping[str, Hearing],
    samples: np.ndarray,
    on_encoder: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """What stages hear of a voice, `[F, 2, D]` by their `audio_encoder`; each encoder runs once.

    Args:
      stages: all that hear it.
      encoders: by name, from a waveform `[S]` to features.
      samples: `[S]`, mono at 16 kHz.
      on_encoder: called after each encoder.
    """
    tokens = {}
    for name in encoders_of(stages):
        tokens[name] = encoders[name](samples)
        on_encoder()
    return {stage.audio_encoder: side_by_side(stage.audio_encoder, tokens) for stage in stages}


class AudioFeatures(Generic[C]):
    """Computes the audio features of clips with one encoder.

    Args:
      config: the encoder.
      params: its parameters (nested dict; empty for an encoder without weights).
      dtype: what its matmuls compute in. At float32 they run at full precision on every backend.
      window_seconds: longest sequence the transformer sees; longer clips run in windows of this length.
      context_seconds: what a token of a long clip sees at least on either side (less only at the clip's ends).

    Raises:
      KeySyncError: an encoder that does not give two tokens per frame, or a window too short for its context.
    """

    def __init__(
        self,
        config: C,
        params: Mapping[str, Any],
        dtype: Any = jnp.float32,
        *,
        window_seconds: float = 24.0,
        context_seconds: float = 4.0,
    ):
        self.config = config
        self._encoder = registry.record_of(config)
        self._geometry = self._encoder.geometry(config)
        hop, receptive, _, group = self._geometry
        if hop * TOKENS_PER_FRAME != SAMPLES_PER_FRAME or (group == 1 and receptive > SAMPLES_PER_FRAME):
            raise KeySyncError(
                f"the {config.kind} encoder reads {receptive} samples for a token every {hop}; two tokens per frame of {SAMPLES_PER_FRAME} "
                f"samples need one every {SAMPLES_PER_FRAME // TOKENS_PER_FRAME} that reads no more than a frame (conv_kernel, conv_stride)"
            )
        # In tokens; whole groups, which are never cut.
        self._window, self._context = (round(s * SAMPLE_RATE / (hop * group)) * group for s in (window_seconds, context_seconds))
        if self._window <= 2 * self._context or self._context < 0:
            raise KeySyncError(f"a window of {window_seconds} s is too short for {context_seconds} s of context on both sides")
        self._module = self._encoder.module(config, dtype)
        self._precision = "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
        self._variables = jax.device_put({"params": params})

    def __call__(self, wav: np.ndarray) -> np.ndarray:
        """Features of one clip.

        Args:
          wav: `[S]` mono at 16 kHz, floats with full scale 1.

        Returns:
          float32 `[F, 2, D]` with F = ceil(S / 640).

        Raises:
          KeySyncError: empty, not one-dimensional, not floating point or non-finite audio, or a non-finite result.
        """
        wav = _checked(wav)
        frames = self.offline(wav)[: num_frames(len(wav))]
        if not np.isfinite(frames).all():
            raise KeySyncError(f"the {self.config.kind} encoder gave non-finite values for finite audio; check its weights")
        return frames

    def offline(self, wav: np.ndarray) -> np.ndarray:
        """The reference's offline features before any cropping: `[S]` -> `[F', 2, D]`.

        F' = ceil(S / 640), for WavLM rounded up to an even number (the reference appends a frame of silence).
        """
        prepared = self.prepare(wav)
        tokens = self.tokens(prepared)
        slots = TOKENS_PER_FRAME * len(prepared) // SAMPLES_PER_FRAME
        return pair(self._encoder.align(tokens, slots))

    def prepare(self, wav: np.ndarray) -> np.ndarray:
        """What the encoder reads: normalised if it wants that, and padded to whole frames."""
        return self._encoder.prepare(self.config, wav)

    def tokens(self, prepared: np.ndarray) -> np.ndarray:
        """Encoder tokens of a whole prepared clip, `[S]` -> `[N, D]`, in blocks and windows as described above."""
        total = self._geometry.tokens(len(prepared))
        out = np.empty((total, self.config.hidden_size), np.float32)
        blocks = self._feature_blocks(prepared, total)
        held, first = next(blocks), 0  # features [first, first + len(held)) of the clip
        for window in plan_windows(total, self._window, self._context, self._geometry.group):
            parts = [held[window.start - first :]]
            first = window.start
            while first + sum(map(len, parts)) < window.stop:
                parts.append(next(blocks))
            held = np.concatenate(parts)
            encoded = self._encode(held[: window.stop - window.start])
            out[window.keep_from : window.keep_to] = encoded[window.keep_from - window.start : window.keep_to - window.start]
        return out

    def single_pass(self, prepared: np.ndarray) -> np.ndarray:
        """Tokens `[N, D]` of a prepared waveform `[S]` in one go (memory grows with S squared, one compilation per length)."""
        with jax.default_matmul_precision(self._precision):
            return np.asarray(_single_pass(self._module, self._variables, prepared[None])[0], np.float32)

    def _feature_blocks(self, prepared: np.ndarray, total: int) -> Iterator[np.ndarray]:
        """The convolutional features in order, in blocks of at most BLOCK_TOKENS: `[n, C]`."""
        moments = self._moments(prepared)
        hop, receptive, left, group = self._geometry
        size = BLOCK_TOKENS // group * group
        for start in range(0, total, size):
            block = _slice(prepared, start * hop - left, (size - group) * hop + receptive)
            with jax.default_matmul_precision(self._precision):
                features = _features(self._module, self._variables, block[None], moments)
            yield np.asarray(features[0, : total - start])

    def _moments(self, prepared: np.ndarray) -> Moments | None:
        """Mean and variance `[C]` of the first convolution's output over the whole clip, for the norm after it."""
        first = self._encoder.first_convolution(self.config)
        if first is None:
            return None
        kernel, stride, channels = first
        total = (len(prepared) - kernel) // stride + 1
        size = BLOCK_TOKENS * self._geometry.hop // stride
        count, mean, squares = 0, np.zeros(channels), np.zeros(channels)
        for start in range(0, total, size):
            block = _slice(prepared, start * stride, (size - 1) * stride + kernel)
            n = min(size, total - start)
            with jax.default_matmul_precision(self._precision):
                part = _first_moments(self._module, self._variables, block[None], jnp.int32(n))
            part_mean, part_variance = (np.asarray(x, np.float64) for x in part)
            # Combining centred sums keeps the precision that a running sum of squares would lose on long clips.
            shift = part_mean - mean
            squares += part_variance * n + shift**2 * (count * n / (count + n))
            mean += shift * (n / (count + n))
            count += n
        return Moments(mean.astype(np.float32), (squares / count).astype(np.float32))

    def _encode(self, features: np.ndarray) -> np.ndarray:
        """Transformer over one window, `[n, C]` -> `[n, D]`; padded to a quarter, half or whole window with the rest masked."""
        n = len(features)
        length = next(size for size in (-(-self._window // 4), -(-self._window // 2), self._window) if n <= size)
        padded = np.pad(features, ((0, length - n), (0, 0)))
        with jax.default_matmul_precision(self._precision):
            return np.asarray(_encode(self._module, self._variables, padded[None], np.array([n], np.int32))[0, :n], np.float32)


def _apply(module: nn.Module, variables: dict, *args: Any, method: str | None = None) -> jax.Array:
    """`module.apply`, which without mutable collections gives the output alone."""
    return cast(jax.Array, module.apply(variables, *args, method=method))


@functools.partial(jax.jit, static_argnums=0)
def _single_pass(module: nn.Module, variables: dict, waveform: jax.Array) -> jax.Array:
    return _apply(module, variables, waveform)


@functools.partial(jax.jit, static_argnums=0)
def _features(module: nn.Module, variables: dict, waveform: jax.Array, moments: Moments | None) -> jax.Array:
    return _apply(module, variables, waveform, moments, method="features")


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: nn.Module, variables: dict, features: jax.Array, count: jax.Array) -> jax.Array:
    return _apply(module, variables, features, count, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _first_moments(module: nn.Module, variables: dict, waveform: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance `[C]` over the first `count` positions of the first convolution's output."""
    x = _apply(module, variables, waveform, method="first_convolution")[0].astype(jnp.float32)
    valid = (jnp.arange(len(x)) < count)[:, None]
    mean = jnp.sum(x, axis=0, where=valid) / count
    return mean, jnp.sum(jnp.square(x - mean), axis=0, where=valid) / count


def _checked(wav: np.ndarray) -> np.ndarray:
    wav = np.asarray(wav)
    if wav.ndim != 1 or wav.dtype.kind != "f":
        raise KeySyncError(f"audio must be one-dimensional floating point (mono at 16 kHz), not {wav.dtype} of shape {wav.shape}")
    if not len(wav):
        raise KeySyncError("the audio has no samples")
    if not np.isfinite(wav).all():
        raise KeySyncError(f"the audio has non-finite samples (first at {np.argmin(np.isfinite(wav)) / SAMPLE_RATE:.3f} s)")
    return wav.astype(np.float32, copy=False)


def _slice(wav: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` samples from `start`, zeros outside the clip."""
    part = wav[max(start, 0) : max(start + length, 0)]
    before = max(-start, 0)
    return np.pad(part, (before, length - before - len(part)))
