"""A voice set into a video's own sound: a part of it is replaced, the rest stays as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
import soundfile

from keysync_jax.core.errors import KeySyncError
from keysync_jax.media.audio import decoded_frames, open_audio
from keysync_jax.media.sound_blocks import AAC_LAYOUTS, placed, resampled

_FADE_S = 0.01  # of the own sound into the voice and back


def insert(
    own: str | os.PathLike | None,
    voice: str | os.PathLike,
    target: str | os.PathLike,
    *,
    start: Fraction,
    seconds: Fraction,
    voice_stream: int | None = None,
) -> str:
    """Writes the sound of a file with a part of it replaced by a voice, as a WAV file of the own sound's rate and channels.

    Args:
      own: a video or sound file; None, or one without sound: silence. The result's zero is the zero of its clock.
      voice: sound or video file; its zero is laid at `start`.
      target: file to write.
      start: seconds on the own sound's clock at which the voice begins.
      seconds: how long it replaces the own sound; a shorter voice is followed by silence.
      voice_stream: position among the voice file's audio streams, from 0; default the one that players choose.

    Returns:
      What was done, in words.

    Raises:
      KeySyncError: sound that cannot be read, or no space for the file.
    """
    rate, layout = _form(own, voice, voice_stream)
    channels = av.AudioLayout(layout).nb_channels
    below = _Blocks(_sound(own, None, rate, layout) if own is not None else iter(()), channels)
    above = _Blocks(_sound(voice, voice_stream, rate, layout), channels)
    first, stop = round(start * rate), round((start + seconds) * rate)
    fade = max(1, min(round(_FADE_S * rate), (stop - first) // 2))
    at, block = 0, rate  # samples: a second at a time
    try:
        with soundfile.SoundFile(target, "w", rate, channels, "PCM_24", format="RF64") as file:
            while True:
                mixed, more = below.take(block)
                count = mixed.shape[1] if more or at + mixed.shape[1] >= stop else min(block, stop - at)
                if not count:
                    break
                mixed = _padded(mixed, count)
                begin, end = max(first, at), min(stop, at + count)
                if begin < end:
                    said = _padded(above.take(end - begin)[0], end - begin)
                    edge = np.minimum(np.arange(begin, end) - first + 1, stop - np.arange(begin, end))
                    weight = np.minimum(1, edge / fade).astype(np.float32)
                    inside = slice(begin - at, end - at)
                    mixed[:, inside] = (1 - weight) * mixed[:, inside] + weight * said
                file.write(np.clip(mixed.T, -1, 1))
                at += count
    except (OSError, soundfile.LibsndfileError) as error:
        raise KeySyncError(f"{target}: cannot be written: {error}; free space or choose an output on another disk") from error
    where = f"from {float(start):.2f} to {float(start + seconds):.2f} s"
    return f"the video's own sound with the voice {where}" if own is not None else f"the voice {where}; the video has no sound of its own"


def _form(own: str | os.PathLike | None, voice: str | os.PathLike, voice_stream: int | None) -> tuple[int, str]:
    """Rate and layout: those of the own sound, else of the voice."""
    container, stream = open_audio(voice, voice_stream) if own is None else open_audio(own)
    with container:
        context = stream.codec_context
        return context.sample_rate, AAC_LAYOUTS.get(context.layout.nb_channels, "stereo")


def _sound(path: str | os.PathLike, number: int | None, rate: int, layout: str) -> Iterator[np.ndarray]:
    """Blocks float32 `[channels, n]` from the zero of a file's clock."""
    container, stream = open_audio(path, number)
    with container:
        given = stream.codec_context.sample_rate
        blocks = placed(container, stream, decoded_frames(container, stream, []), given, layout)
        yield from resampled(blocks, given, rate, av.AudioLayout(layout).nb_channels)


class _Blocks:
    """Sound taken in pieces of any length."""

    def __init__(self, blocks: Iterator[np.ndarray], channels: int):
        self._blocks = blocks
        self._held = np.zeros((channels, 0), np.float32)

    def take(self, count: int) -> tuple[np.ndarray, bool]:
        """Up to `count` samples float32 `[channels, n]`, and whether it may go on after them."""
        parts, have = [self._held], self._held.shape[1]
        while have < count and (block := next(self._blocks, None)) is not None:
            parts.append(block)
            have += block.shape[1]
        joined = np.concatenate(parts, axis=1)
        self._held = joined[:, count:]
        return joined[:, :count], have >= count


def _padded(samples: np.ndarray, count: int) -> np.ndarray:
    return np.pad(samples, ((0, 0), (0, count - samples.shape[1])))
