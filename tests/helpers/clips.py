"""Small drawn clips and click tracks for the media tests, made with PyAV on the spot."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

from keysync_jax.media import color


def picture(index: int, width: int, height: int, bits: int = 8) -> np.ndarray:
    """Luma code values `[h, w]`: a slope with a bright square top left and a bar that moves with the frame number."""
    top = 2**bits - 1
    y, x = np.mgrid[0:height, 0:width]
    luma = 0.25 * top + 0.4 * top * (x / width + y / height) / 2
    luma[2 : height // 4, 2 : width // 4] = 0.9 * top
    column = (3 * index) % (width - 4)
    luma[height // 2 : height // 2 + 6, column : column + 4] = 0.1 * top
    return np.rint(luma)


def draw(frame: av.VideoFrame, index: int) -> None:
    """Paint every plane of a frame in an editable format."""
    bits = frame.format.components[0].bits
    for number, plane in enumerate(color.plane_views(frame)):
        values = picture(index, plane.shape[1], plane.shape[0], bits)
        plane[...] = values if number == 0 else np.rint(values * 0.5 + (2**bits - 1) * (0.2 + 0.1 * number))


def make_clip(
    path,
    pts,
    time_base=Fraction(1, 12800),
    size=(64, 48),
    pix_fmt="yuv420p",
    codec="libx264",
    options=None,
    container_format=None,
    rate=None,
    matrix=None,
    tags=None,
    paint=draw,
    last_duration=None,
    sample_aspect_ratio=None,
) -> list[list[np.ndarray]]:
    """Write one frame per entry of `pts` and return the planes that were encoded (copies)."""
    muxer = {"fflags": "+bitexact"}
    if str(path).endswith((".mp4", ".mov")):
        muxer |= {"video_track_timescale": str(time_base.denominator), "movie_timescale": str(48000 * time_base.denominator)}
        if 48000 * time_base.denominator > 2**31 - 1:
            muxer["movie_timescale"] = str(time_base.denominator)
    written = []
    with av.open(str(path), "w", format=container_format, options=muxer) as container:
        stream = container.add_stream(codec, rate=rate or Fraction(25), options=options or {"preset": "ultrafast"})
        context = stream.codec_context
        context.width, context.height, context.pix_fmt, context.time_base, context.thread_count = *size, pix_fmt, time_base, 1
        for name, value in (tags or {}).items():
            setattr(context, name, value)
        if sample_aspect_ratio:
            context.sample_aspect_ratio = sample_aspect_ratio
        if matrix is not None:
            stream.set_display_matrix(matrix)
        durations = {}

        def mux(packets):
            for packet in packets:
                packet.duration = durations.pop(packet.pts)
                container.mux(packet)

        for index, stamp in enumerate(pts):
            frame = av.VideoFrame(*size, pix_fmt)
            paint(frame, index)
            if color.is_editable(pix_fmt):
                written.append([plane.copy() for plane in color.plane_views(frame)])
            frame.pts, frame.time_base = stamp, time_base
            follows = pts[index + 1] - stamp if index + 1 < len(pts) else last_duration or (stamp - pts[index - 1] if index else 1)
            durations[stamp] = follows
            mux(stream.encode(frame))
        mux(stream.encode(None))
    return written


CLICKS = (0.25, 0.8)  # seconds
CLICK_SAMPLES = 24


def click_track(rate: int, channels: int, seconds: float) -> np.ndarray:
    """float32 `[n, channels]`: a faint hum with a short loud click centred at each of CLICKS."""
    n = round(rate * seconds)
    sound = 0.01 * np.sin(2 * np.pi * 200 * np.arange(n) / rate)
    half = max(4, round(CLICK_SAMPLES * rate / 48000)) // 2
    for at in CLICKS:
        middle = round(at * rate)
        if middle + half < n:
            sound[middle - half : middle + half + 1] += 0.8 * np.hanning(2 * half + 3)[1:-1]
    return np.repeat(sound[:, None], channels, axis=1).astype(np.float32)


def decode_sound(path) -> tuple[np.ndarray, int, Fraction]:
    """Decoded sound on the file's clock: float `[n, channels]` from the first sample at or after time zero, rate, time of the last end."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        rate = stream.codec_context.sample_rate
        converter = av.AudioResampler(format="fltp", layout=stream.codec_context.layout, rate=rate)
        out = np.zeros((0, stream.codec_context.layout.nb_channels), np.float32)
        for frame in container.decode(stream):
            base = Fraction(frame.time_base.numerator, frame.time_base.denominator)
            at = round(frame.pts * base * rate)
            for block in converter.resample(frame):
                values = block.to_ndarray().T
                values, at = values[max(0, -at) :], max(0, at)
                grown = np.zeros((max(len(out), at + len(values)), out.shape[1]), np.float32)
                grown[: len(out)] = out
                grown[at : at + len(values)] = values
                out = grown
    return out, rate, Fraction(len(out), rate)


def click_times(sound: np.ndarray, rate: int, start: float = 0.0) -> list[float]:
    """Seconds of the loudest point near each of CLICKS (parabolic peak), the sound being laid `start` seconds late."""
    mono = np.abs(sound.mean(axis=1))
    found = []
    for at in CLICKS:
        first = round((start + at - 0.1) * rate)
        near = mono[max(0, first) : first + round(0.2 * rate)]
        weights = np.where(near > 0.3 * near.max(), near, 0)
        found.append((max(0, first) + float(weights @ np.arange(len(near)) / weights.sum())) / rate)
    return found
