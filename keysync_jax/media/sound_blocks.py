"""Decoded sound of several channels in blocks, set where its timestamps say and brought to one layout and rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
import soxr

from keysync_jax.media.audio import Clock

# Layouts that AAC has, by number of channels.
AAC_LAYOUTS = {1: "mono", 2: "stereo", 3: "3.0", 4: "4.0", 5: "5.0", 6: "5.1", 8: "7.1"}


def placed(container, stream, frames: Iterable[av.AudioFrame], rate: int, layout: str) -> Iterator[np.ndarray]:
    """Blocks float32 `[channels, n]` from the zero of the file's clock on: gaps are silence, overlaps are dropped.

    Args:
      container, stream: what `audio.open_audio` returned.
      frames: decoded from them.
      rate: of the blocks, Hz; frames of another rate are brought to it.
      layout: of the blocks, FFmpeg's name.
    """
    clock = Clock(container, stream)
    converter, kind = None, None
    for frame in frames:
        silence, skip = clock.place(frame, frame.samples)
        if kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate)) or converter is None:
            if converter is not None:
                yield from _blocks(converter.resample(None))
            converter = av.AudioResampler(format="fltp", layout=layout, rate=rate)
        scale = Fraction(rate, frame.sample_rate)
        silence, skip = round(silence * scale), round(skip * scale)
        for block in _blocks(converter.resample(frame)):
            if silence:
                yield np.zeros((block.shape[0], silence), np.float32)
            yield block[:, skip:]
            silence = skip = 0
    if converter is not None and kind is not None and kind[2] != rate:
        yield from _blocks(converter.resample(None))


def resampled(blocks: Iterable[np.ndarray], rate: int, wanted: int, channels: int) -> Iterator[np.ndarray]:
    """The blocks `[channels, n]` at another rate, Hz."""
    if rate == wanted:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate, wanted, channels, dtype="float32", quality="VHQ")
    for block in blocks:
        yield np.ascontiguousarray(resampler.resample_chunk(np.ascontiguousarray(block.T)).reshape(-1, channels).T)
    rest = resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)
    yield np.ascontiguousarray(rest.reshape(-1, channels).T)


def _blocks(frames: list[av.AudioFrame]) -> Iterator[np.ndarray]:
    for frame in frames:
        yield frame.to_ndarray().astype(np.float32, copy=False)
