"""Audio features: a 16 kHz waveform to two encoder tokens per 40 ms video frame.

The alignment is the KeySync reference's offline path (commit cfff7cf): pad to whole frames of 640 samples; HuBERT gives 2F - 1
tokens, of which frame f takes tokens 2f and 2f + 1 (the last one zero); WavLM's 2F - 1 tokens are stretched to 2F by repeating the
first, so frame f takes tokens 2f - 1 and 2f.

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
from collections.abc import Iterator
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.core.errors import KeySyncError
from keysync_jax.speech import audio_encoder
from keysync_jax.speech.speech_layers import Moments

TOKENS_PER_FRAME = 2
BLOCK_TOKENS = 300  # the convolutional part's unit of work, 6 s

# The reference's raw pipeline splits longer audio: HuBERT by samples, WavLM by frames (20 s each).
REFERENCE_SPLIT_SAMPLES = 20 * SAMPLE_RATE
REFERENCE_SPLIT_FRAMES = 500

HUBERT_VARIANCE_EPS = 1e-7
WAVLM_VARIANCE_EPS = 1e-5


class Window(NamedTuple):
    """Tokens `[start, stop)` are encoded together; `[keep_from, keep_to)` of them are taken from this window."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def plan_windows(tokens: int, length: int, context: int) -> list[Window]:
    """Windows of exactly `length` tokens, evenly spread over `tokens`, or one shorter window.

    Consecutive windows overlap by at least 2 * context and the cut lies in the middle of the overlap.
    """
    if tokens <= length:
        return [Window(0, tokens, 0, tokens)]
    steps = -(-(tokens - length) // (length - 2 * context))
    starts = [(tokens - length) * i // steps for i in range(steps + 1)]
    cuts = [0, *((later + start + length) // 2 for start, later in zip(starts, starts[1:], strict=False)), tokens]
    return [Window(start, start + length, cuts[i], cuts[i + 1]) for i, start in enumerate(starts)]


def calculate_splits(total: int, minimum: int) -> list[int]:
    """Piece sizes of the reference's chunking: short equal ones, then a last one of at least `minimum`."""
    if total <= minimum:
        return [total]
    count = (total - minimum) // minimum + 1
    size = (total - minimum) // count
    return [size] * (count - 1) + [total - size * (count - 1)]


def num_frames(samples: int) -> int:
    """Video frames at 25 fps that this many samples cover, the last one perhaps in part."""
    return -(-samples // SAMPLES_PER_FRAME)


def pad_to_frames(wav: np.ndarray, multiple: int = 1) -> np.ndarray:
    """Zeros behind, up to a multiple of that many frames."""
    unit = SAMPLES_PER_FRAME * multiple
    return np.pad(wav, (0, -len(wav) % unit))


def standardise(wav: np.ndarray, unbiased: bool, eps: float) -> np.ndarray:
    """Zero mean and unit variance over the whole array: `(x - mean) / sqrt(var + eps)`, statistics in float64."""
    mean = wav.mean(dtype=np.float64)
    blocks = (wav[i : i + 1_000_000] for i in range(0, len(wav), 1_000_000))  # a float64 copy of hours of audio would be gigabytes
    squares = sum(float(np.square(block - mean, dtype=np.float64).sum()) for block in blocks)
    variance = squares / max(len(wav) - int(unbiased), 1)
    out = wav.astype(np.float32) - np.float32(mean)
    out /= np.float32(np.sqrt(variance + eps))
    return out


class AudioFeatures:
    """Computes the audio features of clips with one encoder.

    Args:
      config: the encoder.
      params: its parameters (nested dict; empty for "log_mel").
      dtype: what its matmuls compute in. At float32 they run at full precision on every backend.
      window_seconds: longest sequence the transformer sees; longer clips run in windows of this length.
      context_seconds: what a token of a long clip sees at least on either side (less only at the clip's ends).
      reference_chunking: reproduce the reference's raw pipeline instead: clips of 40 s and more are cut without overlap, tokens are
        lost at every cut (so HuBERT frames go missing), and WavLM may give one frame more than the audio has.

    Raises:
      KeySyncError: an encoder that does not give two tokens per frame, or a window too short for its context.
    """

    def __init__(
        self,
        config: AudioEncoderConfig,
        params: dict,
        dtype: jnp.dtype = jnp.float32,
        *,
        window_seconds: float = 24.0,
        context_seconds: float = 4.0,
        reference_chunking: bool = False,
    ):
        self.config = config
        self._geometry = audio_encoder.geometry(config)
        hop, receptive, _ = self._geometry
        if hop * TOKENS_PER_FRAME != SAMPLES_PER_FRAME or receptive > SAMPLES_PER_FRAME:
            raise KeySyncError(
                f"the {config.kind} encoder reads {receptive} samples for a token every {hop}; two tokens per frame of {SAMPLES_PER_FRAME} "
                f"samples need one every {SAMPLES_PER_FRAME // TOKENS_PER_FRAME} that reads no more than a frame (conv_kernel, conv_stride)"
            )
        self._window, self._context = (round(s * SAMPLE_RATE / self._geometry.hop) for s in (window_seconds, context_seconds))
        if self._window <= 2 * self._context or self._context < 0:
            raise KeySyncError(f"a window of {window_seconds} s is too short for {context_seconds} s of context on both sides")
        self._module = audio_encoder.build(config, dtype)
        self._precision = "highest" if jnp.dtype(dtype) == jnp.float32 else "default"
        self._variables = jax.device_put({"params": params})
        self._reference = reference_chunking

    def __call__(self, wav: np.ndarray) -> np.ndarray:
        """Features of one clip.

        Args:
          wav: `[S]` mono at 16 kHz, floats with full scale 1.

        Returns:
          float32 `[F, 2, D]` with F = ceil(S / 640) (for `reference_chunking`, what the reference gives).

        Raises:
          KeySyncError: empty, not one-dimensional, not floating point or non-finite audio, or a non-finite result.
        """
        wav = _checked(wav)
        frames = self._reference_frames(wav) if self._reference else self.offline(wav)[: num_frames(len(wav))]
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
        return _pair(_stretch(tokens, slots) if self.config.kind == "wavlm" else _fill(tokens, slots))

    def prepare(self, wav: np.ndarray) -> np.ndarray:
        """What the encoder reads: normalised if it wants that, and padded to whole frames."""
        if self.config.kind == "hubert" and self.config.normalize_waveform:
            wav = standardise(wav, unbiased=True, eps=HUBERT_VARIANCE_EPS)  # before the padding, unlike in the raw pipeline
        if self.config.kind != "wavlm":
            return pad_to_frames(wav)
        wav = pad_to_frames(wav, multiple=2)
        return standardise(wav, unbiased=False, eps=WAVLM_VARIANCE_EPS) if self.config.normalize_waveform else wav

    def tokens(self, prepared: np.ndarray) -> np.ndarray:
        """Encoder tokens of a whole prepared clip, `[S]` -> `[N, D]`, in blocks and windows as described above."""
        total = self._geometry.tokens(len(prepared))
        out = np.empty((total, self.config.hidden_size), np.float32)
        blocks = self._feature_blocks(prepared, total)
        held, first = next(blocks), 0  # features [first, first + len(held)) of the clip
        for window in plan_windows(total, self._window, self._context):
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
        hop, receptive, left = self._geometry
        for start in range(0, total, BLOCK_TOKENS):
            block = _slice(prepared, start * hop - left, (BLOCK_TOKENS - 1) * hop + receptive)
            with jax.default_matmul_precision(self._precision):
                features = _features(self._module, self._variables, block[None], moments)
            yield np.asarray(features[0, : total - start])

    def _moments(self, prepared: np.ndarray) -> Moments | None:
        """Mean and variance `[C]` of the first convolution's output over the whole clip, for the norm after it."""
        config = self.config
        if config.kind == "log_mel" or config.extractor_mode != "group":
            return None
        kernel, stride = config.conv_kernel[0], config.conv_stride[0]
        total = (len(prepared) - kernel) // stride + 1
        size = BLOCK_TOKENS * self._geometry.hop // stride
        count, mean, squares = 0, np.zeros(config.conv_dim[0]), np.zeros(config.conv_dim[0])
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

    def _reference_frames(self, wav: np.ndarray) -> np.ndarray:
        if self.config.kind == "hubert":
            wav = pad_to_frames(wav)
            if self.config.normalize_waveform:
                wav = standardise(wav, unbiased=True, eps=HUBERT_VARIANCE_EPS)
            return self.chunked(wav, REFERENCE_SPLIT_SAMPLES)
        if self.config.kind == "wavlm":
            wav = pad_to_frames(wav, multiple=2)
            pieces = _split(wav.reshape(-1, SAMPLES_PER_FRAME), calculate_splits(len(wav) // SAMPLES_PER_FRAME, REFERENCE_SPLIT_FRAMES))
            return np.concatenate([self._reference_wavlm(piece.ravel()) for piece in pieces])
        return self.offline(wav)  # the reference has no log-mel path to reproduce

    def _reference_wavlm(self, piece: np.ndarray) -> np.ndarray:
        if self.config.normalize_waveform:
            piece = standardise(piece, unbiased=False, eps=WAVLM_VARIANCE_EPS)
        return _pair(_stretch(self.single_pass(piece), TOKENS_PER_FRAME * len(piece) // SAMPLES_PER_FRAME))

    def chunked(self, prepared: np.ndarray, minimum: int) -> np.ndarray:
        """The reference's HuBERT chunking of a prepared waveform by samples; pieces lose their last, partial token."""
        pieces = _split(prepared, calculate_splits(len(prepared), minimum))
        tokens = np.concatenate([self.single_pass(piece) for piece in pieces])
        return _pair(_fill(tokens, len(tokens) + len(tokens) % 2))


@functools.partial(jax.jit, static_argnums=0)
def _single_pass(module: nn.Module, variables: dict, waveform: jax.Array) -> jax.Array:
    return module.apply(variables, waveform)


@functools.partial(jax.jit, static_argnums=0)
def _features(module: nn.Module, variables: dict, waveform: jax.Array, moments: Moments | None) -> jax.Array:
    return module.apply(variables, waveform, moments, method="features")


@functools.partial(jax.jit, static_argnums=0)
def _encode(module: nn.Module, variables: dict, features: jax.Array, count: jax.Array) -> jax.Array:
    return module.apply(variables, features, count, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def _first_moments(module: nn.Module, variables: dict, waveform: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance `[C]` over the first `count` positions of the first convolution's output."""
    x = module.apply(variables, waveform, method="first_convolution")[0].astype(jnp.float32)
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


def _split(array: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(sizes)[:-1])


def _fill(tokens: np.ndarray, slots: int) -> np.ndarray:
    """Zero tokens behind, or surplus ones cut: `[N, D]` -> `[slots, D]`."""
    return np.pad(tokens[:slots], ((0, max(0, slots - len(tokens))), (0, 0)))


def _stretch(tokens: np.ndarray, slots: int) -> np.ndarray:
    """Nearest-neighbour resampling as torch does it: slot i takes token floor(i * N / slots)."""
    return tokens[np.arange(slots) * len(tokens) // slots]


def _pair(tokens: np.ndarray) -> np.ndarray:
    """`[2F, D]` -> `[F, 2, D]`."""
    return tokens.reshape(-1, TOKENS_PER_FRAME, tokens.shape[-1])
