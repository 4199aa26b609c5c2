"""The reference's raw audio pipeline: clips of 40 s and more are cut without overlap, in pieces of 20 s.

Tokens are lost at every cut, so that HuBERT frames go missing, and WavLM may give one frame more than the audio has.
"""

from __future__ import annotations

import numpy as np

from keysync_jax.config import AudioEncoderConfig
from keysync_jax.core.clock import SAMPLE_RATE, SAMPLES_PER_FRAME
from keysync_jax.encoders.audio_features import AudioFeatures
from keysync_jax.models.speech import hubert, wavlm
from keysync_jax.models.speech.waveform import TOKENS_PER_FRAME, fill, pad_to_frames, pair, stretch

Features = AudioFeatures[AudioEncoderConfig]
SPLIT_SAMPLES = 20 * SAMPLE_RATE  # HuBERT is cut by samples
SPLIT_FRAMES = 500  # WavLM by frames


def calculate_splits(total: int, minimum: int) -> list[int]:
    """Piece sizes of the reference's chunking: short equal ones, then a last one of at least `minimum`."""
    if total <= minimum:
        return [total]
    count = (total - minimum) // minimum + 1
    size = (total - minimum) // count
    return [size] * (count - 1) + [total - size * (count - 1)]


def hubert_frames(features: Features, wav: np.ndarray) -> np.ndarray:
    """Samples `[S]` -> what the reference gives for F frames, `[F', 2, D]`; the padding is normalised with the sound."""
    return hubert_chunks(features, hubert.normalise(features.config, pad_to_frames(wav)), SPLIT_SAMPLES)


def hubert_chunks(features: Features, prepared: np.ndarray, minimum: int) -> np.ndarray:
    """A prepared waveform `[S]` in pieces that lose their last, partial token -> `[F', 2, D]`."""
    tokens = np.concatenate([features.single_pass(piece) for piece in _split(prepared, calculate_splits(len(prepared), minimum))])
    return pair(fill(tokens, len(tokens) + len(tokens) % 2))


def wavlm_frames(features: Features, wav: np.ndarray) -> np.ndarray:
    """Samples `[S]` -> what the reference gives, `[F', 2, D]` with F' even; every piece is normalised by itself."""
    wav = pad_to_frames(wav, multiple=2)
    pieces = _split(wav.reshape(-1, SAMPLES_PER_FRAME), calculate_splits(len(wav) // SAMPLES_PER_FRAME, SPLIT_FRAMES))
    return np.concatenate([_wavlm_piece(features, piece.ravel()) for piece in pieces])


def _wavlm_piece(features: Features, piece: np.ndarray) -> np.ndarray:
    tokens = features.single_pass(wavlm.normalise(features.config, piece))
    return pair(stretch(tokens, TOKENS_PER_FRAME * len(piece) // SAMPLES_PER_FRAME))


def _split(array: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(sizes)[:-1])
